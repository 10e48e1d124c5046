"""Memory that each model needs per pixel of a clip: the constants of `mg.models.memory`.

A model of half the released width encodes or decodes a smaller and a larger clip, each in its own process; the result
is the difference of the peaks divided by the difference in pixels, and by channels.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mg.benchmark.speed_worker import Job, Worker
from mg.checkpoints import atomic_write
from mg.models.memory import MEASURED, OP_BY_OP, PARTS
from mg.plain_text import text_table

# Half the released width: large enough for the clips' memory to stand out, small enough for a small machine.
CONFIGS: dict[str, dict] = {
    "tae": {"ch": 64},
    "image_vae": {"ch": 64},
    "dc_ae": {name: [64, 128, 256, 256, 512, 512] for name in ("encoder_width_list", "decoder_width_list")},
    "hunyuan_vae": {"block_out_channels": [64, 128, 256, 256]},
    "temporal_vae": {"spatial_block_out_channels": [64, 128, 256, 256], "filters": 64},
}
FRAMES = {"dc_ae": 16, "tae": 16, "image_vae": 16}  # others 17
SIDES = (96, 160)


@dataclass
class Cost:
    """Measurements of a part of a model: bytes of the process before any clip, its peaks for the two clips, and the
    resulting bytes per pixel and channel."""

    model: str
    part: str
    mode: str
    before: int
    peaks: list[int]
    per_pixel_and_channel: float

    @property
    def assumed(self) -> float:
        """The value in `mg.models.memory`."""
        return getattr(MEASURED[self.model], self.part) * (1 if self.mode == "graph" else OP_BY_OP)


def measure_cost(model: str, part: str, mode: str, sides: tuple[int, int] = SIDES, config: dict | None = None) -> Cost:
    """Measure one part, encode or decode, of a model.

    Args:
        sides: height and width of the two clips.
        config: of the model, instead of half the released width.

    Raises:
        WorkerError: a process failed.
    """
    config = CONFIGS[model] if config is None else config
    frames, peaks = FRAMES.get(model, 17), []
    for side in sides:
        job = Job("run", "mindspore", part, (1, 3, frames, side, side), model, config, mode=mode)
        with Worker(job) as worker:
            before = worker.finish()["peak_rss"]
            worker.run()
            worker.run()  # a second call may need more than the first
            peaks.append(worker.finish()["peak_rss"])
    pixels = frames * (sides[1] ** 2 - sides[0] ** 2)
    return Cost(model, part, mode, before, peaks, (peaks[1] - peaks[0]) / (pixels * MEASURED[model].width(config)))


def format_costs(costs: list[Cost]) -> str:
    """The measured values next to those in `mg.models.memory`, as text."""
    lines = [["model", "part", "mode", "peaks, MB", "bytes per pixel and channel", "assumed"]]
    for cost in costs:
        peaks = " ".join(f"{peak / 2**20:.0f}" for peak in cost.peaks)
        lines.append(
            [cost.model, cost.part, cost.mode, peaks, f"{cost.per_pixel_and_channel:.1f}", f"{cost.assumed:g}"]
        )
    return "\n".join(text_table(lines, numbers=False))


def measure_costs(models: list[str], mode: str, path: Path) -> list[Cost]:
    """Measure all parts of some models and write the results to `path` as JSON."""
    costs = [measure_cost(model, part, mode) for model in models for part in PARTS]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n", encoding="utf-8")
    return costs
