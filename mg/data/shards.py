"""A folder that several processes fill: safetensors shards, and a line for every row of what was asked for.

    index.jsonl                         one line per row, those that could not be made too, in the order asked for
    PREFIX-RRRRR-NNNNN.safetensors      shard N of rank R: the tensors of many short rows, or of one long one

A shard is there whole or not at all, and its lines come into the index together, once it is. So what the index names is
complete, whenever a run was killed, and whatever other ranks are doing.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from mg.checkpoints import CheckpointError, atomic_write, naming
from mg.checkpoints.safetensors_file import Entry, PieceWriter, read_entries, read_stretch
from mg.checkpoints.state_dict import reading
from mg.checkpoints.tensors import Source
from mg.data.rows import locked, put_lines, read_lines
from mg.plain_text import one_line

INDEX_FILE = "index.jsonl"
OK, ERROR = "ok", "error"
HEADER_ROOM = 2**16  # bytes of a shard that are kept for its header: some 500 rows


class Row(Protocol):
    """A line of an index, a dataclass.

    Attributes:
        name: what tells it from others.
        status: ok, or error: then `error` says why, in one line, and it has no tensors.
        shard: the file that holds its tensors.
        tensors: what is stored -> its key in the shard.
        shape: of each; the second axis is the one that pieces come along.
        again: with an error, that the next run tries it by itself: it was not the row's fault.
        key: what its tensors' keys begin with.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: str
    status: str
    error: str
    shard: str
    tensors: dict[str, str]
    shape: tuple[int, ...]
    again: bool

    @property
    def key(self) -> str: ...

    def failed(self: "R", error: str, again: bool) -> "R":
        """The line of the same row where it could not be made."""


R = TypeVar("R", bound=Row)
W = TypeVar("W", bound="ShardWriter")


def read_rows(folder: Path, kind: type[R]) -> dict[str, R]:
    """The lines of a folder's index by name, as rows of a kind; none where there is no index.

    Raises:
        DataError: a line that is none.
    """
    rows = read_lines(Path(folder) / INDEX_FILE, kind)
    for row in rows.values():
        row.shape = tuple(row.shape)
    return rows


def record(folder: Path, rows: Iterable[R], order: Mapping[str, int], kind: type[R]) -> None:
    """Put rows of a kind into a folder's index, all of them at once, in place of those of their names.

    Args:
        order: the place of a name in the index; what has none comes first.
    """
    put_lines(folder / INDEX_FILE, rows, kind, lambda row: order.get(row.name, -1))


class ShardReader:
    """Tensors of a folder's shards; of each shard the header is read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._entries: dict[str, dict[str, Entry]] = {}

    def read(self, shard: str, key: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """[start, stop) along the second axis of a tensor of a shard, whose shape the index knows, in float32.

        Raises:
            CheckpointError: a shard that is missing or damaged, in one line that names it and the key.
        """
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


class ShardWriter(Generic[R]):
    """Fills the shards of one rank, and records the rows of each once it is whole. A context manager.

    What a killed run left of this rank is removed; a rank that there is no more has its leftovers removed by the one
    whose number it has modulo `world_size`.

    Args:
        folder: where to write.
        kind: of the rows.
        prefix: what names of shards begin with.
        order: names of the rows -> their places in the index.
        dtype: of the numbers, fp32 | fp16 | bf16.
        shard_size: bytes that a shard holds at most, unless a single row has more.
        header_room: bytes of a shard that are kept for its header, where HEADER_ROOM is too little.

    Attributes:
        lost: rows whose tensors were stored in a shard that could not be finished, with the reason.
    """

    def __init__(
        self,
        folder: Path,
        kind: type[R],
        prefix: str,
        order: Mapping[str, int],
        dtype: str,
        shard_size: int,
        rank: int,
        world_size: int,
        header_room: int = 0,
    ):
        self._header_room = header_room
        self._kind, self._prefix = kind, prefix
        self._folder, self._order, self._dtype, self._shard_size = folder, order, dtype, shard_size
        self._rank, self._world_size = rank, world_size
        self._rows: list[R] = []  # that the index lacks
        self.lost: list[R] = []
        self._stack = contextlib.ExitStack()
        self._open: contextlib.ExitStack | None = None  # of the shard that is being filled
        self._writer: PieceWriter | None = None
        self._shard = ""

    def __enter__(self: W) -> W:
        self._stack.enter_context(locked(self._folder / f".lock-{self._rank:05d}", wait=False))
        self._remove_leftovers()
        mine = self._folder.glob(f"{self._prefix}-{self._rank:05d}-*.safetensors")
        numbers = [int(path.stem.rsplit("-")[-1]) for path in mine]
        self._number = max(numbers, default=-1) + 1
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self.finish_shard()
                self._record()
            elif self._open is not None:
                self._open.__exit__(kind, error, traceback)
        finally:
            self._stack.close()

    def store(self, row: R, length: int, pieces: Iterable[dict[str, np.ndarray]]) -> None:
        """Write the tensors of a row; all of them, or nothing if `pieces` raises, whatever it raises.

        Args:
            row: its line; what concerns the shard is filled in.
            length: of its tensors, along their second axis.
            pieces: stretches along that axis, each what is stored -> its values.
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
                raise ValueError(f"{at} came along the second axis where {length} were announced")
        except BaseException:
            for key in reversed(row.tensors.values()):
                self._writer.drop(key)
            raise
        self._rows.append(row)

    def fail(self, row: R, error: str, again: bool = False) -> None:
        """Note that a row could not be made; `again`: the next run tries it by itself."""
        self._rows.append(row.failed(error, again))

    def _begin(self, row: R, length: int, piece: dict[str, np.ndarray]) -> None:
        first, _, *rest = next(iter(piece.values())).shape
        row.shape = (first, length, *rest)
        keys = {name: f"{row.key}.{name}" for name in piece}
        shapes = dict.fromkeys(keys.values(), row.shape)
        if self._writer is not None and len(self._writer):
            size = self._writer.size + len(keys) * self._writer.num_bytes(row.shape)
            if size > self._shard_size or not self._writer.has_room(shapes):
                self.finish_shard()
        if self._writer is None:
            self._shard = f"{self._prefix}-{self._rank:05d}-{self._number:05d}.safetensors"
            self._open = contextlib.ExitStack()
            temporary = self._open.enter_context(atomic_write(self._folder / self._shard))
            file = self._open.enter_context(open(temporary, "wb", buffering=0))  # noqa: SIM115
            self._writer = PieceWriter(file, self._dtype, max(HEADER_ROOM, self._header_room))
            self._number += 1
        for key in keys.values():
            self._writer.add(key, row.shape)
        row.shard, row.tensors = self._shard, keys

    def finish_shard(self) -> None:
        """Finish the shard that is being filled, if there is one, and record its rows."""
        if self._writer is None:
            return
        opened, writer, self._open, self._writer = self._open, self._writer, None, None
        try:
            with contextlib.suppress(_Empty), opened:
                if not len(writer):  # its only row failed
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
                row = row.failed(error, again=True)
                self.lost.append(row)
            self._rows.append(row)

    def _record(self) -> None:
        if self._rows:
            record(self._folder, self._rows, self._order, self._kind)
            self._rows = []

    def _remove_leftovers(self) -> None:
        named = {row.shard for row in read_rows(self._folder, self._kind).values()}
        for path in self._folder.iterdir():
            found = re.fullmatch(rf"\.?{self._prefix}-(\d+)-\d+(\.[0-9a-f]+)?\.safetensors", path.name)
            rank = int(found[1]) if found else None
            mine = rank == self._rank or (found and rank >= self._world_size and rank % self._world_size == self._rank)
            if mine and path.name not in named:
                path.unlink()


class _Empty(Exception):
    """A shard that is not to be kept."""
