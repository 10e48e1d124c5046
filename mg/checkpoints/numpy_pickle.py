"""Pickles of numpy arrays in nested dicts, as JAX users save weights, read without executing anything in them.

Based on the unpickler for PyTorch files, which knows plain containers and nothing callable. This one also knows numpy
arrays of numbers whose bytes are in the file itself, and no other kind of array.
"""

import io
import os
from pathlib import Path

import numpy as np

from mg.checkpoints.report import CheckpointError
from mg.checkpoints.state_dict import reading
from mg.checkpoints.tensors import Source, check_size, decode
from mg.checkpoints.torch_pickle import Unpickler

_TYPES = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u8": "U64",
    "u4": "U32",
    "u2": "U16",
    "u1": "U8",
    "b1": "BOOL",
}


def read_numpy_pickle(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a pickle, under their keys joined by "/": "VGG16_0/Conv_0/kernel".

    Returns:
        Floating arrays as float32, to which fp16 widens exactly; others in their own type.

    Raises:
        CheckpointError: anything goes wrong, or the file holds anything but dicts of numpy arrays; one line names the
            file.
    """
    path = Path(path)
    with reading(path), open(path, "rb") as file:
        source = Source(file)
        found = _ArrayUnpickler(io.BytesIO(source.read(0, source.size))).load()
        arrays: dict[str, np.ndarray] = {}
        _collect(found, "", arrays, set())
        if not arrays:
            raise CheckpointError("holds no numpy arrays in dicts")
        return arrays


def _collect(found: object, name: str, arrays: dict[str, np.ndarray], seen: set[int]) -> None:
    if isinstance(found, _Array):
        arrays[name] = found.decoded(name)
    elif type(found) is dict and id(found) not in seen:
        seen.add(id(found))  # a dict may contain itself, or another one a thousand times
        for key, value in found.items():
            _collect(value, f"{name}/{key}" if name else str(key), arrays, seen)
    else:
        raise CheckpointError(f"{name[:200] or 'what it holds'} is neither a numpy array nor a dict, or repeats one")


class _Type:
    """A numpy.dtype as the pickle builds it: first its code, then its byte order."""

    def __init__(self, code: object):
        self.code = code
        self.order: object = None


class _Array:
    """A numpy.ndarray as the pickle builds it: empty at first, then with its state."""

    def __init__(self) -> None:
        self.state: tuple = ()
        self.array: np.ndarray | None = None

    def decoded(self, name: str) -> np.ndarray:
        if self.array is None:  # decoded once, however many names it has
            self.array = self._decode(name[:200])
        return self.array

    def _decode(self, name: str) -> np.ndarray:
        if len(self.state) != 5:
            raise CheckpointError(f"{name}: is an array without contents")
        _, shape, kind, is_fortran, data = self.state
        if not isinstance(kind, _Type) or kind.code not in _TYPES or kind.order not in ("<", "|"):
            raise CheckpointError(f"{name}: is an array of something other than little-endian numbers")
        if type(shape) is not tuple or not all(type(size) is int for size in shape) or type(data) is not bytes:
            raise CheckpointError(f"{name}: is an array without a shape, or without its numbers")
        check_size(name, _TYPES[kind.code], shape, len(data))
        return decode(bytearray(data), _TYPES[kind.code]).reshape(shape, order="F" if is_fortran is True else "C")


class _ArrayUnpickler(Unpickler):
    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, {})

    def find_class(self, module: str, name: str):
        known = {
            "numpy.core.multiarray._reconstruct": self.array,
            "numpy._core.multiarray._reconstruct": self.array,  # numpy 2's name for it
            "numpy.dtype": self.dtype,
        }
        return known.get(f"{module}.{name}") or super().find_class(module, name)

    def build(self, target: object, state: object) -> None:
        if isinstance(target, _Array) and type(state) is tuple:
            target.state = state
        elif isinstance(target, _Type) and type(state) is tuple and len(state) > 1:
            target.order = state[1]

    def array(self, *_) -> _Array:
        return _Array()

    def dtype(self, code: object = None, *_) -> _Type:
        return _Type(code if type(code) is str else None)
