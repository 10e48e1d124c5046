"""One autoencoder's part in the benchmark of latents: encode the clips, train a denoiser on the latents, and sample it.

This is done with the code of mg-latent-statistics, mg-encode-latents, mg-train and mg-generate.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mg import runtime
from mg.checkpoints import atomic_write, read_state_dict
from mg.config import PATH_ALIASES, require
from mg.data.clips import ClipOptions
from mg.data.loader import OpenSoraDataConfig
from mg.diffusion.networks import network_of
from mg.generation.config import (
    AutoencoderSection,
    DenoiserSection,
    GenerateConfig,
    SchedulerSection,
    TextEncoderSection,
)
from mg.generation.generate import generate
from mg.generation.samples import read_rows
from mg.generation.training.config import (
    DenoiserTrainConfig,
    TrainedDenoiserSection,
    TrainingSchedulerSection,
    ValidationSection,
)
from mg.inference.encode import EncodeConfig, encode_csv
from mg.inference.reconstruction import InferenceConfig
from mg.inference.statistics import STATISTICS_FILE, StatisticsConfig, measure_csv
from mg.latents import open_latents
from mg.training.logs import VALIDATION_FILE, read_log
from mg.training.optim import OptimConfig
from mg.training.trainer import train

MEASUREMENTS = 20  # on the held-out clips during a run, besides the one before it


@dataclass(kw_only=True)
class LatentBenchmarkConfig(ClipOptions):
    """Train the same small denoiser on the latents of several autoencoders, and measure how well it learns.

    Args:
        csv_path: clips to train on, a CSV with a column `video` or `path`.
        test_csv_path: held-out clips to measure on.
        test_video_folder: folder that its paths are relative to, by default the CSV's own.
        models: one or more autoencoders: checkpoints, inference configs and runs, as for mg-benchmark.
        denoiser: the denoiser; DiT learns without captions, others use the captions in the CSVs.
        text_encoder: encodes the captions; by default none are used.
        tokens: along frames, rows and columns of a clip; by default the fewest latents that any autoencoder has.
        batch_size: clips per batch.
        max_steps: updates per autoencoder.
        optim: the denoiser's optimizer.
        dtype: precision of the denoiser's matrix products: fp32 | fp16 | bf16.
        validation_clips: how many of the held-out clips to measure on, from the first.
        bands: equal parts of the schedule's time, each with its own loss.
        samples: clips to generate per autoencoder.
        num_sampling_steps: sampling steps for them.
        seed: for the denoiser's parameters, the order of the clips and all noise.
        output_path: folder to write to.
        resume: continue with what is there; otherwise delete it.

    Raises:
        ValueError: a setting out of range.
    """

    aliases: ClassVar[dict[str, str]] = PATH_ALIASES

    csv_path: str
    test_csv_path: str
    models: list[str]
    test_video_folder: str | None = None
    num_frames: int | None = 16
    image_size: int = 128
    denoiser: TrainedDenoiserSection = field(
        default_factory=lambda: TrainedDenoiserSection(type="DiT-XL/2", depth=4, hidden_size=128, num_heads=4)
    )
    text_encoder: TextEncoderSection = field(default_factory=TextEncoderSection)
    tokens: list[int] | None = None
    batch_size: int = 4
    max_steps: int = 1000
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, warmup_steps=20, ema_decay=0.99))
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    validation_clips: int = 16
    bands: int = 10
    samples: int = 4
    num_sampling_steps: int = 30
    seed: int = 42
    output_path: str = "outputs/latent_benchmark"
    resume: bool = True

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.models), self, "models", "one or more checkpoints or inference configs")
        one_size = "true, with num_frames and image_size: all clips have one size"
        require(self.crop, self, "crop", one_size)
        require(self.buckets is None, self, "buckets", "null: all clips have one size")
        require(self.num_frames is not None, self, "num_frames", "given: all clips have one size")
        require(self.image_size > 0, self, "image_size", "given: all clips have one size")
        for name in ("batch_size", "max_steps", "validation_clips", "bands", "num_sampling_steps"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("samples", "seed"):
            require(getattr(self, name) >= 0, self, name, "at least 0")
        right = self.tokens is None or (len(self.tokens) == 3 and min(self.tokens) >= 1)
        require(right, self, "tokens", "three numbers, along frames, rows and columns, such as [2, 16, 16]")
        for name in ("condition", "patch_size", "from_pretrained"):
            require(getattr(self.denoiser, name) is None, self.denoiser, name, "null: it follows from the latents")
        if not self.captioned and "classes" not in network_of(self.denoiser.type)[0].text_encoders:
            raise ValueError(
                f"denoiser.type is {self.denoiser.type}, which needs captions; give text_encoder.embeddings or "
                "text_encoder.from_pretrained, or use DiT-XL/2"
            )

    @property
    def frames(self) -> int:
        """Frames of each clip."""
        return self.num_frames or 0

    @property
    def captioned(self) -> bool:
        """Whether the denoiser gets the clips' captions."""
        return self.text_encoder.embeddings is not None or self.text_encoder.from_pretrained is not None

    @property
    def captions(self) -> TextEncoderSection:
        """The text encoder used; without captions, all clips have the same class."""
        return self.text_encoder if self.captioned else TextEncoderSection(type="classes", num_classes=1)


@dataclass
class Autoencoder:
    """One of the autoencoders: its label, its defining settings, its weights and tiles, and its folder."""

    label: str
    settings: dict[str, Any]
    config: InferenceConfig
    folder: Path


def encode(one: Autoencoder, config: LatentBenchmarkConfig, folder: Path) -> tuple[int, ...]:
    """Scale an autoencoder's latents to unit variance and store those of all clips; returns (z, t, h, w) of each."""
    runtime.setup(config.device, config.mode, config.seed)
    run: dict[str, Any] = {option.name: getattr(config, option.name) for option in fields(ClipOptions)}
    run |= {"video_folder": None, "enable_tile": one.config.enable_tile, "tiling": one.config.tiling}
    scaled = one.folder / "autoencoder"
    if not (scaled / STATISTICS_FILE).is_file():
        run |= {"csv_path": str(folder / "train.csv"), "output_path": str(scaled)}
        statistics, _ = measure_csv(StatisticsConfig(model=one.config.model, **run))
        if statistics.channels is None:
            raise ValueError("no clip could be encoded: " + "; ".join(error for _, error in statistics.failures[:2]))
        if statistics.unwritten is not None:
            raise statistics.unwritten
    model = replace(one.config.model, from_pretrained=str(scaled), config={})
    shapes = set()
    for part in ("train", "test"):
        run |= {"csv_path": str(folder / f"{part}.csv"), "output_path": str(one.folder / part)}
        encode_csv(EncodeConfig(model=model, retry_failed=True, **run))
        shapes |= {latents.shape for latents in open_latents(one.folder / part).values()}
    if len(shapes) != 1:
        several = ", ".join(map(str, sorted(shapes))) or "none"
        raise ValueError(
            f"all latents must have the same shape, these have {several}; an image is not a clip of num_frames"
        )
    return shapes.pop()


def learn(
    one: Autoencoder, config: LatentBenchmarkConfig, folder: Path, shape: tuple[int, ...], tokens: Sequence[int]
) -> dict:
    """Train and sample on an autoencoder's latents of a shape (z, t, h, w); returns the result."""
    patch = [math.ceil(size / count) for size, count in zip(shape[1:], tokens)]
    counts = "x".join(str(math.ceil(size / side)) for size, side in zip(shape[1:], patch))
    place = one.folder / counts
    if (place / "result.json").is_file():
        return json.loads((place / "result.json").read_text(encoding="utf-8"))
    condition = None
    if network_of(config.denoiser.type)[0].name == "dit":
        condition = "text" if config.captioned else "label_1"
    denoiser = replace(config.denoiser, patch_size=patch, condition=condition)
    weights = str(train(_training(one, config, place / "run", denoiser)))
    fps = next(iter(open_latents(one.folder / "train").values())).fps
    if config.samples:
        runtime.setup(config.device, config.mode, config.seed)
        network = DenoiserSection(**{each.name: getattr(denoiser, each.name) for each in fields(DenoiserSection)})
        generate(_sampling(one, config, place / "samples", replace(network, from_pretrained=weights), fps))
    samples = read_rows(place / "samples").values()
    result = {
        "name": one.settings["name"],
        **_compression(config, shape),
        "tokens": counts,
        "patch": "x".join(map(str, patch)),
        "parameters": _count(denoiser, weights),
        **_figures(place / "run"),
        "samples": [str((place / "samples" / row.file).relative_to(folder)) for row in samples if row.file],
        "failed_samples": [row.error for row in samples if row.error],
        "frames": config.frames,
        "fps": fps,
    }
    with atomic_write(place / "result.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _training(
    one: Autoencoder, config: LatentBenchmarkConfig, run: Path, denoiser: TrainedDenoiserSection
) -> DenoiserTrainConfig:
    every = max(1, config.max_steps // MEASUREMENTS)
    return DenoiserTrainConfig(
        latents_path=str(one.folder / "train"),
        output_path=str(run),
        model=denoiser,
        text_encoder=config.captions,
        scheduler=TrainingSchedulerSection(type="rflow"),
        validation=ValidationSection(
            latents_path=str(one.folder / "test"), clips=config.validation_clips, every=every, bands=config.bands
        ),
        data=OpenSoraDataConfig(batch_size=config.batch_size, num_workers=0),
        optim=config.optim,
        caption_dropout=0.1 if config.captioned else 0.0,
        epochs=config.max_steps,
        max_steps=config.max_steps,
        ckpt_save_steps=max(1, config.max_steps // 4),
        ckpt_max_keep=1,
        log_every=every,
        dtype=config.dtype,
        seed=config.seed,
        device=config.device,
        mode="graph" if config.mode == "auto" else config.mode,
        resume=True,
    )


def _sampling(
    one: Autoencoder, config: LatentBenchmarkConfig, samples: Path, denoiser: DenoiserSection, fps: float
) -> GenerateConfig:
    """Clips from the same noise seeds for every autoencoder."""
    prompts, each = ["0"], config.samples
    if config.captioned:
        captions = [latents.caption for latents in open_latents(one.folder / "test").values()]
        prompts, each = list(dict.fromkeys(captions))[: config.samples], 1
    return GenerateConfig(
        model=denoiser,
        vae=AutoencoderSection(
            type=one.settings["name"],
            from_pretrained=str(one.folder / "autoencoder"),
            dtype=one.config.model.dtype,
            enable_tile=one.config.enable_tile,
            tiling=one.config.tiling,
            max_memory=config.max_memory,
        ),
        text_encoder=config.captions,
        scheduler=SchedulerSection(type="rflow", num_sampling_steps=config.num_sampling_steps, cfg_scale=1.0),
        dtype=config.dtype,
        prompt=prompts,
        clean_prompts=False,
        num_sample=each,
        num_frames=config.frames,
        image_size=[config.image_size, config.image_size],
        fps=fps * config.frame_stride,
        frame_interval=config.frame_stride,
        save_dir=str(samples),
        gallery=False,
        verbose=0,
        seed=config.seed,
        device=config.device,
        mode=config.mode,
    )


def _compression(config: LatentBenchmarkConfig, shape: tuple[int, ...]) -> dict:
    pixels = config.frames * config.image_size**2
    values = math.prod(shape)
    return {
        "compression": 3 * pixels / values,
        "values_per_pixel": values / pixels,
        "latents": "x".join(map(str, shape)),
    }


def _count(denoiser: TrainedDenoiserSection, weights: str) -> int:
    """The number of trained parameters."""
    fixed = network_of(denoiser.type)[0].settings
    return sum(int(np.prod(value.shape)) for name, value in read_state_dict(weights).items() if name not in fixed)


def _figures(run: Path) -> dict:
    """Losses and curves from a run's files."""
    updates = read_log(run / "log.jsonl", 2**62)
    measured = read_log(run / VALIDATION_FILE, 2**62)
    first, last = measured[0], measured[-1]
    window = max(1, len(updates) // MEASUREMENTS)
    losses = [record["loss"] for record in updates]
    starts = range(0, len(losses) - window + 1, window)
    means = [[start + window, float(np.mean(losses[start : start + window]))] for start in starts]
    return {
        "updates": len(updates),
        "loss_untrained": first["loss"],
        "loss": last["loss"],
        "baseline": last["baseline"],
        "share_untrained": first["loss"] / first["baseline"],
        "share": last["loss"] / last["baseline"],
        "bands": {name: last[name] for name in last if name not in ("step", "loss", "baseline")},
        "validation": [[record["step"], record["loss"]] for record in measured],
        "training": means,
    }
