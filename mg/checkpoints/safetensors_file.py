"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes, without gaps.

Read here rather than by the safetensors package because numpy, and hence that package's numpy API, has no bfloat16.
"""

import json
import math
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from mg.checkpoints.report import CheckpointError
from mg.checkpoints.tensors import Source, StoredTensor, check_size, decode, encode, item_size

_MAX_HEADER = 100_000_000  # the reference implementation's limit


class Entry(NamedTuple):
    """A tensor in a file: safetensors' name of its dtype, its shape, and the offset of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` is safetensors: a header length, then the header's opening brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER


def read(source: Source) -> dict[str, StoredTensor]:
    """The tensors of an open safetensors file."""
    return {name: StoredTensor(entry.shape, _reader(source, entry)) for name, entry in read_entries(source).items()}


def read_entries(source: Source) -> dict[str, Entry]:
    """Where the tensors of an open safetensors file are; every size is checked."""
    length = int.from_bytes(source.read(0, 8), "little")
    if length > _MAX_HEADER:
        raise CheckpointError(f"claims a header of {length} bytes: not a safetensors file")
    header = json.loads(source.read(8, length).decode("utf-8"), object_pairs_hook=_without_repetition)
    header.pop("__metadata__", None)
    start = 8 + length
    entries, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int for number in (*shape, begin, end)):
            raise CheckpointError(f"{name}: shape and data_offsets must be whole numbers")
        check_size(name, dtype, shape, end - begin)
        spans.append((begin, end))
        entries[name] = Entry(dtype, shape, start + begin)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"the header leaves a gap or an overlap at byte {position} of the data")
        position = end
    if start + position != source.size:
        raise CheckpointError(f"has {source.size} bytes where its header announces {start + position}: cut short?")
    return entries


def read_stretch(source: Source, entry: Entry, start: int, stop: int) -> np.ndarray:
    """Read only [start, stop) along the second axis of a tensor; floating types as float32."""
    rows, length, *rest = entry.shape
    bytes_each = math.prod(rest) * item_size(entry.dtype)
    parts = []
    for row in range(rows):
        offset = entry.offset + (row * length + start) * bytes_each
        parts.append(decode(source.read(offset, (stop - start) * bytes_each), entry.dtype))
    return np.stack(parts).reshape(rows, stop - start, *rest)


def write(
    file: BinaryIO, tensors: Mapping[str, np.ndarray], types: Mapping[str, str], metadata: Mapping[str, str] | None
) -> None:
    """Write tensors in the order of their names; `types` has the type of each floating tensor by name."""
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    position, arrays = 0, []
    for name in sorted(tensors):
        code, array = encode(name, tensors[name], types[name])
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": (position, position + array.nbytes)}
        position += array.nbytes
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # to align the data
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for array in arrays:
        file.write(array.tobytes())


class PieceWriter:
    """Writes a file tensor by tensor, and each tensor in pieces along its second axis, with memory for one piece.

        writer = PieceWriter(file, "fp32", room=2**16)
        writer.add("z", (16, 40, 32, 32))
        writer.write("z", 0, piece)         # (16, 8, 32, 32)
        ...
        writer.finish()

    The header, whose contents are only known at the end, is written last, into `room` bytes reserved at the beginning.

    Args:
        file: open for writing, empty; unbuffered, so that a full disk fails the piece that caused it.
        dtype: of the tensors, fp32 | fp16 | bf16.
    """

    def __init__(self, file: BinaryIO, dtype: str, room: int):
        self.file, self.dtype, self.room = file, dtype, room
        self.size = 0  # bytes of the tensors so far
        self._header: dict[str, dict] = {}
        self._missing: dict[str, int] = {}  # bytes of each tensor that are still to be written
        self._code, one = encode("", np.zeros(1, np.float32), dtype)
        self._item = one.itemsize
        _write_all(file, bytes(room))  # so that the header still fits if the disk is full later

    def __len__(self) -> int:
        return len(self._header)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """How many bytes a tensor of that shape takes."""
        return math.prod(shape) * self._item

    def has_room(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the header has room for more tensors of these names and shapes."""
        header, at = dict(self._header), self.size
        for name, shape in shapes.items():
            header[name] = self._entry(shape, at)
            at += self.num_bytes(shape)
        return len(self._text(header)) <= self.room - 8

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """Announce a tensor; it is placed after the previous ones."""
        if name in self._header:
            raise CheckpointError(f"{name}: was already added")
        self._header[name] = self._entry(shape, self.size)
        self._missing[name] = self.num_bytes(shape)
        self.size += self.num_bytes(shape)

    def write(self, name: str, at: int, piece: np.ndarray) -> None:
        """Write [at, at + n) along the second axis of a tensor, where n is the piece's length on that axis.

        Raises:
            CheckpointError: the piece does not fit there, or a number does not fit the dtype.
        """
        (rows, length, *rest), begin = self._header[name]["shape"], self._header[name]["data_offsets"][0]
        if piece.shape[0] != rows or list(piece.shape[2:]) != rest or at + piece.shape[1] > length:
            shape = (rows, length, *rest)
            raise CheckpointError(f"{name}: a piece of shape {piece.shape} at {at} does not fit into {shape}")
        _, coded = encode(name, piece, self.dtype)
        for row in range(rows):
            self.file.seek(self.room + begin + (row * length + at) * math.prod(rest) * self._item)
            _write_all(self.file, coded[row].tobytes())
        self._missing[name] -= coded.nbytes

    def drop(self, name: str) -> None:
        """Remove the last tensor."""
        self.size = self._header.pop(name)["data_offsets"][0]
        self._missing.pop(name)
        self.file.truncate(self.room + self.size)

    def finish(self) -> None:
        """Write the header.

        Raises:
            CheckpointError: a tensor lacks pieces, or the header is longer than the space reserved for it.
        """
        lacking = [name for name, count in self._missing.items() if count]
        if lacking:
            raise CheckpointError(f"{lacking[0]}: {self._missing[lacking[0]]} bytes of it were never written")
        text = self._text(self._header)
        if len(text) > self.room - 8:
            raise CheckpointError(f"a header of {len(text)} bytes does not fit into the {self.room} reserved for it")
        self.file.seek(0)
        _write_all(self.file, (self.room - 8).to_bytes(8, "little") + text.ljust(self.room - 8))

    def _entry(self, shape: tuple[int, ...], at: int) -> dict:
        return {"dtype": self._code, "shape": list(shape), "data_offsets": [at, at + self.num_bytes(shape)]}

    @staticmethod
    def _text(header: dict) -> bytes:
        return json.dumps(header, separators=(",", ":")).encode()


def _write_all(file: BinaryIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _reader(source: Source, entry: Entry):
    count = math.prod(entry.shape) * item_size(entry.dtype)
    return lambda: decode(source.read(entry.offset, count), entry.dtype).reshape(entry.shape)


def _without_repetition(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError("the header names a tensor twice")
    return result
