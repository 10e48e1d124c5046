"""Weights by path: which reader or writer a file or folder takes."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mg.checkpoints import mindspore_file, safetensors_file, torch_pickle
from mg.checkpoints.atomic import atomic_write
from mg.checkpoints.report import CheckpointError
from mg.checkpoints.tensors import Source, StoredTensor

_READERS: dict[str, Callable[[Source], dict[str, StoredTensor]]] = {
    ".safetensors": safetensors_file.read,
    ".pt": torch_pickle.read,
    ".pth": torch_pickle.read,
    ".bin": torch_pickle.read,
    ".ckpt": mindspore_file.read,
}
_IN_FOLDERS = (  # the first that is there is taken
    "model.safetensors",
    "model.ckpt",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.pt",  # Tencent's
)


class StateDict(Mapping):
    """Names -> arrays of an open file; a tensor is read when it is asked for."""

    def __init__(self, tensors: dict[str, tuple[Path, StoredTensor]]):
        self._tensors = tensors

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


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a weight file or folder, by name.

    Args:
        path: a .safetensors, .pt, .pth, .bin or .ckpt file, or a folder: our own, diffusers', sharded or not, or a
            diffusers pipeline's, whose `vae` folder is meant.

    Returns:
        Floating tensors as float32, to which fp16 and bf16 widen exactly; others in their own type. Arrays may share
        memory where the file's tensors do.

    Raises:
        CheckpointError: whatever is wrong, in one line that names the file.
    """
    with open_state_dict(path) as state:
        return dict(state)


@contextlib.contextmanager
def open_state_dict(path: str | os.PathLike) -> Iterator[StateDict]:
    """Like `read_state_dict`, but names come at once and tensors when asked for: for files larger than the memory."""
    path = _weights_in(Path(path))
    with contextlib.ExitStack() as stack:
        if path.suffix == ".json":
            yield StateDict(_open_shards(path, stack))
        else:
            yield StateDict(_open_file(path, stack))


def write_state_dict(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "fp32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a .safetensors or MindSpore .ckpt file, whole or not at all.

    Args:
        dtype: of the floating tensors, fp32 | fp16 | bf16, rounded to nearest. Others keep their type.
        metadata: texts for the header of a .safetensors file; a .ckpt has no place for them.

    Raises:
        CheckpointError: another suffix or dtype, or a number that does not fit `dtype`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError(f"{path}: weights are written to .safetensors or .ckpt files")
    if metadata and path.suffix == ".ckpt":
        raise CheckpointError(f"{path}: a .ckpt file has no place for metadata; write .safetensors")
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".ckpt":
            mindspore_file.write(file, tensors, dtype)
        else:
            safetensors_file.write(file, tensors, dtype, metadata)


def check_finite(source: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise CheckpointError, with their names, where weights from `source` hold numbers that are not finite."""
    bad = [name for name, array in tensors.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(
            f"{source}: {bad[0]}{more} of its {len(tensors)} parameters hold NaN or infinite numbers: nothing can be "
            "made of these weights; take an earlier checkpoint"
        )


def find_config(path: str | os.PathLike) -> Path | None:
    """The JSON file that describes the model of a weight file: X.json beside X.ckpt, or else config.json there."""
    weights = _weights_in(Path(path))
    beside = [weights.with_suffix(".json"), weights.with_name("config.json")]
    return next((file for file in beside if file != weights and file.is_file()), None)


def read_config(path: str | os.PathLike) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    path = Path(path)
    with reading(path):
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise CheckpointError("must hold a JSON object")
    return config


def _weights_in(path: Path) -> Path:
    """The weight file, or the index of its shards, that a path means."""
    if not path.is_dir():
        return path
    for folder in (path, path / "vae"):
        for name in _IN_FOLDERS:
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(f"{path}: holds no weights; a file named {' or '.join(_IN_FOLDERS[:2])} was looked for")


def _open_file(path: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Path, StoredTensor]]:
    if path.suffix not in _READERS:
        raise CheckpointError(f"{path}: is no weight file that can be read; those are {', '.join(_READERS)}")
    with reading(path):
        source = Source(stack.enter_context(open(path, "rb")))  # noqa: SIM115
        tensors = _READERS[path.suffix](source)
        if not tensors:
            raise CheckpointError("holds no tensors")
    return {name: (path, tensor) for name, tensor in tensors.items()}


def _open_shards(index: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Path, StoredTensor]]:
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index}: must map tensors to files under weight_map")
    tensors = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard[:64]} must be a file beside it")
        tensors.update(_open_file(index.with_name(shard), stack))
    absent = sorted(shards.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index}: {absent[0]} and {len(absent) - 1} more are in no shard")
    return tensors


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one line that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {_one_line(error)}", error.report) from error
    except Exception as error:  # a reader of foreign bytes fails in as many ways as there are bytes
        reason = _one_line(f"{type(error).__name__}: {error}")[:200]
        raise CheckpointError(f"{path}: cannot be read, it is damaged or of another format ({reason})") from error


def _one_line(text: object) -> str:
    """Names in a foreign file may hold line ends, and what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:1000]
