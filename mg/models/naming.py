"""A model's parameters as a list of layers, each with our name, the original's, and the shapes of its parameters.

MindSpore calls a norm's parameters gamma and beta; everyone else calls them weight and bias.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_THEIRS = {"gamma": "weight", "beta": "bias"}

# What torch.compile, FSDP, activation checkpointing, Lightning and MindSpore insert into parameter names.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_backbone)\."
)
# A model's names may have any prefix, if it is part of a larger model. If several match, these are preferred over
# others, and an optimizer's moments and moving averages come last.
_PREFIXES = ("", "module.", "model.", "vae.", "first_stage_model.", "autoencoder.", "generator.")
_PREFIXES += ("spatial_vae.module.", "spatial_vae.")  # the spatial half of Open-Sora 1.2's VAE
_COPIES = re.compile(r"moment|exp_avg|adam|accum|ema|average|shadow", re.IGNORECASE)


class Layer(NamedTuple):
    """One layer: our name, the original's, and the shapes of its parameters."""

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
    """A mapping's values under other names; `sources` maps these to the original names."""

    def __init__(self, state: Mapping[str, T], sources: dict[str, str]):
        self.state, self.sources = state, sources

    def __getitem__(self, name: str) -> T:
        return self.state[self.sources[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def own_part(state: Mapping[str, T], parts: Collection[str]) -> Renamed[T]:
    """A model's part of a file, under names without prefixes and wrappers.

        module.encoder.conv_in.weight, vae._orig_mod.encoder.conv_in.weight -> encoder.conv_in.weight

    Args:
        parts: first components of the model's names; the prefix with the most of them is the model's, and names without
            it are left out. If two names are equal without wrappers, one of them keeps its wrappers.
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
    """The prefix of a model's names in a file, ignoring wrappers."""
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
    """What parameters in the same place share, however many and wide their layers are: the name without its numbers,
    and the number of axes.

        encoder.down.3.block.0.norm1.gamma (512,) -> encoder.down.#.block.#.norm1.weight, 1

    A norm's parameters are called weight and bias here, and a 1x1 convolution counts as the linear layer that it may be
    stored as.
    """
    *layer, parameter = re.sub(r"(?<![^.])\d+(?![^.])", "#", name).split(".")
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return ".".join([*layer, _THEIRS.get(parameter, parameter)]), len(shape)


def torch_name(name: str) -> str:
    """PyTorch's version of our name of a parameter."""
    layer, _, parameter = name.rpartition(".")
    return f"{layer}.{_THEIRS.get(parameter, parameter)}"


def original_names(layers: Iterable[Layer]) -> dict[str, str]:
    """Our name of every parameter -> the original's."""
    return {f"{layer.name}.{p}": f"{layer.original}.{_THEIRS.get(p, p)}" for layer in layers for p in layer.shapes}


def parameter_shapes(layers: Iterable[Layer]) -> dict[str, tuple[int, ...]]:
    """Our name of every parameter -> its shape."""
    return {f"{layer.name}.{p}": shape for layer in layers for p, shape in layer.shapes.items()}
