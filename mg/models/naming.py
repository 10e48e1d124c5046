"""Names of parameters in files: prefixes, wrappers, and the rules that turn our names into an original's.

MindSpore calls a norm's parameters gamma and beta; everyone else calls them weight and bias.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
Rule = tuple[str, str | Callable[[re.Match], str]]  # a pattern and its replacement, as in `re.sub`

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


def renamed(name: str, rules: Iterable[Rule]) -> str:
    """A name after all rules, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def original_name(name: str, rules: Iterable[Rule]) -> str:
    """The original's name of a parameter that has this name here."""
    return torch_name(renamed(name, rules))


def within(part: str, rules: Sequence[Rule], theirs: str | None = None) -> Rule:
    """One rule for the names that begin with `part`: rules for the rest, and what the part is called there."""
    start = part if theirs is None else theirs
    return f"^{re.escape(part)}(.*)", lambda found: start + renamed(found[1], rules)


def diffusers_rules(levels: int) -> tuple[Rule, ...]:
    """Latent diffusion's names, which are ours, to diffusers', where the decoder's levels are numbered from the
    coarsest."""
    return (
        (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
        (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}."),
        (r"(\.up_blocks\.\d+)\.block\.", r"\1.resnets."),
        (r"\.upsample\.", ".upsamplers.0."),
        (r"\.mid\.block_(\d)\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
    )
