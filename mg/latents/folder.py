"""A folder of latents:

    latents.json                           what all of them share: model, checkpoint and its hash, scaling, clips, tiles
    index.jsonl                            one line per video, those that could not be encoded too, in the CSV's order
    latents-RRRRR-NNNNN.safetensors        shard N of rank R: the latents of many short videos, or of one long one

In a shard the latents of a video stand under its name, followed by `.z`, or by `.mean` and `.logvar`, as (z, t, h, w).
A shard is there whole or not at all, and its lines come into the index together, once it is. So what the index names is
complete, whenever a run was killed, and whatever other ranks are doing.
"""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from mg.checkpoints import CheckpointError, atomic_write, naming
from mg.checkpoints.safetensors_file import Entry, PieceWriter, read_entries, read_stretch
from mg.checkpoints.state_dict import read_config, reading
from mg.checkpoints.tensors import Source
from mg.data.errors import DataError
from mg.plain_text import json_line, one_line, split_lines, write_text

SETTINGS_FILE, INDEX_FILE = "latents.json", "index.jsonl"
OK, ERROR = "ok", "error"
HEADER_ROOM = 2**16  # bytes of a shard that are kept for its header: some 500 videos


@dataclass
class Row:
    """One video of a folder: a line of its index.

    Attributes:
        name: as the CSV has it.
        caption: "" if there is none.
        status: ok, or error: then `error` says why, in one line, and the rest is empty.
        shard: the file that holds its latents.
        tensors: what is stored -> its key in the shard: `z`, or `mean` and `logvar`.
        shape: of each, (z, t, h, w).
        frames, height, width, fps: of the clip that was encoded.
        still: it is an image.
        tiles: whether frames were encoded whole or in which tiles.
        again: with an error, that the next run tries it by itself: it was not the video's fault.
    """

    name: str
    caption: str = ""
    status: str = OK
    error: str = ""
    shard: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    still: bool = False
    tiles: str = ""
    again: bool = False


def read_rows(folder: Path) -> dict[str, Row]:
    """The lines of a folder's index by name; none where there is no index.

    Raises:
        DataError: a line that is none.
    """
    path, names = Path(folder) / INDEX_FILE, [entry.name for entry in fields(Row)]
    rows = {}
    try:
        lines = split_lines(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            raise DataError(f"{path}, line {number}: must be a JSON object with keys of {', '.join(names)}") from None
        row.shape = tuple(row.shape)
        rows[row.name] = row
    return rows


def record(folder: Path, rows: Iterable[Row], order: Mapping[str, int]) -> None:
    """Put rows into a folder's index, all of them at once, in place of those of their names.

    Args:
        order: the place of a name in the index; what has none comes first.
    """
    with locked(folder / ".lock"):
        merged = read_rows(folder) | {row.name: row for row in rows}
        ordered = sorted(merged.values(), key=lambda row: order.get(row.name, -1))
        with atomic_write(folder / INDEX_FILE) as path:
            write_text(path, "".join(json_line(asdict(row)) for row in ordered))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock between the processes of a machine, or of all that share the file system.

    Raises:
        DataError: another one holds it, and this one is not to wait.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(
                f"{path.parent}: another run is writing there, as the same rank; wait for its end"
            ) from None
        yield


# Reading.


def open_latents(folder: str | Path) -> "LatentFolder":
    """The latents of a folder that `mg-encode-latents` wrote, by the names of the videos.

    Raises:
        DataError, CheckpointError: no such folder, or one without an index that can be read.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise DataError(f"{folder}: holds no latents, there is no {SETTINGS_FILE}")
    return LatentFolder(folder)


class LatentFolder(Mapping):
    """Names of videos -> `Latents`, in the order of the CSV, read when they are asked for.

    Attributes:
        settings: what latents.json holds.
        failed: names of the videos that could not be encoded -> why.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = read_config(folder / SETTINGS_FILE)
        rows = read_rows(folder)
        self.failed = {row.name: row.error for row in rows.values() if row.status != OK}
        self._rows = {row.name: row for row in rows.values() if row.status == OK}
        self._entries: dict[str, dict[str, Entry]] = {}

    def __getitem__(self, name: str) -> "Latents":
        if name not in self._rows:
            reason = self.failed.get(name, "there is no video of this name")
            raise DataError(f"{self.folder}: no latents of {name}: {reason}")
        return Latents(self, self._rows[name])

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, shard: str, key: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Latent frames [start, stop) of a tensor of a shard; see `Latents.read`."""
        path = self.folder / shard
        with reading(path):
            if Path(shard).name != shard:
                raise CheckpointError("must be a file within the folder")
            with open(path, "rb") as file:
                source = Source(file)
                if shard not in self._entries:
                    self._entries[shard] = read_entries(source)
                entry = self._entries[shard].get(key)
                if entry is None or entry.shape != shape:
                    found = "is not there" if entry is None else f"has shape {entry.shape}"
                    raise CheckpointError(f"{key} {found}; the index says {shape}")
                return read_stretch(source, entry, start, stop)


class Latents:
    """The latents of one video, yet to be read; with the attributes of its `Row`: name, caption, shape, frames ..."""

    def __init__(self, folder: LatentFolder, row: Row):
        self._folder, self._row = folder, row

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._row, name)

    def read(self, tensor: str | None = None, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Latent frames [start, stop), by default all -> (z, t, h, w), float32.

        Args:
            tensor: z, or mean or logvar, whichever the folder holds; by default z or mean.

        Raises:
            DataError: a tensor that the folder does not hold, or frames that the video does not have.
            CheckpointError: a shard that is missing or damaged, in one line that names it and the key.
        """
        row = self._row
        tensor = tensor or next(iter(row.tensors))
        if tensor not in row.tensors:
            raise DataError(f"{row.name}: {tensor} was not stored; {', '.join(row.tensors)} can be read")
        stop = row.shape[1] if stop is None else stop
        if not 0 <= start <= stop <= row.shape[1]:
            raise DataError(f"{row.name}: has {row.shape[1]} latent frames; {start} to {stop} were asked for")
        return self._folder.read(row.shard, row.tensors[tensor], row.shape, start, stop)


# Writing.


class ShardWriter:
    """Fills the shards of one rank, and records the rows of each once it is whole. A context manager.

    What a killed run left of this rank is removed; a rank that there is no more has its leftovers removed by the one
    whose number it has modulo `world_size`.

    Args:
        folder: where to write.
        order: names of the videos -> their places in the index.
        dtype: of the numbers, fp32 | fp16 | bf16.
        shard_size: bytes that a shard holds at most, unless a single video has more.

    Attributes:
        lost: rows whose latents were stored in a shard that could not be finished, with the reason.
    """

    def __init__(self, folder: Path, order: Mapping[str, int], dtype: str, shard_size: int, rank: int, world_size: int):
        self._folder, self._order, self._dtype, self._shard_size = folder, order, dtype, shard_size
        self._rank, self._world_size = rank, world_size
        self._rows: list[Row] = []  # that the index lacks
        self.lost: list[Row] = []
        self._stack = contextlib.ExitStack()
        self._open: contextlib.ExitStack | None = None  # of the shard that is being filled
        self._writer: PieceWriter | None = None
        self._shard = ""

    def __enter__(self) -> "ShardWriter":
        self._stack.enter_context(locked(self._folder / f".lock-{self._rank:05d}", wait=False))
        self._remove_leftovers()
        numbers = [
            int(path.stem.rsplit("-")[-1]) for path in self._folder.glob(f"latents-{self._rank:05d}-*.safetensors")
        ]
        self._number = max(numbers, default=-1) + 1
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._finish_shard()
                self._record()
            elif self._open is not None:
                self._open.__exit__(kind, error, traceback)
        finally:
            self._stack.close()

    def store(self, row: Row, length: int, pieces: Iterator[dict[str, np.ndarray]]) -> None:
        """Write the latents of a video; all of them, or nothing if `pieces` raises, whatever it raises.

        Args:
            row: its line; what concerns the shard is filled in.
            length: t, latent frames of the video.
            pieces: stretches along time, each what is stored -> (z, t', h, w).
        """
        at = 0
        try:
            for piece in pieces:
                if not row.tensors:
                    self._begin(row, length, piece)
                with naming(self._folder / self._shard):
                    for name, values in piece.items():
                        self._writer.write(row.tensors[name], at, values)
                at += next(iter(piece.values())).shape[1]
            if at != length:
                raise ValueError(f"{at} latent frames came where {length} were announced")
        except BaseException:
            for key in reversed(row.tensors.values()):
                self._writer.drop(key)
            raise
        self._rows.append(row)

    def fail(self, row: Row, error: str, again: bool = False) -> None:
        """Note that a video could not be encoded; `again`: the next run tries it by itself."""
        self._rows.append(Row(row.name, row.caption, ERROR, error, again=again))

    def _begin(self, row: Row, length: int, piece: dict[str, np.ndarray]) -> None:
        z, _, h, w = next(iter(piece.values())).shape
        row.shape = (z, length, h, w)
        keys = {name: f"{row.name}.{name}" for name in piece}
        shapes = dict.fromkeys(keys.values(), row.shape)
        if self._writer is not None and len(self._writer):
            size = self._writer.size + len(keys) * self._writer.num_bytes(row.shape)
            if size > self._shard_size or not self._writer.has_room(shapes):
                self._finish_shard()
        if self._writer is None:
            self._shard = f"latents-{self._rank:05d}-{self._number:05d}.safetensors"
            self._open = contextlib.ExitStack()
            temporary = self._open.enter_context(atomic_write(self._folder / self._shard))
            file = self._open.enter_context(open(temporary, "wb", buffering=0))  # noqa: SIM115
            self._writer = PieceWriter(file, self._dtype, HEADER_ROOM)
            self._number += 1
        for key in keys.values():
            self._writer.add(key, row.shape)
        row.shard, row.tensors = self._shard, keys

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        opened, writer, self._open, self._writer = self._open, self._writer, None, None
        try:
            with contextlib.suppress(_Empty), opened:
                if not len(writer):  # its only video failed
                    raise _Empty
                writer.finish()
        except OSError as error:
            self._lose(self._shard, one_line(error))
        with contextlib.suppress(OSError):  # the rows stay, and come with those of the next shard
            self._record()

    def _lose(self, shard: str, error: str) -> None:
        """What is in a shard that could not be finished is tried again by the next run."""
        rows, self._rows = self._rows, []
        for row in rows:
            if row.shard == shard:
                row = Row(row.name, row.caption, ERROR, error, again=True)
                self.lost.append(row)
            self._rows.append(row)

    def _record(self) -> None:
        if self._rows:
            record(self._folder, self._rows, self._order)
            self._rows = []

    def _remove_leftovers(self) -> None:
        named = {row.shard for row in read_rows(self._folder).values()}
        for path in self._folder.iterdir():
            found = re.fullmatch(r"\.?latents-(\d+)-\d+(\.[0-9a-f]+)?\.safetensors", path.name)
            rank = int(found[1]) if found else None
            mine = rank == self._rank or (found and rank >= self._world_size and rank % self._world_size == self._rank)
            if mine and path.name not in named:
                path.unlink()


class _Empty(Exception):
    """A shard that is not to be kept."""
