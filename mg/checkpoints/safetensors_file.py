"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes, without gaps.

Read here rather than by the safetensors package because numpy, and so that package's numpy side, has no bfloat16.
"""

import json
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from mg.checkpoints.report import CheckpointError
from mg.checkpoints.tensors import Source, StoredTensor, check_size, decode, encode

_MAX_HEADER = 100_000_000  # the reference implementation's bound


def read(source: Source) -> dict[str, StoredTensor]:
    """The tensors of an open safetensors file."""
    length = int.from_bytes(source.read(0, 8), "little")
    if length > _MAX_HEADER:
        raise CheckpointError(f"claims a header of {length} bytes: not a safetensors file")
    header = json.loads(source.read(8, length).decode("utf-8"), object_pairs_hook=_without_repetition)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int for number in (*shape, begin, end)):
            raise CheckpointError(f"{name}: shape and data_offsets must be whole numbers")
        check_size(name, dtype, shape, end - begin)
        spans.append((begin, end))
        tensors[name] = StoredTensor(shape, _reader(source, start + begin, end - begin, dtype, shape))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"the header leaves a gap or an overlap at byte {position} of the data")
        position = end
    if start + position != source.size:
        raise CheckpointError(f"has {source.size} bytes where its header announces {start + position}: cut short?")
    return tensors


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray], dtype: str, metadata: Mapping[str, str] | None) -> None:
    """Write tensors in the order of their names, floating ones as `dtype`."""
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    position, arrays = 0, []
    for name in sorted(tensors):
        code, array = encode(name, tensors[name], dtype)
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": (position, position + array.nbytes)}
        position += array.nbytes
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for array in arrays:
        file.write(array.tobytes())


def _reader(source: Source, offset: int, count: int, dtype: str, shape: tuple[int, ...]):
    return lambda: decode(source.read(offset, count), dtype).reshape(shape)


def _without_repetition(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError("the header names a tensor twice")
    return result
