"""How many frames per second a long video streams at, from file to file, and what reading, model and writing take.

A video is read, run and written in pieces, in constant memory, while threads read the next piece and write the previous
one. So the whole should take little more than its longest part. Each engine runs in its own process.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from mg import runtime
from mg.benchmark.loader_speed import height_of, make_videos
from mg.benchmark.speed import PACKAGES, describe, export_once, left_out, pairwise_ratio, row_of, set_up, write
from mg.benchmark.speed_worker import Job, Worker
from mg.config import require
from mg.data.clips import ClipOptions, open_clip
from mg.models import model_class
from mg.models.registry import merge_config
from mg.plain_text import text_table

PARTS = ("read", "model", "write")


@dataclass(kw_only=True)
class StreamsConfig:
    """Measure how many frames per second of a long video a model encodes and decodes, from file to file.

    Args:
        model: its name.
        configs: overrides of models' configs by name, such as {tae: {ch: 32}}.
        ckpt_path: its weights; by default random ones, whose videos take another time to write than real ones.
        parts: encode, a video to latents | decode, those latents to a video | reconstruct, a video to a video.
        engines: mindspore, and onnxruntime, openvino and torch for the exported model.
        precision: fp32 | tf32, on CUDA | fp16 | bf16, as far as an engine has it.
        device: auto | ascend | gpu | cpu for MindSpore; exported models run on the CPU, or with cuda on a GPU.
        mode: graph | pynative | auto: pynative on a CPU, as in the commands.
        threads: of an exported model, on a CPU; reading and writing need a processor each.
        video: file to read; by default a test video is made.
        size: of the test video, 16:9, by height: 360p 720p ...
        frames: how many frames to use, from the beginning.
        tile_frames, tile_size: frames, and height and width, of a tile; by default the model's own.
        runs: of reading, model, writing and the whole, in turn, after a whole one that compiles.
        output_path: folder for streams.json and the test video.
    """

    model: str = "tae"
    configs: dict[str, dict] = field(default_factory=dict)
    ckpt_path: str | None = None
    parts: list[Literal["encode", "decode", "reconstruct"]] = field(
        default_factory=lambda: ["encode", "decode", "reconstruct"]
    )
    engines: list[Literal["mindspore", "onnxruntime", "openvino", "torch"]] = field(
        default_factory=lambda: ["mindspore"]
    )
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "fp32"
    device: Literal["auto", "ascend", "gpu", "cpu", "cuda"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"
    threads: int = 2
    video: str | None = None
    size: str = "720p"
    frames: int = 240
    tile_frames: int | None = None
    tile_size: int | None = None
    runs: int = 3
    output_path: str = "outputs/benchmark_streams"

    def __post_init__(self):
        for name in ("threads", "frames", "runs"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("tile_frames", "tile_size"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("parts", "engines"):
            require(bool(getattr(self, name)), self, name, "one or more")
        height_of(self.size, "size")
        for name in (self.model, *self.configs):
            merge_config(model_class(name).default_config, self.configs.get(name, {}), name)


def measure_streams(config: StreamsConfig) -> dict:
    """Measure, and rewrite `streams.json` after each engine.

    Returns:
        "records": one for each engine and part; "skipped": lines on what was not measured and why; "failed": the same
        for failures; and the settings, versions and machine.

    Raises:
        ValueError: the device is not available, or the video cannot be read.
    """
    device = set_up(config.device, config.mode)
    found, path = describe(config, (*PACKAGES, "av")), Path(config.output_path) / "streams.json"
    video = config.video or str(make_videos(path.parent / "videos", config.size, config.frames, count=1)[0].path)
    with open_clip(Path(video), ClipOptions(num_frames=config.frames)) as clip:  # fails if it is unreadable or short
        if clip.num_frames < config.frames:
            raise ValueError(f"{video}: an image; a stream of {config.frames} frames needs a video")
    size = config.tile_size or 0
    job = Job(
        task="stream",
        engine="mindspore",
        part="",
        shape=(1, 3, config.tile_frames or 0, size, size),
        model=config.model,
        config=config.configs.get(config.model, {}),
        precision=config.precision,
        device=device,
        mode=runtime.chosen_mode(config.mode, device),
        threads=config.threads,
        checkpoint=config.ckpt_path,
        stream={"video": video, "frames": config.frames, "parts": config.parts, "runs": config.runs},
    )
    with TemporaryDirectory() as folder:
        for engine in config.engines:
            label = f"{config.model} {engine} {config.precision}"
            own = replace(job, engine=engine)
            if engine != "mindspore":
                own = replace(own, device="cuda" if device == "cuda" else "cpu", folder=folder)
            reason = left_out(own)
            if reason:
                found["skipped"].append(f"{label}: {reason}")
                continue
            with row_of(found, label, path):
                if engine != "mindspore":
                    export_once(own)
                with Worker(own) as worker:
                    found["records"] += _records(own, worker.said)
    write(found, path)
    return found


def _records(job: Job, said: dict) -> list[dict]:
    """A record of each part, from a worker's answer."""
    records = []
    for part, times in said["times"].items():
        seconds = {name: statistics.median(values) for name, values in times.items()}
        longest = max(PARTS, key=seconds.__getitem__)
        total = sum(seconds[name] for name in PARTS)
        records.append(
            {
                "model": job.model,
                "engine": job.engine,
                "precision": job.precision,
                "device": said["device"],
                "mode": job.mode,
                "part": part,
                "frames": job.stream["frames"],
                "size": said["size"],
                "tiling": said["tiling"],
                "frames_per_second": job.stream["frames"] / seconds["whole"],
                "seconds": seconds,
                "share": {name: seconds[name] / total for name in PARTS},
                "longest": longest,
                "whole_by_longest": pairwise_ratio(times["whole"], times[longest]),
                "times": times,
                "peak_rss_mb": said["peak_rss"] / 2**20 if said["peak_rss"] else None,
            }
        )
    return records


COLUMNS = ("part", "engine", "precision", "frames/s", "read s", "model s", "write s", "whole s", "whole/longest")


def format_table(found: dict) -> str:
    """The results as text: a row for each record, and what was left out."""
    table: list[Sequence] = [COLUMNS]
    for record in found["records"]:
        seconds, share, ratio = record["seconds"], record["share"], record["whole_by_longest"]
        cells = [record["part"], record["engine"], record["precision"], f"{record['frames_per_second']:.2f}"]
        cells += [f"{seconds[name]:.2f} ({share[name]:.0%})" for name in PARTS]
        cells += [f"{seconds['whole']:.2f}", f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"]
        table.append(cells)
    rows = text_table(table, numbers=False)
    about = {f"{each['model']}, {each['frames']} frames of {each['size']}" for each in found["records"]}
    rows += sorted(about)
    rows += [f"left out: {line}" for line in found["skipped"]]
    rows += [f"FAILED: {line}" for line in found["failed"]]
    return "\n".join(rows)
