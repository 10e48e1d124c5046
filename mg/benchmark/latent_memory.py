"""Peak memory of encoding a video to latents and decoding it again, by its length; and bytes per pixel of each model.

The commands encode and decode videos of several lengths, each time in a separate process whose peak resident memory
is read from Linux. It should not depend on the length.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mg.checkpoints import atomic_write
from mg.config import require
from mg.data.video import write_video
from mg.models import create_model
from mg.models.memory import MEASURED
from mg.plain_text import text_table

SMALL_TAE: dict = {"ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "norm_num_groups": 4}

# Runs a module as a program and writes the peak memory of its process to a file.
CHILD = """
import runpy, sys
from pathlib import Path
peak = sys.argv[1]
module, sys.argv = sys.argv[2], sys.argv[2:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    from mg.memory import peak_rss
    Path(peak).write_text(str(peak_rss()))
"""


@dataclass(kw_only=True)
class MemoryConfig:
    """Measure the peak memory of encoding and decoding videos of several lengths, or the bytes per pixel of models.

    Args:
        models: instead of the lengths, measure the bytes per pixel of these models, at half their width, which
            enable_tile auto relies on.
        frames: lengths of the videos; the others are compared with the first.
        size: height and width of their frames in pixels.
        ckpt_path: the model; by default a small TAE with random weights.
        tile: frames of a tile, half of which overlap in decoding; by default the model's own tiles.
        limit: largest allowed ratio of a longer video's memory to the first one's.
        mode: graph | pynative | auto: pynative.
        output_path: folder for memory.json, or footprints.json.
    """

    models: list[str] = field(default_factory=list)
    frames: list[int] = field(default_factory=lambda: [128, 1024])
    size: int = 192
    ckpt_path: str | None = None
    tile: int | None = None
    limit: float = 1.1
    mode: Literal["auto", "graph", "pynative"] = "auto"
    output_path: str = "outputs/benchmark_memory"

    def __post_init__(self):
        require(len(self.frames) > 1 and min(self.frames) > 0, self, "frames", "two or more lengths, each at least 1")
        require(set(self.models) <= set(MEASURED), self, "models", f"some of {', '.join(MEASURED)}")
        require(self.size >= 2 and self.size % 2 == 0, self, "size", "an even number of at least 2")


def measure_memory(config: MemoryConfig, encoder: str, decoder: str) -> dict:
    """Measure, and write `memory.json`.

    Args:
        encoder, decoder: the modules of the commands mg-encode-latents and mg-decode-latents.

    Returns:
        "peaks": a list of bytes per command, one for each length; "ratios": the largest peak of the longer videos over
        the first one's; "holds": whether all ratios are within the limit; and the settings.

    Raises:
        ValueError: a command failed; the message has its last line of output.
    """
    folder = Path(config.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    peaks: dict[str, list[int]] = {"encode_latents": [], "decode_latents": []}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        place = Path(place)
        checkpoint = config.ckpt_path
        if checkpoint is None:
            checkpoint = place / "tae.ckpt"
            create_model("tae", **SMALL_TAE).save_weights(checkpoint)
        for frames in config.frames:
            name = f"{frames}.mp4"
            write_video(place / name, moving_picture(frames, config.size), 24)
            (place / f"{frames}.csv").write_text(f"video\n{name}\n")
            latents = place / f"latents_{frames}"
            both = ["--device", "cpu", "--mode", config.mode]
            encode: list = ["--ckpt_path", checkpoint, "--csv_path", place / f"{frames}.csv", "--output_path", latents]
            encode += ["--image_size", 0, "--crop", "False", "--enable_tile"]
            if config.tile:
                tiles = {"encode_tile": config.tile, "decode_tile": config.tile, "decode_overlap": config.tile // 2}
                encode += [f"--tiling.{name}={value}" for name, value in tiles.items()]
            decode = ["--latents_path", latents, "--output_path", place / "decoded"]
            peaks["encode_latents"].append(peak_memory([encoder, *encode, *both], place / "peak"))
            peaks["decode_latents"].append(peak_memory([decoder, *decode, *both], place / "peak"))
    ratios = {command: max(values[1:]) / values[0] for command, values in peaks.items()}
    found = {
        "frames": config.frames,
        "size": config.size,
        "checkpoint": config.ckpt_path,
        "tile": config.tile,
        "mode": config.mode,
        "peaks": peaks,
        "ratios": ratios,
        "limit": config.limit,
        "holds": max(ratios.values()) <= config.limit,
    }
    with atomic_write(folder / "memory.json") as path:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def peak_memory(command: list, peak: Path) -> int:
    """Peak resident memory in bytes of a Python module run as a program, in its own process.

    Args:
        command: the module and its options.
        peak: a file to pass the number in.
    """
    words = [sys.executable, "-c", CHILD, str(peak), *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return int(peak.read_text())


def moving_picture(frames: int, size: int, piece: int = 16) -> Iterator[np.ndarray]:
    """Waves moving over frames of `size` x `size`, in pieces: uint8 (T', H, W, 3)"""
    y, x = np.mgrid[:size, :size]
    for start in range(0, frames, piece):
        clip = [
            np.stack([128 + 90 * np.sin((x + 2 * t) / 9 + c) * np.cos((y + t) / 11 - c) for c in range(3)], axis=-1)
            for t in range(start, min(start + piece, frames))
        ]
        yield np.stack(clip).astype(np.uint8)


def format_table(found: dict) -> str:
    """The results as text."""
    rows = [["peak resident memory, MB", *(f"{n} frames" for n in found["frames"]), "ratio"]]
    for command, values in found["peaks"].items():
        rows.append([command, *(f"{value / 2**20:.0f}" for value in values), f"{found['ratios'][command]:.3f}"])
    return "\n".join(text_table(rows))
