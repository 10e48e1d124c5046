"""PyTorch files, read without torch and without executing anything in them.

Since PyTorch 1.6 such a file is a zip: `data.pkl`, a pickle of the objects in which tensors point into storages, and
one uncompressed record per storage, `data/<key>`. Before that, it was a series of pickles followed by the storages. The
unpickler here knows the few names that tensors need. Anything else that a training run saves along with them (numpy
scalars, settings, optimizer states, objects of any class) is skipped: nothing is imported or called for it, and an
inert `_Foreign` replaces it. Unpickling is safe only as long as nothing but the functions here can be called. The
unpickler also accepts only the opcodes that such a file needs, and only dict keys that hash quickly: otherwise a few
hundred bytes can encode a number of several gigabytes, or a tuple that takes years to hash. Tensors are views into
their storages, so time and memory are bounded by the file.
"""

import functools
import io
import logging
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from mg.checkpoints.report import CheckpointError
from mg.checkpoints.tensors import MAX_RANK, Source, StoredTensor, decode, item_size

_logger = logging.getLogger(__name__)

SIGNATURES = (b"PK", pickle.PROTO)  # how a file begins: a zip, a pickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_USUAL = frozenset(  # the keys that state dicts are stored under
    "state_dict model_state_dict model_state model module net network generator gen netG vae autoencoder ae weights "
    "params ema ema_state_dict model_ema ema_model params_ema".split()
)
_LEFTOVER = re.compile(
    r"(^|_)opt(_|$)|optim|sched|disc|critic|netd|loss|lpips|percept|scaler|rng|random", re.IGNORECASE
)
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
_OTHER_STORAGES = {  # bytes per number, needed to skip them
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.QInt32Storage": 4,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
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
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
    "BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID"
).split()  # and those that the unpickler implements itself
_LARGEST = 2**63 - 1
_ATTACKS = re.compile(  # no honest file asks for these; they would be as inert as anything else
    r"(os|posix|nt|subprocess|commands|shutil|socket|pty|runpy|ctypes)\..*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__)|torch\.load"
)


class _Storage(NamedTuple):
    """A storage as the pickle names it: its key, dtype and number of elements."""

    key: str
    dtype: str
    count: int  # type: ignore[assignment]  # replaces tuple.count


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it: offset and strides count elements of the storage."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Foreign(dict):
    """Replaces a class or function that is not known here, and anything it would create. Keeps only the items that are
    set in it, since it may be a kind of dict."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def ignore(self, *_) -> None:
        """Replaces methods of lists and sets."""

    append = extend = ignore


class _Record(NamedTuple):
    """The bytes of a storage: their number, and a function that reads them."""

    num_bytes: int
    read: Callable[[], bytes | bytearray]


def read(source: Source, key: str | None = None) -> dict[str, StoredTensor]:
    """The state dict in an open PyTorch file: what is under `key`, else the whole file, or the one under
    "state_dict", "model" or a similar key."""
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
    for name, tensor in _state_dict(found if key is None else _under(found, key)).items():
        _check_bounds(name, tensor, records)
        tensors[name] = StoredTensor(tensor.shape, functools.partial(view, tensor))
    return tensors


def _check_bounds(name: str, tensor: _Tensor, records: dict[str, _Record]) -> None:
    storage = tensor.storage
    num_bytes = storage.count * item_size(storage.dtype)
    if storage.key not in records or records[storage.key].num_bytes != num_bytes:
        raise CheckpointError(f"{name}: its storage is missing, or does not have the {num_bytes} bytes announced")
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
    if pickles[0].replace("data.pkl", "constants.pkl") in infos:
        raise CheckpointError("holds a TorchScript model; load it with torch.jit.load and save its state_dict()")
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
        raise CheckpointError("is a pickle, but not one that torch.save wrote, or is cut short")
    _unpickle(stream)  # protocol version
    _check_byte_order(_unpickle(stream)["little_endian"])
    seen: dict[str, _Storage] = {}
    found = _unpickle(stream, seen)
    keys = _unpickle(stream)
    records = {}
    position = stream.tell()
    for key in keys:
        if type(key) is not str or key not in seen:
            raise CheckpointError("its list of storages does not match its tensors")
        size = _OTHER_STORAGES.get(seen[key].dtype) or item_size(seen[key].dtype)
        num_bytes = int.from_bytes(source.read(position, 8), "little") * size
        records[key] = _Record(num_bytes, functools.partial(source.read, position + 8, num_bytes))
        position += 8 + num_bytes
    if position > source.size:
        raise CheckpointError(f"ends at byte {source.size} where byte {position} was announced: cut short?")
    return found, records


def _check_byte_order(little: bool) -> None:
    if not little:
        raise CheckpointError("was written on a big-endian machine; such files cannot be read")


def _under(found: object, key: str) -> object:
    """What a file holds under `key`."""
    if not isinstance(found, dict) or not isinstance(found.get(key), dict):
        names = [name for name in found if isinstance(found[name], dict)] if isinstance(found, dict) else []
        raise CheckpointError(f"holds no dict {key!r}; it holds {_listed(names) or 'none'}")
    return found[key]


def _state_dict(found: object, where: str = "") -> dict[str, _Tensor]:
    """The dict of tensors in a file's object: the object itself, or the dict under a usual name, or the only one other
    than what training leaves, or that of an encoder and a decoder combined."""
    if isinstance(found, (list, tuple)) and not isinstance(found, _Tensor):
        found = {str(i): value for i, value in enumerate(found)}
    if not isinstance(found, dict) or (isinstance(found, _Foreign) and not found):
        raise CheckpointError(
            f"holds no state dict{where}, but an object of type {_kind(found)}; save its state_dict()"
        )
    tensors = _flat(found)
    seen: dict[int, bool] = {}
    nested = {name: value for name, value in found.items() if isinstance(name, str) and _holds_tensors(value, seen)}
    is_flat = any("." in name for name in tensors)  # already a state dict, not a count or a loss
    inner = {name: value for name, value in nested.items() if name in _USUAL and not (is_flat and "ema" in name)}
    if not inner:
        inner = {name: value for name, value in nested.items() if not _LEFTOVER.search(name)}
        if is_flat or (tensors and not inner):
            inner = {}
        elif {"encoder", "decoder"} <= inner.keys():
            return tensors | {f"{part}.{name}": value for part in inner for name, value in _flat(inner[part]).items()}
    if inner:
        if len(inner) > 1:
            raise CheckpointError(
                f"holds several state dicts{where} ({_listed(inner)}); choose one with mg-convert --key NAME"
            )
        name = next(iter(inner))
        return _state_dict(inner[name], f" under {name[:64]!r}")
    if not tensors:
        said = [f"{str(name)[:64]} ({_kind(value)})" for name, value in found.items()]
        raise CheckpointError(f"holds no state dict{where}; it holds {_listed(said) or 'nothing'}")
    if len(found) > len(tensors):
        _logger.debug("%d entries other than tensors were skipped", len(found) - len(tensors))
    return tensors


def _holds_tensors(found: object, seen: dict[int, bool]) -> bool:
    """Whether a dict has tensors at any depth; each dict is searched once, even if it has several names."""
    if not isinstance(found, dict):
        return False
    if id(found) not in seen:
        seen[id(found)] = False  # during the search, since it may contain itself
        seen[id(found)] = bool(_flat(found)) or any(_holds_tensors(value, seen) for value in found.values())
    return seen[id(found)]


def _flat(found: dict) -> dict[str, _Tensor]:
    return {name: value for name, value in found.items() if isinstance(value, _Tensor) and isinstance(name, str)}


def _kind(found: object) -> str:
    return found.kind[:128] if isinstance(found, _Foreign) else type(found).__name__


def _listed(names: Iterable) -> str:
    names = [str(name)[:200] for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _unpickle(stream: io.BytesIO, storages: dict[str, _Storage] | None = None):
    """The object of the pickle at the stream's position, which moves past it; its storages are added to `storages`."""
    return Unpickler(stream, {} if storages is None else storages).load()


_Interpreter: Any = pickle._Unpickler  # type checkers don't know its internals


class Unpickler(_Interpreter):
    """Builds the parts of a state dict: tensors, storages, plain containers. Nothing else can be called.

    Based on the standard library's Python implementation: the C one cannot restrict opcodes and keys.
    """

    dispatch: dict = {getattr(pickle, name)[0]: _Interpreter.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}

    def __init__(self, stream: io.BytesIO, storages: dict[str, _Storage]):
        super().__init__(stream, encoding="latin-1")  # for Python 2's strings, which may be bytes
        self.storages = storages
        self.copies_left = len(stream.getbuffer())

    def load(self):
        try:
            return super().load()
        except KeyError as error:
            raise CheckpointError("its pickle is damaged, or holds something that no state dict has") from error

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.put(self.stack[-1], zip(items[::2], items[1::2]))

    def put(self, target, pairs: Iterable[tuple]) -> None:
        """Set the items whose keys take no longer to hash than to read. A state dict has no others."""
        for key, value in pairs:
            small = type(key) is int and abs(key) <= _LARGEST
            if small or type(key) in (str, bytes, float, bool, type(None)):
                target[key] = value

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.made(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    def build(self, target: object, state: object) -> None:
        """Skip attributes, such as a state dict's _metadata."""

    def load_empty_set(self) -> None:
        self.append(_Foreign("set"))

    def load_additems(self) -> None:
        self.pop_mark()

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(_Foreign("frozenset"))

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.EMPTY_SET[0]] = load_empty_set
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def made(self, by, arguments):
        """What a class or function returns; for one that is not known here, its replacement."""
        if isinstance(by, _Foreign):
            return _Foreign(by.kind)
        self.check_copy(arguments)
        return by(*arguments)

    def check_copy(self, items) -> None:
        """Raise if items were copied so often that the copies hold more than the file."""
        self.copies_left -= len(items)
        if self.copies_left < 0:
            raise CheckpointError("its pickle copies its contents until no memory is left")

    def find_class(self, module: str, name: str):
        known = {
            "collections.OrderedDict": self.ordered_dict,
            "collections.defaultdict": self.empty_dict,
            "torch.Size": self.plain_tuple,
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_of_type,
            "torch._utils._rebuild_parameter": self.parameter,
            "torch._utils._rebuild_parameter_with_state": self.parameter,
            "torch._tensor._rebuild_from_type_v2": self.tensor_of_class,
            "torch_npu.utils.storage._rebuild_npu_tensor": self.tensor,
        }
        full = f"{module}.{name}"
        if full in known:
            return known[full]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if _ATTACKS.fullmatch(full):
            raise CheckpointError(
                f"its pickle asks for {full[:128]}, which is not part of a state dict; refused, nothing was run"
            )
        return _Foreign(full)

    def persistent_load(self, pid) -> _Storage | _Foreign:
        if pid[0] == "module" and isinstance(pid[1], _Foreign):  # the class of a model that was saved as an object
            return pid[1]
        kind, dtype, key, _, count = pid[:5]
        if isinstance(dtype, _Foreign):  # complex or quantized numbers, which no model here has
            dtype = dtype.kind
        known = kind == "storage" and type(dtype) is str and type(key) is str
        if not known or type(count) is not int or not 0 <= count <= _LARGEST:
            raise CheckpointError("its pickle refers to something that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError(
                "holds views of storages as PyTorch 0.1 wrote them; save it again with a newer version"
            )
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
        if isinstance(dtype, _Foreign):
            dtype = dtype.kind
        if type(dtype) is not str:
            raise CheckpointError("its pickle builds a tensor of no known type")
        return self.tensor(storage, offset, shape, strides)._replace(dtype=dtype)

    def tensor_of_class(self, function, kind, arguments, *_) -> _Tensor | _Foreign:
        """A tensor of its own class or with attributes; one of a class that wraps tensors cannot be built."""
        return self.made(function, arguments)

    def parameter(self, tensor, *_) -> _Tensor | _Foreign:
        if isinstance(tensor, _Foreign):
            return tensor
        if not isinstance(tensor, _Tensor):
            raise CheckpointError("its pickle builds a parameter from something that is not a tensor")
        return tensor

    def ordered_dict(self, pairs=()) -> OrderedDict:
        self.check_copy(pairs)
        result: OrderedDict = OrderedDict()
        self.put(result, pairs)
        return result

    def empty_dict(self, *_) -> dict:
        return {}

    def plain_tuple(self, items=()) -> tuple:
        self.check_copy(items)
        return tuple(items)
