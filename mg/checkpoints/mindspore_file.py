"""MindSpore's .ckpt: protocol buffers, one message per tensor, and an optional CRC-32 at the end.

    message Checkpoint { message Value { required string tag = 1; TensorProto tensor = 2; } repeated Value value = 1; }
    message TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

Read and written here rather than by MindSpore because its loader trusts `dims` without checking the number of bytes and
exposes foreign memory, and because its writer deletes the old file first. A tensor may be split into slices,
consecutive values with the same tag.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from mg.checkpoints.report import CheckpointError
from mg.checkpoints.tensors import Source, StoredTensor, check_size, decode, encode

SIGNATURE = b"\x0a"  # of the first Value

_TYPES = {
    "Float64": "F64",
    "Float32": "F32",
    "Float16": "F16",
    "BFloat16": "BF16",
    "Int64": "I64",
    "Int32": "I32",
    "Int16": "I16",
    "Int8": "I8",
    "UInt64": "U64",
    "UInt32": "U32",
    "UInt16": "U16",
    "UInt8": "U8",
    "Bool": "BOOL",
}
_NAMES = {code: name for name, code in _TYPES.items()}
_CRC_MARK = b"crc_num"
_CRC_BYTES = 10  # big-endian, after the mark
_CHUNK = 1 << 22

# Wire types of protocol buffers.
_VARINT = 0
_LENGTH_DELIMITED = 2


def read(source: Source) -> dict[str, StoredTensor]:
    """The tensors of an open .ckpt; a text becomes an array of str. The CRC is checked if the file has one."""
    end = _check_crc(source)
    if not end:
        raise CheckpointError("is empty")
    values: dict[str, tuple[str, list[int], list[tuple[int, int]]]] = {}
    previous = None
    for number, start, stop in _fields(source, 0, end):
        if number != 1 or stop is None:
            raise CheckpointError("is not a MindSpore checkpoint")
        tag, kind, dims, span = _read_value(source, start, stop)
        if tag in values and (tag != previous or values[tag][:2] != (kind, dims)):
            raise CheckpointError(f"holds {tag} twice")
        values.setdefault(tag, (kind, dims, []))[2].append(span)
        previous = tag
    return {tag: _stored(source, tag, *value) for tag, value in values.items()}


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray], types: Mapping[str, str]) -> None:
    """Write tensors in the given order, followed by their CRC; `types` has the type of each floating tensor by name."""
    crc = 0
    for name, array in tensors.items():
        code, array = encode(name, array, types[name])
        content = array.tobytes()
        head = b"".join(_varint(1 << 3 | _VARINT) + _varint(size) for size in array.shape)
        head += _field(2, _NAMES[code].encode()) + _varint(3 << 3 | _LENGTH_DELIMITED) + _varint(len(content))
        tag = _field(1, name.encode())
        tag += _varint(2 << 3 | _LENGTH_DELIMITED) + _varint(len(head) + len(content))
        start = _varint(1 << 3 | _LENGTH_DELIMITED) + _varint(len(tag) + len(head) + len(content))
        for part in (start, tag, head, content):
            file.write(part)
            crc = zlib.crc32(part, crc)
    file.write(_CRC_MARK + crc.to_bytes(_CRC_BYTES, "big"))


def _check_crc(source: Source) -> int:
    """Check the CRC, if there is one, and return where the messages end."""
    end = source.size - len(_CRC_MARK) - _CRC_BYTES
    if end < 0 or source.read(end, len(_CRC_MARK)) != _CRC_MARK:
        return source.size
    crc = 0
    for start in range(0, end, _CHUNK):
        crc = zlib.crc32(source.read(start, min(_CHUNK, end - start)), crc)
    if crc != int.from_bytes(source.read(end + len(_CRC_MARK), _CRC_BYTES), "big"):
        raise CheckpointError("does not match its CRC: damaged")
    return end


def _read_value(source: Source, start: int, end: int) -> tuple[str, str, list[int], tuple[int, int]]:
    """One Value: tag, type, dims, and the byte range of the content."""
    tag, tensor = None, None
    for number, begin, stop in _fields(source, start, end):
        if number == 1 and stop is not None:
            tag = source.read(begin, stop - begin).decode("utf-8")
        elif number == 2 and stop is not None:
            tensor = (begin, stop)
        else:
            raise CheckpointError("holds a value that is not a tensor")
    if tag is None or tensor is None:
        raise CheckpointError("holds a value without a name or a tensor")
    dims, kind, content = [], None, None
    for number, begin, stop in _fields(source, *tensor):
        if number == 1 and stop is None:
            dims.append(begin)
        elif number == 2 and stop is not None:
            kind = source.read(begin, stop - begin).decode("utf-8")
        elif number == 3 and stop is not None:
            content = (begin, stop)
        else:
            raise CheckpointError(f"{tag}: is not a tensor of a MindSpore checkpoint")
    if kind is None or content is None:
        raise CheckpointError(f"{tag}: has no type or no content")
    return tag, kind, dims, content


def _stored(source: Source, tag: str, kind: str, dims: list[int], spans: list[tuple[int, int]]) -> StoredTensor:
    num_bytes = sum(stop - start for start, stop in spans)

    def content() -> bytes:
        return b"".join(source.read(start, stop - start) for start, stop in spans)

    if kind == "str":
        return StoredTensor((), lambda: np.array(content().decode("utf-32-le")))
    if kind not in _TYPES:
        raise CheckpointError(f"{tag}: numbers of type {kind[:32]} cannot be read")
    shape = () if dims == [0] and num_bytes else tuple(dims)  # older files write a scalar as [0]
    check_size(tag, _TYPES[kind], shape, num_bytes)
    return StoredTensor(shape, lambda: decode(bytearray(content()), _TYPES[kind]).reshape(shape))


def _fields(source: Source, position: int, end: int) -> Iterator[tuple[int, int, int | None]]:
    """The fields of a message: (number, start, stop) for bytes, or (number, value, None) for an integer."""
    while position < end:
        key, position = _read_varint(source, position, end)
        value, position = _read_varint(source, position, end)
        if key & 7 == _VARINT:
            yield key >> 3, value, None
        elif key & 7 == _LENGTH_DELIMITED:
            if position + value > end:
                raise CheckpointError(f"ends where {position + value - end} more bytes were announced: cut short?")
            yield key >> 3, position, position + value
            position += value
        else:
            raise CheckpointError("is not a MindSpore checkpoint, or damaged")


def _read_varint(source: Source, position: int, end: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(source.read(position, min(10, end - position))):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise CheckpointError("is not a MindSpore checkpoint, or cut short")


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content
