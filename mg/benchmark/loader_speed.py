"""How many clips per second this machine reads, by the size of the videos, the decoder, and the number of workers.

It times what training waits for: opening, decoding, scaling and cropping a clip until it is a tensor in the caller's
memory. Worker counts take turns, run by run, and the ratio to the first is taken within each run: a temporary slowdown
of the machine hits all of them.
"""

import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from mg.benchmark import clip_cost
from mg.benchmark.speed import describe, pairwise_ratio, write
from mg.config import require
from mg.data import DataError
from mg.data.errors import VideoError
from mg.data.index import IndexRow, read_index
from mg.data.loader import DataConfig
from mg.data.reader import ClipReader
from mg.data.synthetic import TRAIN_PHOTOGRAPHS, read_photograph
from mg.data.transforms import resize_to_cover
from mg.data.video import is_image, write_video
from mg.data.workers import ReaderPool
from mg.memory import peak_rss
from mg.overlap import read_ahead
from mg.plain_text import text_table

_logger = logging.getLogger(__name__)

_VIDEOS = 2  # of each size
_PACKAGES = ("numpy", "av", "decord", "opencv-python-headless")


def _powers_of_two() -> list[int]:
    """1, 2, 4 ... up to the number of processors, and that number itself."""
    most = os.cpu_count() or 1
    return sorted({*(2**i for i in range(most.bit_length())), most})


@dataclass(kw_only=True)
class LoaderSpeedConfig:
    """Measure how many clips per second the data loader reads.

    Args:
        csv_path: videos to read, an index as for training; by default test videos are made.
        video_folder: folder that the CSV's paths are relative to; by default the CSV's folder.
        sizes: of the test videos, 16:9, by height: 360p 720p 1080p ...
        num_frames: frames per clip.
        image_size: the shorter side is resized to it, and the middle square is cropped.
        decoders: decord | av; by default those that are installed.
        kinds: processes, as in training, and threads for comparison.
        workers: numbers of workers; by default 1, 2, 4 ... up to the number of processors.
        clips: timed clips in each run, after the first one of every worker.
        runs: of each number of workers, in turn.
        repeats: factors to lengthen a video by, to measure what a clip of it then costs; leave empty to skip this.
        large: sizes for which to measure the peak memory of a worker; leave empty to skip this.
        output_path: folder for loader.json and the test videos.
    """

    csv_path: str | None = None
    video_folder: str | None = None
    sizes: list[str] = field(default_factory=lambda: ["360p", "720p", "1080p"])
    num_frames: int = 32
    image_size: int = 256
    decoders: list[Literal["decord", "av"]] = field(default_factory=list)
    kinds: list[Literal["processes", "threads"]] = field(default_factory=lambda: ["processes", "threads"])
    workers: list[int] = field(default_factory=_powers_of_two)
    clips: int = 24
    runs: int = 3
    repeats: list[int] = field(default_factory=lambda: [1, 10, 100])
    large: list[str] = field(default_factory=lambda: ["360p", "2160p"])
    output_path: str = "outputs/benchmark_loader"

    def __post_init__(self):
        for name in ("num_frames", "image_size", "clips", "runs"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("sizes", "kinds", "workers"):
            require(bool(getattr(self, name)), self, name, "one or more")
        require(all(number >= 1 for number in self.workers), self, "workers", "numbers of at least 1")
        require(all(number >= 1 for number in self.repeats), self, "repeats", "numbers of at least 1")
        for size in [*self.sizes, *self.large]:
            height_of(size)


def height_of(size: str, name: str = "sizes") -> int:
    """360p -> 360

    Raises:
        ValueError: it is not such a size.
    """
    height = int(size[:-1]) if size.endswith("p") and size[:-1].isdecimal() else 0
    if height < 16 or height % 2:
        raise ValueError(f"{name} has {size!r}; a size is a video's height, even and at least 16, such as 720p")
    return height


def measure_loader(config: LoaderSpeedConfig) -> dict:
    """Measure, and rewrite `loader.json` after each source and decoder.

    Returns:
        "records": one for each source, decoder, kind and number of workers; "lengths": cost of a clip by file length;
        "large": memory of a worker by video size; "skipped": what was not measured and why; "failed": the same for
        failures; and the settings, versions and machine.

    Raises:
        ValueError: the index cannot be used or has no video.
    """
    found, path = describe(config, _PACKAGES), Path(config.output_path) / "loader.json"
    there = [decoder for decoder in ("decord", "av") if find_spec(decoder)]
    decoders = config.decoders or there
    found["skipped"] += [f"{decoder}: it is not installed" for decoder in decoders if decoder not in there]
    for (source, rows), decoder in product(_sources(config), [name for name in decoders if name in there]):
        try:
            found["records"] += _measure_source(config, source, rows, decoder)
        except DataError as error:
            found["failed"].append(f"{source} {decoder}: {error}")
        write(found, path)
    found |= _clip_costs(config)
    write(found, path)
    return found


def _clip_costs(config: LoaderSpeedConfig) -> dict[str, list[dict]]:
    """The cost of a clip by the length of its file and by the size of its frames."""
    folder, length = Path(config.output_path) / "videos", 2 * config.num_frames
    lengths: list[dict] = []
    if config.repeats:
        source = make_videos(folder, config.sizes[0], length)[0].path
        for record in clip_cost.by_length(source, config.repeats, config.num_frames, config.image_size, config.clips):
            _logger.info("a clip of %.1f MB of %s", record["file_mb"], record["container"])
            lengths.append(record)
    large = [
        clip_cost.by_size(make_videos(folder, size, length), config.num_frames, config.image_size, _VIDEOS)
        for size in config.large
    ]
    return {"lengths": lengths, "large": large}


def _sources(config: LoaderSpeedConfig) -> Iterator[tuple[str, list[IndexRow]]]:
    """The videos of each source, with its name."""
    if config.csv_path is not None:
        rows = [row for row in read_index(config.csv_path, config.video_folder) if not is_image(row.path)]
        if not rows:
            raise DataError(f"{config.csv_path}: it has no video to measure with")
        yield Path(config.csv_path).name, rows
        return
    for size in config.sizes:
        yield size, make_videos(Path(config.output_path) / "videos", size, 2 * config.num_frames)


def make_videos(folder: Path, size: str, num_frames: int, count: int = _VIDEOS) -> list[IndexRow]:
    """Make videos of a window moving over photographs; existing files are kept."""
    height = height_of(size)
    width = round(height * 16 / 9 / 2) * 2
    rows = []
    for number, photograph in enumerate(TRAIN_PHOTOGRAPHS[:count]):
        row = IndexRow(folder / f"{size}_{num_frames}_{number}.mp4", f"{size}_{num_frames}_{number}.mp4")
        rows.append(row)
        if not row.path.exists():
            _logger.info("making %s", row.path)
            picture = resize_to_cover(read_photograph(photograph)[None], height + num_frames, width + num_frames)
            write_video(row.path, (picture[:, i : i + height, i : i + width] for i in range(num_frames)), fps=24)
    return rows


def _measure_source(config: LoaderSpeedConfig, source: str, rows: list[IndexRow], decoder: str) -> list[dict]:
    """The records of a source and a decoder: all kinds and numbers of workers, taking turns."""
    setups = list(product(config.kinds, config.workers))
    runs: dict[tuple[str, int], list[dict]] = {setup: [] for setup in setups}
    for number, (kind, workers) in product(range(config.runs), setups):
        _logger.info("%s %s, %d %s, run %d of %d", source, decoder, workers, kind, number + 1, config.runs)
        runs[kind, workers].append(_measure_run(config, rows, decoder, kind, workers))
    first = [run["seconds"] for run in runs[setups[0]]]
    return [
        {
            "source": source,
            "decoder": decoder,
            "kind": kind,
            "workers": workers,
            "clips_per_second": statistics.median(config.clips / seconds for seconds in times),
            "seconds_of_runs": times,
            "processor_seconds_per_clip": statistics.median(run["processor_seconds"] for run in of_setup)
            / config.clips,
            "first_clip_seconds": statistics.median(run["first_clip_seconds"] for run in of_setup),
            "peak_worker_mb": max((run["peak_worker_mb"] for run in of_setup if run["peak_worker_mb"]), default=None),
            "speedup": pairwise_ratio(first, times),
            "unreadable": sum(run["unreadable"] for run in of_setup),
        }
        for (kind, workers), of_setup in runs.items()
        for times in [[run["seconds"] for run in of_setup]]
    ]


def _measure_run(
    config: LoaderSpeedConfig, rows: list[IndexRow], decoder: str, kind: str, workers: int
) -> dict[str, Any]:
    """Time `clips` clips, in the order of the rows, while all workers are busy."""
    size = config.image_size
    data = DataConfig(
        sample_n_frames=config.num_frames, image_size=size, crop_size=size, num_workers=workers, max_bad_share=1.0
    )
    unreadable = 0
    begun = time.perf_counter()
    with closing(ReaderPool(data, threads=kind == "threads", decoder=decoder)) as pool:
        jobs = read_ahead(lambda number: pool.submit(_read, rows[number % len(rows)], data, number), count(), workers)

        def next_clip() -> None:
            nonlocal unreadable
            for _ in rows:
                clip = next(jobs)[1].result()
                if not isinstance(clip, VideoError):
                    return
                unreadable += 1
            raise DataError(f"none of its videos can be read: {clip}")

        next_clip()
        first = time.perf_counter() - begun
        for _ in range(workers):
            next_clip()
        begun, spent = time.perf_counter(), _processor_time(pool)
        for _ in range(config.clips):
            next_clip()
        seconds, spent = time.perf_counter() - begun, _processor_time(pool) - spent
        peaks = [peak_rss(worker.process.pid) for worker in pool.workers]
    peak = max((peak for peak in peaks if peak), default=None)
    return {
        "seconds": seconds,
        "processor_seconds": spent,
        "first_clip_seconds": first,
        "unreadable": unreadable,
        "peak_worker_mb": None if peak is None else peak / 2**20,
    }


def _processor_time(pool: ReaderPool) -> float:
    """CPU seconds of this process and the workers."""
    times = [psutil.Process(worker.process.pid).cpu_times() for worker in pool.workers]
    return time.process_time() + sum(each.user + each.system for each in times)


def _read(reader: ClipReader, row: IndexRow, data: DataConfig, number: int) -> np.ndarray | VideoError:
    try:
        return reader.read(row, data.sample_n_frames, (data.crop_size,) * 2, (0, number))
    except VideoError as error:
        return error


COLUMNS = ("source", "decoder", "workers", "kind", "clips/s", "times", "CPU s/clip", "first clip s", "worker MB")


def format_table(found: dict) -> str:
    """The results as text: a row for each record, and what was left out."""
    table: list[Sequence] = [COLUMNS]
    for record in found["records"]:
        times, peak = record["speedup"], record["peak_worker_mb"]
        cells = [
            record["source"],
            record["decoder"],
            record["workers"],
            record["kind"],
            f"{record['clips_per_second']:.2f}",
            f"{times['median']:.2f} ({times['min']:.2f}-{times['max']:.2f})",
            f"{record['processor_seconds_per_clip']:.2f}",
            f"{record['first_clip_seconds']:.2f}",
            "-" if peak is None else f"{peak:.0f}",
        ]
        table.append(cells)
    rows = text_table(table, numbers=False)
    rows += [_length_line(record) for record in found["lengths"]]
    for record in found["large"]:
        peak = record["peak_worker_mb"]
        took = "" if peak is None else f"a worker took {peak:.0f} MB; "
        size = f"{record['width']} x {record['height']}"
        rows.append(f"frames of {size}: {took}a clip at full size is {record['full_size_mb']:.0f} MB")
    bad = {record["source"]: f"{record['unreadable']} clips" for record in found["records"] if record["unreadable"]}
    rows += [f"left out: {clips} of {source}, which could not be read" for source, clips in bad.items()]
    rows += [f"left out: {line}" for line in found["skipped"]]
    rows += [f"FAILED: {line}" for line in found["failed"]]
    return "\n".join(rows)


def _length_line(record: dict) -> str:
    first, later = record["first_clip_mb_read"], record["clip_mb_read"]
    read = "" if first is None else f", {first:.2f} and {later:.2f} MB read"
    seconds = f"{record['first_clip_seconds']:.3f} s at first, then {record['clip_seconds']:.3f} s"
    return f"a clip of {record['file_mb']:.1f} MB of {record['container']}: {seconds}{read}"
