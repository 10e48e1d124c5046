"""A model's parameters as a list of layers: our name of each, the original's, and the shapes of its parameters.

MindSpore calls the parameters of a norm gamma and beta, everyone else weight and bias.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_THEIRS = {"gamma": "weight", "beta": "bias"}

# What torch.compile, FSDP, activation checkpointing, Lightning and MindSpore put between the names of layers.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_backbone)\."
)
# Before a model's names there may stand whatever a larger model calls it. Where several places look like it, these are
# it before others; an optimizer's moments and moving averages are so last.
_PREFIXES = ("", "module.", "model.", "vae.", "first_stage_model.", "autoencoder.", "generator.")
_PREFIXES += ("spatial_vae.module.", "spatial_vae.")  # the spatial half of Open-Sora 1.2's VAE
_COPIES = re.compile(r"moment|exp_avg|adam|accum|ema|average|shadow", re.IGNORECASE)


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


class Renamed(Mapping[str, T]):
    """What a mapping holds, under other names; `sources` are those that it has there."""

    def __init__(self, state: Mapping[str, T], sources: dict[str, str]):
        self.state, self.sources = state, sources

    def __getitem__(self, name: str) -> T:
        return self.state[self.sources[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def own_part(state: Mapping[str, T], parts: Collection[str]) -> Renamed[T]:
    """What of a file is a model's, under names without prefixes before and wrappers within them.

        module.encoder.conv_in.weight, vae._orig_mod.encoder.conv_in.weight -> encoder.conv_in.weight

    Args:
        parts: what the model's own names begin with; a prefix behind which all of them are found is the model's. What
            lies outside of it is left out. Of two names that are alike without wrappers, one keeps them.
    """
    bare = {name: _WRAPPERS.sub("", name) for name in state}
    plain = {name: name for name in state if bare[name] == name}
    for name in state:
        plain.setdefault(name if bare[name] in plain else bare[name], name)
    start = prefix(plain, parts)
    return Renamed(
        state, {name.removeprefix(start): source for name, source in plain.items() if name.startswith(start)}
    )


def prefix(names: Iterable[str], parts: Collection[str]) -> str:
    """What stands before a model's names in a file, wrappers aside."""
    found: dict[str, set[str]] = {}
    for name in names:
        segments = name.split(".")
        for i, segment in enumerate(segments[:-1]):
            if segment in parts:
                found.setdefault("".join(f"{outer}." for outer in segments[:i]), set()).add(segment)

    def rank(start: str) -> tuple:
        known = _PREFIXES.index(start) if start in _PREFIXES else len(_PREFIXES)
        return -len(found[start]), known, bool(_COPIES.search(start)), len(start), start

    return min(found, key=rank, default="")


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


def torch_name(name: str) -> str:
    """Our name of a parameter as PyTorch would have it."""
    layer, _, parameter = name.rpartition(".")
    return f"{layer}.{_THEIRS.get(parameter, parameter)}"


def original_names(layers: Iterable[Layer]) -> dict[str, str]:
    """Our name of every parameter -> the original's."""
    return {f"{layer.name}.{p}": f"{layer.original}.{_THEIRS.get(p, p)}" for layer in layers for p in layer.shapes}


def parameter_shapes(layers: Iterable[Layer]) -> dict[str, tuple[int, ...]]:
    """Our name of every parameter -> its shape."""
    return {f"{layer.name}.{p}": shape for layer in layers for p, shape in layer.shapes.items()}
