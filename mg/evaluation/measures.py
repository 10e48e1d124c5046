"""PSNR, SSIM, LPIPS and FloLPIPS of one video against another, selected by name.

    measures = Measures(MeasuresConfig(metric=["psnr", "lpips"]))
    measures.left_out                   # {"lpips": "no LPIPS weights at ..."} if there are none
    measures.of(real, generated)        # {"psnr": 31.4}

The values for a video are means over its frames.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from mindspore import Tensor

from mg.config import require
from mg.evaluation.flolpips import flolpips
from mg.evaluation.flow import FLOW_TITLES, optical_flow
from mg.evaluation.metrics import PSNR_CEILING, RANGE_TOLERANCE, psnr, ssim
from mg.losses.lpips import LPIPSMaps, how_to_make_weights

METRICS = ("psnr", "ssim", "lpips", "flolpips")
LEARNED = ("lpips", "flolpips")  # what needs the weights of LPIPS

# Most pixels (frames times height times width) that LPIPS processes at once, unless a single frame has more.
CHUNK_PIXELS = 16 * 256 * 256


@dataclass
class MeasuresConfig:
    """What is measured.

    Args:
        metric: one or more of psnr, ssim, lpips, flolpips.
        lpips_net: backbone of LPIPS; alex is the usual one for reporting.
        lpips_weights: its file, made by mg-convert-lpips; by default models/lpips_<net>.safetensors.
        flow: optical flow estimator for flolpips; both are OpenCV's.

    Raises:
        ValueError: an unknown metric, or none.
    """

    metric: list[str] = field(default_factory=lambda: list(METRICS))
    lpips_net: Literal["alex", "vgg"] = "alex"
    lpips_weights: str | None = None
    flow: Literal["dis", "farneback"] = "dis"

    def __post_init__(self):
        known = bool(self.metric) and set(self.metric) <= set(METRICS)
        require(known, self, "metric", f"one or more of {', '.join(METRICS)}")
        self.metric = list(dict.fromkeys(self.metric))
        self.lpips_weights = self.lpips_weights or f"models/lpips_{self.lpips_net}.safetensors"


class Measures:
    """The measures of a config, ready to use.

    Attributes:
        names: those that are available, in the order given.
        left_out: name -> why it is not available, in one line.

    Raises:
        LPIPSWeightsError: the LPIPS weights do not fit the network.
    """

    def __init__(self, config: MeasuresConfig):
        self.config = config
        self.left_out: dict[str, str] = {}
        self._lpips = None
        learned = [name for name in config.metric if name in LEARNED]
        if learned and Path(config.lpips_weights).is_file():
            self._lpips = LPIPSMaps(config.lpips_net, config.lpips_weights)
        elif learned:
            self.left_out = dict.fromkeys(learned, how_to_make_weights(config.lpips_net, config.lpips_weights))
        self.names = [name for name in config.metric if name not in self.left_out]

    def describe(self) -> dict[str, str]:
        """How each measure is defined: name -> one line."""
        net, flow = self.config.lpips_net, FLOW_TITLES[self.config.flow]
        lines = {
            "psnr": f"dB, per frame, data range 1; a frame without any error counts {PSNR_CEILING:g}",
            "ssim": "per frame, Gaussian window of 11 pixels, sigma 1.5, data range 1",
            "lpips": f"LPIPS v0.1 ({net}), per frame",
            "flolpips": f"LPIPS ({net}) weighted by the difference of {flow} flows; not comparable with PWC-Net's, the "
            "paper's FloLPIPS",
        }
        return {name: lines[name] for name in self.names}

    def of(self, real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
        """The measures of one video, each the mean over its frames.

        Args:
            real, generated: floats (T, H, W, 3) in [0, 1].

        Returns:
            name -> value, in the order of `names`. A single frame has no motion and thus no `flolpips`.

        Raises:
            ValueError: shapes differ, values are not finite or not in [0, 1], or frames are too small for a measure.
        """
        self._check(real, generated)
        maps = self._maps(real, generated) if self._lpips else []
        found = {}
        for name in self.names:
            if name == "psnr":
                frames = np.minimum(psnr(real, generated), PSNR_CEILING)
            elif name == "ssim":
                frames = ssim(real, generated)
            elif name == "lpips":
                frames = sum(map_.mean((1, 2), dtype=np.float64) for map_ in maps)
            elif len(real) == 1:
                continue
            else:
                flows = (optical_flow(video, self.config.flow) for video in (real, generated))
                frames = flolpips([map_[:-1] for map_ in maps], *flows)
            found[name] = float(frames.mean())
        return found

    def _check(self, real: np.ndarray, generated: np.ndarray) -> None:
        if real.shape != generated.shape or real.ndim != 4 or real.shape[-1] != 3 or not real.size:
            raise ValueError(f"videos to compare must both be (T, H, W, 3), got {real.shape} and {generated.shape}")
        for label, video in (("real", real), ("generated", generated)):
            if not np.issubdtype(video.dtype, np.floating) or not np.isfinite(video).all():
                raise ValueError(f"the {label} video has values that are not finite or not floats: {video.dtype}")
            if video.min() < -RANGE_TOLERANCE or video.max() > 1 + RANGE_TOLERANCE:
                raise ValueError(f"the {label} video must be in [0, 1], got {video.min():.4g} to {video.max():.4g}")

    def _maps(self, real: np.ndarray, generated: np.ndarray) -> list[np.ndarray]:
        """LPIPS maps per depth, (T, h, w), computed in chunks of equal size: a compiled network sees one shape per
        video shape."""
        most = max(1, CHUNK_PIXELS // (real.shape[1] * real.shape[2]))
        size = math.ceil(len(real) / math.ceil(len(real) / most))
        chunks = []
        for start in range(0, len(real), size):
            indices = np.minimum(np.arange(start, start + size), len(real) - 1)  # the last frame fills the last chunk
            x, y = (
                np.ascontiguousarray(video[indices].transpose(0, 3, 1, 2), np.float32) for video in (real, generated)
            )
            chunks.append([map_.asnumpy() for map_ in self._lpips(Tensor(x * 2 - 1), Tensor(y * 2 - 1))])
        return [np.concatenate(depth)[: len(real)] for depth in zip(*chunks)]
