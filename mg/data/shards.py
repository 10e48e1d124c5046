"""A folder that several processes fill: safetensors shards, and an index with a line for every requested row.

    index.jsonl                         one line per row, including failed ones, in the order requested
    PREFIX-RRRRR-NNNNN.safetensors      shard N of rank R: the tensors of many short rows, or of a single long one

A shard is written completely or not at all, and only then are its lines added to the index, all together. So whatever
the index names is complete, whenever a run is killed and whatever other ranks are doing.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from mg.checkpoints import CheckpointError, atomic_write, naming, read_config
from mg.checkpoints.safetensors_file import Entry, PieceWriter, read_entries, read_stretch
from mg.checkpoints.state_dict import reading
from mg.checkpoints.tensors import Source
from mg.data.rows import locked, put_lines, read_lines
from mg.plain_text import one_line
from mg.settings import check_settings

INDEX_FILE = "index.jsonl"
OK, ERROR = "ok", "error"
HEADER_ROOM = 2**16  # bytes reserved for a shard's header: about 500 rows


class Row(Protocol):
    """A line of an index, a dataclass.

    Attributes:
        name: identifies the row.
        status: ok or error; with error, `error` says why in one line, and there are no tensors.
        shard: the file that holds its tensors.
        tensors: name of a stored tensor -> its key in the shard.
        shape: of each tensor; pieces are written along the second axis.
        again: with an error, whether the next run retries automatically because it was not the row's fault.
        key: prefix of its tensors' keys.
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
        """The line of the same row if it could not be made."""


R = TypeVar("R", bound=Row)
W = TypeVar("W", bound="ShardWriter")


def read_rows(folder: Path, kind: type[R]) -> dict[str, R]:
    """The lines of a folder's index by name, as rows of type `kind`; empty if there is no index.

    Raises:
        DataError: a malformed line.
    """
    rows = read_lines(Path(folder) / INDEX_FILE, kind)
    for row in rows.values():
        row.shape = tuple(row.shape)
    return rows


def record(folder: Path, rows: Iterable[R], order: Mapping[str, int], kind: type[R]) -> None:
    """Put rows into a folder's index atomically, replacing those with the same names.

    Args:
        order: name -> place in the index; names that are missing here come first.
    """
    put_lines(folder / INDEX_FILE, rows, kind, lambda row: order.get(row.name, -1))


def settle(folder: Path, file: str, settings: dict, part: str, kind: type[R]) -> None:
    """Make a folder and write its settings to `file` or, if it has rows already, check that they are the same.

    Args:
        settings: what all rows of the folder share.
        part: the key under which `checkpoint` and its hash are: the path may differ, but not the hash.

    Raises:
        ValueError, OSError: the rows there were made with other settings, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    with locked(folder / ".lock"):
        if read_rows(folder, kind):
            before = read_config(path).get(part) if path.exists() else None
            there = before.get("checkpoint") if isinstance(before, dict) else None
            check_settings(path, {**settings, part: {**settings[part], "checkpoint": there}}, "another output_path")
            return
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass
class EncodeReport:
    """What a rank did: the number of rows requested and in its share, of those that it encoded and those that were
    there already; and the names of all that failed, now or before, with the reason."""

    total: int
    mine: int
    encoded: int = 0
    there: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    def to_do(self, names: Iterable[str], before: Mapping[str, Row], retry_failed: bool) -> list[str]:
        """The names to encode. Those that the index has already count as there or failed; of the failed ones, those
        that were not at fault are encoded again, with `retry_failed` all of them."""
        todo = []
        for name in names:
            known = before.get(name)
            if known is None or (known.status != OK and (retry_failed or known.again)):
                todo.append(name)
            elif known.status == OK:
                self.there += 1
            else:
                self.failed.append((name, known.error))
        return todo

    def lose(self, rows: Iterable[Row]) -> None:
        """Rows that were encoded, but whose shard could not be finished."""
        for row in rows:
            self.encoded -= 1
            self.failed.append((row.name, row.error))


class ShardReader:
    """Tensors of a folder's shards; each shard's header is read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._entries: dict[str, dict[str, Entry]] = {}

    def read(self, shard: str, key: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """[start, stop) along the second axis of a tensor in a shard, as float32; `shape` is what the index says.

        Raises:
            CheckpointError: the shard is missing or damaged; one line names it and the key.
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
    """Fills the shards of one rank, and records each shard's rows once it is complete. A context manager.

    Leftovers of a killed run are removed: its own, and those of ranks that no longer exist and that equal this rank
    modulo `world_size`.

    Args:
        folder: where to write.
        kind: class of the rows.
        prefix: of the shards' names.
        order: row name -> place in the index.
        dtype: of the numbers, fp32 | fp16 | bf16.
        shard_size: maximum bytes per shard, unless a single row is larger.
        header_room: bytes to reserve for a shard's header if HEADER_ROOM is too little.

    Attributes:
        lost: rows whose tensors were in a shard that could not be finished, with the reason.
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
        self._rows: list[R] = []  # not yet in the index
        self.lost: list[R] = []
        self._stack = contextlib.ExitStack()
        self._open: contextlib.ExitStack | None = None  # of the current shard
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
        """Write the tensors of a row; all of them, or nothing if `pieces` raises any exception.

        Args:
            row: its line; the fields about the shard are filled in.
            length: of its tensors along their second axis.
            pieces: consecutive pieces along that axis, each name -> values.
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
                raise ValueError(f"the pieces have {at} along the second axis where {length} were announced")
        except BaseException:
            for key in reversed(row.tensors.values()):
                self._writer.drop(key)
            raise
        self._rows.append(row)

    def fail(self, row: R, error: str, again: bool = False) -> None:
        """Record that a row could not be made; with `again`, the next run retries it automatically."""
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
        """Finish the current shard, if there is one, and record its rows."""
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
        with contextlib.suppress(OSError):  # the rows are kept and recorded with those of the next shard
            self._record()

    def _lose(self, shard: str, error: str) -> None:
        """Mark the rows of a shard that could not be finished, so that the next run retries them."""
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
    """A shard that should not be kept."""
