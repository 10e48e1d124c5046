"""Weights from other projects' files: Open-Sora's, which share our names, and PixArt's and DiT's, to start from.

The differences are small. Image networks have 2D patch convolutions where video needs 3D ones. The null caption has as
many tokens as captions had in training: to lengthen it, its last row is repeated; to shorten it, it is cut. Older
networks also lack the layers added since.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mg.checkpoints import LoadReport, StateDict, compare_names
from mg.models import naming

_PATCHES, _NULL_CAPTION = "x_embedder.proj.weight", "y_embedder.y_embedding"
_OF_A_RUN = ("enable_flash_attn", "norm_given_twice")  # our keys that don't affect the weights


class Adapted(Mapping[str, np.ndarray]):
    """Names -> arrays, each read and adapted on access."""

    def __init__(self, arrays: dict[str, Callable[[], np.ndarray]]):
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def adapted_shape(name: str, shape: tuple[int, ...], tokens: int | None = None) -> tuple[int, ...]:
    """The shape of a parameter after adapting it.

    Args:
        tokens: tokens that the null caption should have; None to leave it.
    """
    if name == _PATCHES and len(shape) == 4:
        return shape[:2] + (1,) + shape[2:]
    if name == _NULL_CAPTION and len(shape) == 2 and tokens is not None:
        return (tokens,) + shape[1:]
    return tuple(shape)


def adapt(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array brought to its `adapted_shape`."""
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
    """The weights of a file under our names, and a report of which parameters of a network it has.

    Args:
        state: a file's arrays, after any prefix.
        wanted: our name of every parameter -> its shape.
        settings: parameters that follow from the config, used if the file has none of the right shape.
        older: patterns of the parameters that older networks, which this one may start from, lack. They count as new
            instead of missing if the file has none that match the first pattern, and all or none of each other one's.
        blocks_of_older: our name prefix for the older networks' `blocks.`.

    Returns:
        The wanted parameters that were found, of any shape, read on access; and the report.
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
    """The kinds of parameters, regardless of the number of blocks."""
    return {naming.kind(name, adapted_shape(name, shape)) for name, shape in shapes.items()}


def config_from_open_sora(config: Mapping, defaults: Mapping) -> dict:
    """The part of an Open-Sora config.json that describes the weights, in our keys; the rest is about runs."""
    known = {key: config[key] for key in defaults if key in config and key not in _OF_A_RUN}
    if None in (known.get("input_size") or ()):
        del known["input_size"]
    return known


def config_to_open_sora(config: Mapping, name: str) -> dict:
    """The config.json for Open-Sora's class of this name."""
    known = {key: value for key, value in config.items() if key not in _OF_A_RUN}
    known["input_size"] = list(known["input_size"] or (None, None, None))
    return {"architectures": [name], "model_type": name, **known}
