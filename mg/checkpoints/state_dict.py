"""Weights by path: a file's content decides which reader is used, and its name decides the writer."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from mg.checkpoints import mindspore_file, safetensors_file, torch_pickle
from mg.checkpoints.atomic import atomic_write
from mg.checkpoints.folder import config_of, weights_in
from mg.checkpoints.report import CheckpointError
from mg.checkpoints.tensors import Source, StoredTensor
from mg.plain_text import one_line

_KINDS = "safetensors, PyTorch's and MindSpore's"
_LONGEST = 1000  # characters of a message: names in a foreign file may have any length
_WEB_PAGE = "is a web page, not weights: what was downloaded is not the file itself"
_STRANGERS = {  # how other files begin that are often found where weights should be
    b"version https://git-lfs": "is a Git LFS pointer instead of the file: run git lfs pull",
    b"<!": _WEB_PAGE,
    b"<htm": _WEB_PAGE,
    b"<?xml": _WEB_PAGE,
    b'{"': "is JSON, not weights",
    b"GGUF": f"is a GGUF file; {_KINDS} can be read",
    b"\x89HDF": f"is an HDF5 file; {_KINDS} can be read",
}


class StateDict(Mapping):
    """Names -> arrays of an open file; a tensor is read when it is accessed.

    Attributes:
        path: what was opened, a file or folder.
        config_file: the JSON file that describes the model, None if there is none.
    """

    def __init__(self, path: Path, config_file: Path | None, tensors: dict[str, tuple[Path, StoredTensor]]):
        self.path, self.config_file = path, config_file
        self._tensors = tensors

    def __str__(self) -> str:
        return str(self.path)

    def __getitem__(self, name: str) -> np.ndarray:
        path, tensor = self._tensors[name]
        with reading(path):
            return tensor.read()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names -> shapes, without reading the tensors."""
        return {name: tensor.shape for name, (_, tensor) in self._tensors.items()}


def read_state_dict(path: "str | os.PathLike | StateDict", key: str | None = None) -> dict[str, np.ndarray]:
    """All tensors of a weight file or folder, by name.

    Args:
        path: a safetensors, PyTorch or MindSpore file, recognised by its content; or a folder: ours or diffusers',
            sharded or not, or one with the weights in a `vae` or `model` folder, such as a diffusers pipeline or an
            Open-Sora training checkpoint.
        key: which of several state dicts in a PyTorch file.

    Returns:
        Floating tensors as float32, to which fp16 and bf16 widen exactly; others in their own type. Arrays may share
        memory if the file's tensors do.

    Raises:
        CheckpointError: anything goes wrong; one line names the file.
    """
    with open_state_dict(path, key) as state:
        return dict(state)


@contextlib.contextmanager
def open_state_dict(path: "str | os.PathLike | StateDict", key: str | None = None) -> Iterator[StateDict]:
    """Like `read_state_dict`, but reads names at once and tensors on access: for files larger than memory.

    A StateDict that is already open is yielded as is, so that a file is opened only once for any number of users.
    """
    if isinstance(path, StateDict):
        yield path
        return
    path = Path(path)
    weights = weights_in(path)
    with contextlib.ExitStack() as stack:
        is_index = weights.suffix == ".json"
        tensors = _open_shards(weights, stack) if is_index else _open_file(weights, stack, key)
        yield StateDict(path, config_of(path, weights), tensors)


def write_state_dict(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "fp32",
    metadata: Mapping[str, str] | None = None,
    exact: Collection[str] = (),
) -> None:
    """Write tensors to a .safetensors or MindSpore .ckpt file, atomically.

    Args:
        dtype: of the floating tensors, fp32 | fp16 | bf16, rounded to nearest. Others keep their type.
        metadata: texts for the header of a .safetensors file; a .ckpt has no place for them.
        exact: names of floating tensors that are always fp32, regardless of `dtype`.

    Raises:
        CheckpointError: another suffix or dtype, or a number that does not fit `dtype`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError(f"{path}: weights are written to .safetensors or .ckpt files")
    if metadata and path.suffix == ".ckpt":
        raise CheckpointError(f"{path}: a .ckpt file has no place for metadata; write .safetensors")
    types = {name: "fp32" if name in exact else dtype for name in tensors}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".ckpt":
            mindspore_file.write(file, tensors, types)
        else:
            safetensors_file.write(file, tensors, types, metadata)


def check_finite(source: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise CheckpointError, naming a parameter, if weights from `source` hold numbers that are not finite."""
    bad = [name for name, array in tensors.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(
            f"{source}: {bad[0]}{more} of its {len(tensors)} parameters hold NaN or infinite numbers: these weights "
            "are unusable; take an earlier checkpoint"
        )


def find_config(path: str | os.PathLike) -> Path | None:
    """The JSON file that describes the model of a weight file or folder: X.json next to X.ckpt, or else config.json."""
    path = Path(path)
    return config_of(path, weights_in(path))


def read_config(path: str | os.PathLike) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    path = Path(path)
    with reading(path):
        config = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(config, dict):
            raise CheckpointError("must hold a JSON object")
    return config


def _open_file(path: Path, stack: contextlib.ExitStack, key: str | None = None) -> dict[str, tuple[Path, StoredTensor]]:
    with reading(path):
        source = Source(stack.enter_context(open(path, "rb")))  # noqa: SIM115
        tensors = _read(source, key)
        if not tensors:
            raise CheckpointError("holds no tensors")
    return {name: (path, tensor) for name, tensor in tensors.items()}


def _read(source: Source, key: str | None) -> dict[str, StoredTensor]:
    """The tensors of an open file, whose first bytes identify its format."""
    head = bytes(source.read(0, min(32, source.size)))
    is_safetensors = safetensors_file.is_safetensors(head)  # first: a header length may look like another signature
    if not is_safetensors and head.startswith(torch_pickle.SIGNATURES):
        return torch_pickle.read(source, key)
    if key is not None:
        raise CheckpointError(f"holds its tensors directly, not in a dict {key!r}; only PyTorch's files may have dicts")
    if is_safetensors:
        return safetensors_file.read(source)
    stranger = next((said for start, said in _STRANGERS.items() if head.lstrip().startswith(start)), None)
    if stranger:
        raise CheckpointError(stranger)
    if head.startswith(mindspore_file.SIGNATURE):
        return mindspore_file.read(source)
    if not head:
        raise CheckpointError("is empty")
    raise CheckpointError(f"is not a weight file that can be read, or its beginning is damaged; {_KINDS} can")


def _open_shards(index: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Path, StoredTensor]]:
    shards = read_config(index).get("weight_map")
    if shards is None:
        raise CheckpointError(f"{index}: is JSON, but not a weight index with a weight_map; name the weight file")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index}: must map tensors to files under weight_map")
    tensors = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard[:64]} must be a file next to it")
        tensors.update(_open_file(index.with_name(shard), stack))
    absent = sorted(shards.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index}: {absent[0]} and {len(absent) - 1} more are in no shard")
    return tensors


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error while reading a file into a one-line CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {one_line(error)[:_LONGEST]}", error.report) from error
    except Exception as error:  # reading untrusted bytes can fail in any way
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise CheckpointError(f"{path}: cannot be read: it is damaged or has another format ({reason})") from error
