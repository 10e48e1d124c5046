"""Number types in weight files, under safetensors' names, and access to the file that contains them."""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mg.checkpoints.report import CheckpointError

_NUMPY_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # numpy has no bfloat16: upper half of a float32, read and written as bits
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
    "F8_E4M3": "u1",  # read only: they occur next to a VAE in files of whole pipelines
    "F8_E5M2": "u1",
}
_AS_BITS = ("BF16", "BOOL", "F8_E4M3", "F8_E5M2")
_NAMES = {np.dtype(code): name for name, code in _NUMPY_TYPES.items() if name not in _AS_BITS}
MAX_RANK = 32  # numpy's limit
_FLOATS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


class StoredTensor(NamedTuple):
    """A tensor still in its file: its shape, and a function that reads it, floating types as float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Source:
    """An open file that never reads past its end, nor allocates memory for bytes that don't exist."""

    def __init__(self, file: io.BufferedIOBase):
        self.file = file
        self.size = file.seek(0, 2)

    def read(self, offset: int, count: int) -> bytearray:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CheckpointError(f"ends at byte {self.size} where byte {offset + count} was announced: cut short?")
        self.file.seek(offset)
        data = bytearray(count)
        if self.file.readinto(data) != count:
            raise CheckpointError("became shorter while it was read")
        return data


def item_size(dtype: str) -> int:
    """Bytes per element."""
    if dtype not in _NUMPY_TYPES:
        raise CheckpointError(f"holds numbers of type {dtype[:32]}; {', '.join(_NUMPY_TYPES)} can be read")
    return np.dtype(_NUMPY_TYPES[dtype]).itemsize


def check_size(name: str, dtype: str, shape: tuple[int, ...], num_bytes: int) -> None:
    """Raise unless a tensor of that type and shape takes exactly `num_bytes`."""
    if len(shape) > MAX_RANK:  # the product of millions of sizes would take forever
        raise CheckpointError(f"{name}: has {len(shape)} dimensions; at most {MAX_RANK} can be read")
    wanted = math.prod(shape) * item_size(dtype)
    if min(shape, default=0) < 0 or wanted != num_bytes:
        raise CheckpointError(f"{name}: shape {shape} of {dtype} takes {wanted} bytes, but it has {num_bytes}")


def decode(data: bytes | bytearray, dtype: str) -> np.ndarray:
    """Bytes to a flat array: floating types widen exactly to float32 (F64 is narrowed), others keep their type."""
    item_size(dtype)
    array = np.frombuffer(data, _NUMPY_TYPES[dtype])
    if dtype == "BF16":
        return (array.astype("<u4") << 16).view("<f4")
    if dtype == "BOOL":
        return array != 0
    if dtype == "F8_E5M2":  # the upper half of an fp16
        return (array.astype("<u2") << 8).view("<f2").astype("<f4")
    if dtype == "F8_E4M3":
        return _E4M3[array]
    with np.errstate(over="ignore"):  # an F64 too large for float32 becomes infinite, which models reject
        return array.astype("<f4", copy=False) if array.dtype.kind == "f" else array


def _e4m3() -> np.ndarray:
    """The value of each byte: sign, 4 exponent bits, 3 mantissa bits; no infinity, and one NaN of each sign."""
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    value = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    value[127] = np.nan
    return np.concatenate([value, -value]).astype("<f4")


_E4M3 = _e4m3()


def encode(name: str, array: np.ndarray, float_type: str) -> tuple[str, np.ndarray]:
    """An array to the name of its type and a contiguous array with the file's layout; floats become fp32 | fp16 | bf16.

    Raises:
        CheckpointError: a finite number is too large for `float_type`, or the array doesn't hold numbers.
    """
    if float_type not in _FLOATS:
        raise CheckpointError(f"dtype {float_type!r} is not known; it must be one of {', '.join(_FLOATS)}")
    array = np.asarray(array)
    if array.dtype == bool:
        return "BOOL", array.astype("u1", order="C")
    if array.dtype.kind != "f":
        if array.dtype.newbyteorder("<") not in _NAMES:
            raise CheckpointError(f"{name}: arrays of {array.dtype} cannot be written")
        return _NAMES[array.dtype.newbyteorder("<")], array.astype(array.dtype.newbyteorder("<"), order="C")
    with np.errstate(over="ignore"):  # reported below, with the name
        coded = array.astype("<f2" if float_type == "fp16" else "<f4", order="C")
    if float_type == "bf16":
        coded = _to_bf16(coded)
    infinite = (coded & 0x7FFF) == 0x7F80 if float_type == "bf16" else np.isinf(coded)
    if np.any(infinite & np.isfinite(array)):
        raise CheckpointError(f"{name}: {np.abs(array[np.isfinite(array)]).max():.4g} is too large for {float_type}")
    return _FLOATS[float_type], coded


def _to_bf16(single: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounded to nearest, ties to even."""
    bits = single.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype("<u2")
