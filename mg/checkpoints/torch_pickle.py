"""PyTorch's .pt/.pth/.bin, read without torch and without running anything that is in them.

Since PyTorch 1.6 such a file is a zip: `data.pkl`, a pickle of the objects in which tensors point into storages, and
one uncompressed record per storage, `data/<key>`. Before, it was a row of pickles with the storages behind them. The
unpickler here knows the handful of names that a state dict takes and refuses every other: unpickling is safe only as
long as nothing but these can be called. It knows the opcodes that such a file takes, too, and keys of dicts that hash
in no time: else a few hundred bytes can name a number of gigabytes, or a tuple that takes years to hash. Tensors are
views into their storages, so time and memory are bounded by the file.
"""

import functools
import io
import logging
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mg.checkpoints.report import CheckpointError
from mg.checkpoints.tensors import MAX_RANK, Source, StoredTensor, decode, item_size

_logger = logging.getLogger(__name__)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "ema", "ema_state_dict")
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "UntypedStorage": "U8",
    "BoolStorage": "BOOL",
}
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = frozenset(_DTYPES.values())
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
    "BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD"
).split()
_LARGEST = 2**63 - 1


class _Storage(NamedTuple):
    """A storage as the pickle names it: which, its numbers' type, how many."""

    key: str
    dtype: str
    count: int  # type: ignore[assignment]  # in place of tuple.count


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it: offset and strides count elements of the storage."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Record(NamedTuple):
    """The bytes of a storage: how many, and how to get them."""

    num_bytes: int
    read: Callable[[], bytes | bytearray]


def read(source: Source) -> dict[str, StoredTensor]:
    """The state dict in an open file of PyTorch's, or the one below its "state_dict", "model" and the like."""
    is_zip = source.read(0, min(2, source.size)) == b"PK"
    found, records = _open_zip(source) if is_zip else _open_legacy(source)
    numbers: dict[tuple[str, str], np.ndarray] = {}

    def view(tensor: _Tensor) -> np.ndarray:
        key = tensor.storage.key, tensor.dtype
        if key not in numbers:  # read once, however many tensors share the storage
            numbers[key] = decode(bytearray(records[tensor.storage.key].read()), tensor.dtype)
        flat = numbers[key]
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, flat.dtype)
        strides = [stride * flat.itemsize if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides)]
        return np.ndarray(tensor.shape, flat.dtype, flat, tensor.offset * flat.itemsize, strides)

    tensors = {}
    for name, tensor in _state_dict(found).items():
        _check_bounds(name, tensor, records)
        tensors[name] = StoredTensor(tensor.shape, functools.partial(view, tensor))
    return tensors


def _check_bounds(name: str, tensor: _Tensor, records: dict[str, _Record]) -> None:
    storage = tensor.storage
    num_bytes = storage.count * item_size(storage.dtype)
    if storage.key not in records or records[storage.key].num_bytes != num_bytes:
        raise CheckpointError(f"{name}: its storage is not there, or not of the {num_bytes} bytes announced")
    if len(tensor.shape) != len(tensor.strides) or not all(
        type(number) is int and 0 <= number <= _LARGEST for number in (tensor.offset, *tensor.shape, *tensor.strides)
    ):
        raise CheckpointError(f"{name}: has an impossible shape, stride or offset")
    room = num_bytes // item_size(tensor.dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    if 0 not in tensor.shape and (last >= room or math.prod(tensor.shape) > room):
        raise CheckpointError(f"{name}: shape {tensor.shape} reaches beyond the {room} numbers of its storage")


def _open_zip(source: Source) -> tuple[object, dict[str, _Record]]:
    archive = zipfile.ZipFile(source.file)
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError("is a zip file, but not one of PyTorch's: it has no data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise CheckpointError("holds compressed records, which PyTorch never writes")
    lengths = [info.file_size for info in infos.values()]
    if sum(lengths) > source.size or lengths != [info.compress_size for info in infos.values()]:
        raise CheckpointError("announces more data than it has")
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "byteorder" in infos:
        _check_byte_order(archive.read(folder + "byteorder") == b"little")
    records = {
        name.removeprefix(folder + "data/"): _Record(info.file_size, functools.partial(archive.read, info))
        for name, info in infos.items()
        if name.startswith(folder + "data/")
    }
    return _unpickle(io.BytesIO(archive.read(pickles[0]))), records


def _open_legacy(source: Source) -> tuple[object, dict[str, _Record]]:
    begins_well = source.read(0, min(1, source.size)) == pickle.PROTO
    stream = io.BytesIO(source.read(0, source.size) if begins_well else b"")
    if not begins_well or _unpickle(stream) != _LEGACY_MAGIC:
        raise CheckpointError("is not a file of PyTorch's, or is cut short")
    _unpickle(stream)  # protocol version
    _check_byte_order(_unpickle(stream)["little_endian"])
    seen: dict[str, _Storage] = {}
    found = _unpickle(stream, seen)
    keys = _unpickle(stream)
    records = {}
    position = stream.tell()
    for key in keys:
        if type(key) is not str or key not in seen:
            raise CheckpointError("its list of storages is not that of its tensors")
        num_bytes = int.from_bytes(source.read(position, 8), "little") * item_size(seen[key].dtype)
        records[key] = _Record(num_bytes, functools.partial(source.read, position + 8, num_bytes))
        position += 8 + num_bytes
    if position > source.size:
        raise CheckpointError(f"ends at byte {source.size} where byte {position} was announced: cut short?")
    return found, records


def _check_byte_order(little: bool) -> None:
    if not little:
        raise CheckpointError("was written on a big-endian machine; those files cannot be read")


def _state_dict(found: object, where: str = "") -> dict[str, _Tensor]:
    """The one dict of tensors in what a file holds: itself, or what stands under a usual name."""
    if not isinstance(found, dict):
        raise CheckpointError(f"holds no state dict{where}")
    inner = [name for name in _CONTAINERS if isinstance(found.get(name), dict) and found[name]]
    if len(inner) > 1:
        raise CheckpointError(f"holds several state dicts ({', '.join(inner)}); save the wanted one alone")
    if inner:
        return _state_dict(found[inner[0]], f" under {inner[0]!r}")
    tensors = {name: value for name, value in found.items() if isinstance(value, _Tensor)}
    dicts = {id(value): (name, value) for name, value in found.items() if isinstance(value, dict)}
    for name, value in dicts.values():  # each once, however many names it has
        if any(isinstance(below, _Tensor) for below in value.values()):
            raise CheckpointError(f"holds tensors{where} in a dict of their own ({str(name)[:64]}): which is wanted?")
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"holds no state dict{where}")
    if len(found) > len(tensors):
        _logger.info("%d entries beside the tensors were passed over", len(found) - len(tensors))
    return tensors


def _unpickle(stream: io.BytesIO, storages: dict[str, _Storage] | None = None):
    """The object of the pickle at the stream's position, which moves behind it; its storages go into `storages`."""
    return _Unpickler(stream, {} if storages is None else storages).load()


_Interpreter: Any = pickle._Unpickler  # whose inside type checkers do not know


class _Unpickler(_Interpreter):
    """Admits what a state dict is made of: tensors, storages, plain containers. Nothing else can be called.

    It is the standard library's interpreter in Python: the one in C lets no one see the opcodes and keys go by.
    """

    dispatch: dict = {getattr(pickle, name)[0]: _Interpreter.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}

    def __init__(self, stream: io.BytesIO, storages: dict[str, _Storage]):
        super().__init__(stream, encoding="utf-8")
        self.storages = storages
        self.copies_left = len(stream.getbuffer())

    def load(self):
        try:
            return super().load()
        except KeyError as error:
            raise CheckpointError("its pickle is damaged, or holds what no state dict does") from error

    def load_setitem(self) -> None:
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_keys(self.stack[::2])
        super().load_setitems()

    def load_build(self) -> None:
        """Attributes, such as a state dict's _metadata, are passed over."""
        self.stack.pop()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build

    def check_keys(self, keys: list) -> None:
        """Raise unless hashing them takes no longer than reading them did."""
        for key in keys:
            small = type(key) is int and abs(key) <= _LARGEST
            if not small and type(key) not in (str, bytes, float, bool, type(None)):
                raise CheckpointError(
                    f"its pickle has a {type(key).__name__} as a key of a dict; a state dict has names"
                )

    def check_copy(self, items) -> None:
        """Raise where the same items were copied again and again, so that more came out than the file holds."""
        self.copies_left -= len(items)
        if self.copies_left < 0:
            raise CheckpointError("its pickle copies what it holds until no memory is left")

    def find_class(self, module: str, name: str):
        admitted = {
            "collections.OrderedDict": self.ordered_dict,
            "torch.Size": self.plain_tuple,
            "torch.device": self.nothing,
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_of_type,
            "torch._utils._rebuild_parameter": self.parameter,
        }
        if f"{module}.{name}" in admitted:
            return admitted[f"{module}.{name}"]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise CheckpointError(
            f"its pickle asks for {module[:64]}.{name[:64]}, which is no part of a state dict; refused, nothing was run"
        )

    def persistent_load(self, pid) -> _Storage:
        kind, dtype, key, _, count = pid[:5]
        known = kind == "storage" and type(dtype) is str and dtype in _NAMES and type(key) is str
        if not known or type(count) is not int or not 0 <= count <= _LARGEST:
            raise CheckpointError("its pickle refers to something that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError("holds views of storages as PyTorch 0.1 wrote them; save it again with a newer one")
        storage = _Storage(key, dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"its pickle describes storage {key[:32]} in two ways")
        return storage

    def tensor(self, storage, offset, shape, strides, *_) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise CheckpointError("its pickle builds a tensor from something that is not a storage")
        if max(len(shape), len(strides)) > MAX_RANK:
            raise CheckpointError(f"its pickle builds a tensor of more than {MAX_RANK} dimensions")
        return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))

    def tensor_of_type(self, storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> _Tensor:
        if type(dtype) is not str or dtype not in _NAMES:
            raise CheckpointError("its pickle builds a tensor of no known type")
        return self.tensor(storage, offset, shape, strides)._replace(dtype=dtype)

    def parameter(self, tensor, *_) -> _Tensor:
        if not isinstance(tensor, _Tensor):
            raise CheckpointError("its pickle builds a parameter from something that is not a tensor")
        return tensor

    def ordered_dict(self, pairs=()) -> OrderedDict:
        self.check_copy(pairs)
        pairs = list(pairs)
        self.check_keys([key for key, _ in pairs])
        return OrderedDict(pairs)

    def plain_tuple(self, items=()) -> tuple:
        self.check_copy(items)
        return tuple(items)

    def nothing(self, *_) -> None:
        """In place of what weights do without."""
