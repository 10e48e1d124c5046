"""The networks' weights in files of others: Open-Sora's, whose names are ours; PixArt's and DiT's, to start from.

What differs is small. An image's network has a convolution of two dimensions where the patches of a video take three.
The caption of none has as many tokens as captions had: a longer one repeats its last row, a shorter one is cut. And
older networks lack what was added since.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mg.checkpoints import LoadReport, StateDict, compare_names
from mg.models import naming

_PATCHES, _NULL_CAPTION = "x_embedder.proj.weight", "y_embedder.y_embedding"
_OF_A_RUN = ("enable_flash_attn", "norm_given_twice")  # keys of ours that say nothing of the weights


class Adapted(Mapping[str, np.ndarray]):
    """Names -> arrays, each read and adapted when it is asked for."""

    def __init__(self, arrays: dict[str, Callable[[], np.ndarray]]):
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def adapted_shape(name: str, shape: tuple[int, ...], tokens: int | None = None) -> tuple[int, ...]:
    """The shape of a parameter, once it is adapted.

    Args:
        tokens: of the caption of none, where that is to change.
    """
    if name == _PATCHES and len(shape) == 4:
        return shape[:2] + (1,) + shape[2:]
    if name == _NULL_CAPTION and len(shape) == 2 and tokens is not None:
        return (tokens,) + shape[1:]
    return tuple(shape)


def adapt(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array in its `adapted_shape`."""
    if array.ndim == len(shape) == 2:
        array = np.concatenate([array, np.repeat(array[-1:], max(0, shape[0] - len(array)), axis=0)])[: shape[0]]
    return array.reshape(shape)


def fit(
    state: Mapping,
    wanted: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, np.ndarray],
    older: tuple[str, ...],
    blocks_of_older: str,
) -> tuple[Mapping[str, np.ndarray], LoadReport]:
    """The weights of a file under our names, and which of those that a network wants are there.

    Args:
        state: a file's, behind whatever prefix.
        wanted: our name of every parameter -> its shape.
        settings: parameters that follow from the config, taken from here where the file has none of their shape.
        older: patterns of parameters that networks lack which this one may start from. They count as new, and not as
            missing, where the file has none that the first pattern finds; each pattern's are there together or not.
        blocks_of_older: the beginning of our names for what is `blocks.` there.

    Returns:
        Those that are wanted and found, of whatever shape, read when asked for; and the report.
    """
    own = naming.own_part(state, {name.partition(".")[0] for name in wanted})
    shapes = state.shapes if isinstance(state, StateDict) else {name: state[name].shape for name in state}
    renamed = not any(name.startswith(blocks_of_older) for name in own)
    tokens = wanted.get(_NULL_CAPTION, (None,))[0]
    arrays: dict[str, Callable[[], np.ndarray]] = {}
    found: dict[str, tuple[int, ...]] = {}
    taken = set()
    for name, source in own.sources.items():
        if renamed and name.startswith("blocks."):
            name = blocks_of_older + name.removeprefix("blocks.")
        shape = adapted_shape(name, tuple(shapes[source]), tokens)
        if name in wanted and (name not in settings or shape == tuple(wanted[name])):
            arrays[name] = _reader(state, source, shape)
            found[name] = shape
            taken.add(source)
    for name, array in settings.items():
        if name in wanted and name not in found:
            arrays[name], found[name] = array.copy, array.shape
    report = compare_names(wanted, found)
    report.unexpected = [name for name in state if name not in taken]
    _set_apart_what_is_new(report, wanted, older)
    return Adapted(arrays), report


def _reader(state: Mapping, source: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: adapt(np.asarray(state[source]), shape)


def _set_apart_what_is_new(report: LoadReport, wanted: Mapping, older: tuple[str, ...]) -> None:
    missing = set(report.missing)
    groups = [{name for name in wanted if re.search(pattern, name)} for pattern in older]
    if groups and groups[0] <= missing:
        new = set().union(*(group for group in groups if group <= missing))
        report.new = [name for name in report.missing if name in new]
        report.missing = [name for name in report.missing if name not in new]


def kinds(shapes: Mapping[str, tuple[int, ...]]) -> set:
    """The kinds of parameters, however many blocks there are."""
    return {naming.kind(name, adapted_shape(name, shape)) for name, shape in shapes.items()}


def config_from_open_sora(config: dict, defaults: dict) -> dict:
    """What an Open-Sora config.json says of the weights, in our keys; the rest of it is about runs."""
    known = {key: config[key] for key in defaults if key in config and key not in _OF_A_RUN}
    if None in (known.get("input_size") or ()):
        del known["input_size"]
    return known


def config_to_open_sora(config: dict, name: str) -> dict:
    """The config.json that Open-Sora's class of this name reads."""
    known = {key: value for key, value in config.items() if key not in _OF_A_RUN}
    known["input_size"] = list(known["input_size"] or (None, None, None))
    return {"architectures": [name], "model_type": name, **known}
