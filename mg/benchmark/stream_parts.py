"""The parts of a stream, each on its own and all together: reading, the model, writing.

Everything is what `mg-encode-latents` and `mg-decode-latents` run. A part on its own repeats the first pieces of the
stream, so that it needs no more memory than the whole does, however long the video.
"""

import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mg.codec import Read, Streams
from mg.data.clips import ClipOptions, open_clip
from mg.inference.decode import to_frames
from mg.inference.outputs import write_frames
from mg.latents import SETTINGS_FILE, LatentFolder, LatentsRow, ShardWriter
from mg.overlap import write_behind

Pieces = Generator[np.ndarray, None, None]

SHARD_SIZE = 2**28


class Stream:
    """A way of a video through a model; pieces are (1, C, T', H, W).

    Args:
        open: what the stream is read from.
        run: the model, a function of how to read and whether a thread reads the next piece meanwhile.
        write: writes what `run` yields.
    """

    def __init__(
        self,
        open: Callable[[], AbstractContextManager[Read]],
        run: Callable[[Read, bool], Pieces],
        write: Callable[[Iterator[np.ndarray]], None],
    ):
        self.open, self.run, self.write = open, run, write

    def prepare(self) -> None:
        """Run it once, which compiles, and note the pieces that it reads and writes; keep the first of each length."""
        self._bounds: list[tuple[int, int]] = []
        self._read: dict[int, np.ndarray] = {}
        self._lengths: list[int] = []
        self._written: dict[int, np.ndarray] = {}

        def noted(start: int, stop: int) -> np.ndarray:
            self._bounds.append((start, stop))
            piece = read(start, stop)
            self._read.setdefault(stop - start, piece)
            return piece

        def computed() -> Pieces:
            with closing(self.run(noted, True)) as pieces:
                for piece in pieces:
                    self._lengths.append(piece.shape[2])
                    self._written.setdefault(piece.shape[2], piece)
                    yield piece

        with self.open() as read:
            write_behind(self.write, computed())

    def reading_only(self) -> None:
        with self.open() as read:
            for start, stop in self._bounds:
                read(start, stop)

    def model_only(self) -> None:
        for _ in self.run(lambda start, stop: self._read[stop - start], False):
            pass

    def writing_only(self) -> None:
        self.write(self._written[length] for length in self._lengths)

    def whole(self) -> None:
        with self.open() as read:
            write_behind(self.write, self.run(read, True))


class Video:
    """The video of a benchmark, and the latents and video that are made of it.

    Args:
        path: a video with at least `frames` frames.
        frames: how many of them to use.
        folder: where to write.
    """

    def __init__(self, model: Streams, path: Path, frames: int, folder: Path):
        self.path, self.num_frames, self.folder = path, frames, folder
        self.options = ClipOptions(num_frames=frames, image_size=0, crop=False)
        with self.opened() as clip:
            self.size, self.fps = clip.size, clip.fps
        self.length = model.latent_shape((1, 3, frames, *self.size))[2]

    def opened(self):
        return open_clip(self.path, self.options)

    @contextmanager
    def frames(self) -> Iterator[Read]:
        with self.opened() as clip:
            yield lambda start, stop: clip.read(start, stop)[None]

    def write_latents(self, pieces: Iterator[np.ndarray]) -> None:
        folder = self.folder / "latents"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / SETTINGS_FILE).write_text(json.dumps({}), encoding="utf-8")
        height, width = self.size
        row = LatentsRow(self.path.name, frames=self.num_frames, height=height, width=width, fps=self.fps)
        with ShardWriter(folder, {row.name: 0}, "fp32", SHARD_SIZE, 0, 1) as shards:
            shards.store(row, self.length, ({"z": z[0]} for z in pieces))

    @contextmanager
    def latents(self) -> Iterator[Read]:
        clip = LatentFolder(self.folder / "latents")[self.path.name]
        yield lambda start, stop: clip.read(None, start, stop)[None]

    def write_video(self, pieces: Iterator[np.ndarray]) -> None:
        write_frames(self.folder / "decoded.mp4", to_frames(pieces, *self.size), self.fps)


def streams_of(model: Streams, video: Video) -> dict[str, Stream]:
    """The streams of a video: encode writes the latents that decode reads; reconstruct goes from video to video."""

    def encoded(read: Read, ahead: bool) -> Pieces:
        with closing(model.encode_stream(read, video.num_frames, read_ahead=ahead)) as pieces:
            yield from (piece.z for piece in pieces)

    def decoded(read: Read, ahead: bool) -> Pieces:
        return model.decode_stream(read, video.length, video.num_frames, ahead)

    def reconstructed(read: Read, ahead: bool) -> Pieces:
        with closing(encoded(read, ahead)) as latents:
            yield from decoded(taken(latents), False)

    return {
        "encode": Stream(video.frames, encoded, video.write_latents),
        "decode": Stream(video.latents, decoded, video.write_video),
        "reconstruct": Stream(video.frames, reconstructed, video.write_video),
    }


def taken(pieces: Iterator[np.ndarray]) -> Read:
    """Read what comes in pieces along time, in order; what is before `start` is dropped."""
    held, begin = next(pieces), 0

    def read(start: int, stop: int) -> np.ndarray:
        nonlocal held, begin
        while begin + held.shape[2] < stop:
            held = np.concatenate([held, next(pieces)], axis=2)
        held, begin = held[:, :, start - begin :], start
        return held[:, :, : stop - start]

    return read


def measure(model: Streams, video: str, frames: int, parts: Sequence[str], runs: int) -> dict[str, Any]:
    """Seconds of a video's way through a model.

    Args:
        video: a file with at least `frames` frames.
        parts: encode | decode | reconstruct.
        runs: of reading, model, writing and the whole, in turn, after a whole one that compiles.

    Returns:
        "times": by part, "read", "model", "write" and "whole", each with the seconds of all runs; and the "size" of
        frames, height x width.
    """
    times = {}
    with TemporaryDirectory() as folder:
        of_video = Video(model, Path(video), frames, Path(folder))
        for part, stream in streams_of(model, of_video).items():
            if part in parts or (part == "encode" and "decode" in parts):  # decoding needs latents
                stream.prepare()
            if part in parts:
                times[part] = _times(stream, runs)
    return {"times": times, "size": "x".join(map(str, of_video.size))}


def _times(stream: Stream, runs: int) -> dict[str, list[float]]:
    calls = {
        "read": stream.reading_only,
        "model": stream.model_only,
        "write": stream.writing_only,
        "whole": stream.whole,  # last: what it writes stays
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return times
