"""The cost of one clip by the length of its file and the size of its frames; the length should not matter.

Seconds and bytes read are those of a loader worker that opens the file for the first time, and then again. Longer files
repeat the packets of a short one. A worker's peak memory is reported next to the size of a clip's full-size frames,
which should never be held all at once.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path

import av

from mg.checkpoints.atomic import atomic_write
from mg.data.index import IndexRow
from mg.data.loader import DataConfig
from mg.data.reader import ClipReader
from mg.data.workers import ReaderPool
from mg.memory import peak_rss

FORMATS = {"mp4": "mp4", "mkv": "matroska", "ts": "mpegts"}


def by_length(source: Path, repeats: list[int], num_frames: int, image_size: int, clips: int) -> Iterator[dict]:
    """A record for each container and number of repetitions of `source`."""
    for (suffix, name), times in product(FORMATS.items(), repeats):
        path = repeat(source, source.with_name(f"{source.stem}_x{times}.{suffix}"), name, times)
        first, others = _costs(path, num_frames, image_size, clips)
        yield {
            "container": suffix,
            "file_mb": path.stat().st_size / 2**20,
            "first_clip_seconds": first["seconds"],
            "first_clip_mb_read": first["mb_read"],
            "clip_seconds": statistics.median(each["seconds"] for each in others),
            "clip_mb_read": statistics.median(each["mb_read"] for each in others) if others[0]["mb_read"] else None,
        }


def by_size(rows: list[IndexRow], num_frames: int, image_size: int, clips: int) -> dict:
    """The peak memory of a worker that reads clips of these videos, and the memory of a clip's full-size frames."""
    config = _config(num_frames, image_size)
    with closing(ReaderPool(config)) as pool:
        for number in range(clips):
            pool.submit(_read, rows[number % len(rows)], config, number).result()
        peak = peak_rss(pool.workers[0].process.pid)
    _, height, width = ClipReader(config).measure(rows[0])
    full = num_frames * height * width * 3
    return {
        "height": height,
        "width": width,
        "full_size_mb": full / 2**20,
        "peak_worker_mb": None if peak is None else peak / 2**20,
    }


def repeat(source: Path, path: Path, name: str, times: int) -> Path:
    """Write a video's packets `times` times one after the other into a container of format `name`, if not done yet."""
    if path.exists():
        return path
    with (
        atomic_write(path) as temporary,
        av.open(str(source)) as old,
        av.open(str(temporary), "w", format=name) as new,
    ):
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream)
        packets = [packet for packet in old.demux(stream) if packet.size]
        stamps = [(packet.pts, packet.dts) for packet in packets]
        length = max(pts for pts, _ in stamps) - min(pts for pts, _ in stamps) + packets[0].duration
        unit = stream.time_base
        for number in range(times):
            for packet, (pts, dts) in zip(packets, stamps):
                again = av.Packet(bytes(packet))
                again.pts, again.dts, again.time_base = pts + number * length, dts + number * length, unit
                again.duration, again.is_keyframe, again.stream = packet.duration, packet.is_keyframe, copied
                new.mux(again)
    return path


def _costs(path: Path, num_frames: int, image_size: int, clips: int) -> tuple[dict, list[dict]]:
    """The costs of the first clip of a file, and of later ones."""
    config = _config(num_frames, image_size)
    row = IndexRow(path, path.name)
    found = []
    with closing(ReaderPool(config)) as pool:
        process = pool.workers[0].process.pid
        pool.submit(_ready).result()
        for number in range(clips + 1):
            read, begun = bytes_read(process), time.perf_counter()
            pool.submit(_read, row, config, number).result()
            seconds = time.perf_counter() - begun
            after = bytes_read(process)
            found.append({"seconds": seconds, "mb_read": None if read is None else (after - read) / 2**20})
    return found[0], found[1:]


def _config(num_frames: int, image_size: int) -> DataConfig:
    return DataConfig(sample_n_frames=num_frames, image_size=image_size, crop_size=image_size, num_workers=1)


def _read(reader: ClipReader, row: IndexRow, config: DataConfig, number: int) -> None:
    reader.read(row, config.sample_n_frames, (config.crop_size,) * 2, (0, number))


def _ready(reader: ClipReader) -> None:
    """Returns once the worker has started; it looks for a file that doesn't exist."""
    try:
        reader.measure(IndexRow(Path("none.mp4"), "none.mp4"))
    except ValueError:
        return


def bytes_read(process: int | None = None) -> int | None:
    """Bytes that this process, or the one with the given id, has read from files so far (Linux); None elsewhere."""
    try:
        lines = Path(f"/proc/{process or 'self'}/io").read_text().splitlines()
    except OSError:
        return None
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])
