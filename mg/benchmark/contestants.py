"""The contestants of the quality benchmark: models and baselines as the command names them, and their timed passes."""

import contextlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from mg import runtime
from mg.checkpoints import CheckpointError, find_config, read_config, where_from
from mg.checkpoints.digest import sha256
from mg.config import parse_config
from mg.evaluation.baseline import DCT_CELL, DCT_PLACES, area_trilinear_baseline, dct_baseline
from mg.inference.fitting import Fitting, described
from mg.inference.loading import load_model
from mg.inference.outputs import unique
from mg.inference.reconstruction import InferenceConfig
from mg.models import model_name
from mg.plain_text import printable

DCT = "dct"  # among the baselines


@dataclass
class Contestant:
    """A model by its label, with the `settings` that determine its results. Without `config` it is a `baseline`."""

    label: str
    settings: dict
    config: InferenceConfig | None = None
    baseline: str = ""


def read_models(models: Sequence[str], baselines: Sequence[str] = ()) -> list[Contestant]:
    """Models and baselines, given as to mg-benchmark, with unique labels. No weights are loaded.

    Raises:
        ValueError, OSError: a file is missing or cannot be used.
    """
    read = [_read_model(text) for text in models]
    labels = unique([printable(label) for label, _ in read] + [f"baseline_{text}" for text in baselines])
    contestants = []
    for label, (_, inference) in zip(labels, read):
        contestants.append(Contestant(label, _describe(inference), inference))
    for label, text in zip(labels[len(read) :], baselines):
        contestants.append(Contestant(label, {"name": Baseline(text).name}, baseline=text))
    return contestants


def _read_model(text: str) -> tuple[str, InferenceConfig]:
    """The label and inference config for one of `models`."""
    found = re.fullmatch(r"(.*?(?:\.yaml|\.yml|metrics\.json))(?:=(.+))?", text)
    file, checkpoint = found.groups() if found and not Path(text).is_dir() else (None, text)
    if file is None:
        given = []
    elif file.endswith(".json"):
        content = read_config(file).get("config", {})
        given = [f"--{key}={as_option(content[key])}" for key in ("model", "enable_tile", "tiling") if key in content]
    else:
        given = ["--config", file]
    try:
        inference = parse_config(InferenceConfig, "", ["--ckpt_path=", "--csv_path=", *given])
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(file) else f"{file}: {error}") from None
    inference.model.from_pretrained = checkpoint or inference.model.from_pretrained
    if not inference.model.from_pretrained:
        raise ValueError(f"{file} names no checkpoint: write {file}=CHECKPOINT, or set model.from_pretrained there")
    if checkpoint:
        return _stem(Path(checkpoint)), inference
    label = Path(file).resolve().parent.name if file.endswith(".json") else Path(file).stem
    name = inference.model.name or ""  # shipped configs are called video.yaml
    return (label if name in label else f"{name}_{label}"), inference


def as_option(value: Any) -> str:
    """A setting as a command-line argument."""
    return value if isinstance(value, str) else json.dumps(value)


def _stem(path: Path) -> str:
    """A checkpoint's name; a folder's may contain dots."""
    return path.resolve().name if path.is_dir() else path.stem


def _describe(inference: InferenceConfig) -> dict:
    """What the model's results depend on."""
    settings = inference.model
    path = Path(settings.from_pretrained)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder{where_from(path)}")
    beside = find_config(path)
    stored = read_config(beside) if beside else {}
    tiling = {key: value for key, value in vars(settings).items() if "tile" in key or "tiling" in key}
    if not (settings.use_spatial_tiling or settings.use_temporal_tiling):
        tiling = {}
    name = settings.name
    with contextlib.suppress(CheckpointError):  # building it fails later
        name = name or model_name(path)
    return {
        "name": name,
        "checkpoint": str(path),
        "sha256": sha256(path),
        "dtype": settings.dtype,
        "tiling": tiling or _tiling(inference),
        "config": {**stored, **settings.config},
    }


def _tiling(inference: InferenceConfig) -> dict | str:
    given = inference.tiling.given()
    if inference.enable_tile == "auto":
        return {"auto": "where a clip does not fit whole", **given}
    return (given or "the model's own") if inference.enable_tile else "none"


@dataclass
class Pass:
    """One pass of a clip through a model: `y` (3, T, H, W), not clipped, the latents' shape, and what the pass `took`,
    as fields of a row."""

    y: np.ndarray
    latents: tuple[int, ...]
    took: dict[str, float | int | str] = field(default_factory=dict)


class Timed:
    """A model whose passes are timed. A new shape runs once untimed first, because that compiles.

    Args:
        config: the model and its tiles.
        max_memory: GB that running a clip may use, as in `ClipOptions`.
    """

    def __init__(self, config: InferenceConfig, max_memory: float | None = None):
        self.model = load_model(config)
        self._fitting = Fitting(config.enable_tile, config.tiling.given(), max_memory)
        self.model.sample_deterministic = True
        self.cell = self.model.temporal_compression, self.model.spatial_compression
        self._seen: set[tuple] = set()

    def __call__(self, x: np.ndarray) -> Pass:
        return self._fitting.run(self.model, (1, *x.shape), partial(self._run_twice, x))

    def _run_twice(self, x: np.ndarray) -> Pass:
        if (x.shape, self.model.tiling) not in self._seen:
            self._run(x)
            self._seen.add((x.shape, self.model.tiling))
        runtime.forget_peak_memory()
        found = self._run(x)
        found.took["tiles"] = described(self.model.tiling)
        if peak := runtime.peak_memory():
            found.took |= {"peak_memory": peak[0], "memory_of": peak[1]}
        return found

    def _run(self, x: np.ndarray) -> Pass:
        _, frames, height, width = x.shape
        start = time.perf_counter()
        z = self.model.encode(ms.Tensor(x[None])).z
        z.asnumpy()  # waits for the result
        between = time.perf_counter()
        y = self.model.decode(z, frames)[:, :, :, :height, :width].asnumpy()
        end = time.perf_counter()
        return Pass(y[0], z.shape[1:], {"encode_seconds": between - start, "decode_seconds": end - between})


class Baseline:
    """Interpolated cell averages, or a cosine transform: a lower bound for quality. Speed and memory would be
    meaningless and are not measured.

    Args:
        text: frames x pixels or dct, as in the option.
    """

    def __init__(self, text: str):
        self.is_dct = text == DCT
        frames, pixels = self.cell = DCT_CELL if self.is_dct else tuple(map(int, text.split("x")))
        self.name = f"area average over {frames}x{pixels}x{pixels}, then trilinear interpolation"
        if self.is_dct:
            self.name = f"DCT of {frames}x{pixels}x{pixels}x3 blocks, {len(DCT_PLACES)} values of each kept"

    def __call__(self, x: np.ndarray) -> Pass:
        frames, pixels = self.cell
        sizes = (-(-size // cell) for size, cell in zip(x.shape[1:], (frames, pixels, pixels)))
        if self.is_dct:
            return Pass(dct_baseline(x), (len(DCT_PLACES), *sizes))
        return Pass(area_trilinear_baseline(x, frames, pixels), (x.shape[0], *sizes))
