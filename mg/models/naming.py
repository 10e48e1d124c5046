"""A model's parameters as a list of layers: our name of each, the original's, and the shapes of its parameters.

MindSpore calls the parameters of a norm gamma and beta, everyone else weight and bias.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_THEIRS = {"gamma": "weight", "beta": "bias"}


class Layer(NamedTuple):
    """One layer: our name, the original's, and the shape of its parameters below."""

    name: str
    original: str
    shapes: dict[str, tuple[int, ...]]


def conv3d(name: str, original: str, in_channels: int, channels: int, kernel: int = 3, bias: bool = True) -> Layer:
    """A 3-D convolution of `in_channels` per group."""
    shapes = {"weight": (channels, in_channels, kernel, kernel, kernel)}
    return Layer(name, original, shapes | ({"bias": (channels,)} if bias else {}))


def linear(name: str, original: str, channels: int) -> Layer:
    """A linear layer that keeps the number of channels."""
    return Layer(name, original, {"weight": (channels, channels), "bias": (channels,)})


def norm(name: str, original: str, channels: int) -> Layer:
    return Layer(name, original, {"gamma": (channels,), "beta": (channels,)})


def kind(name: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """What all layers of one place have in common, however many and wide they are: the parameter's name without its
    numbers, and how many axes it has.

        encoder.down.3.block.0.norm1.gamma (512,) -> encoder.down.#.block.#.norm1.weight, 1

    A norm's parameters have everyone's names here, and a 1x1 convolution is the linear layer that it may be stored as.
    """
    *layer, parameter = re.sub(r"(?<![^.])\d+(?![^.])", "#", name).split(".")
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return ".".join([*layer, _THEIRS.get(parameter, parameter)]), len(shape)


def original_names(layers: Iterable[Layer]) -> dict[str, str]:
    """Our name of every parameter -> the original's."""
    return {f"{layer.name}.{p}": f"{layer.original}.{_THEIRS.get(p, p)}" for layer in layers for p in layer.shapes}


def parameter_shapes(layers: Iterable[Layer]) -> dict[str, tuple[int, ...]]:
    """Our name of every parameter -> its shape."""
    return {f"{layer.name}.{p}": shape for layer in layers for p, shape in layer.shapes.items()}
