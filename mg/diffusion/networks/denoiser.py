"""`Denoiser`: the interface that all networks share.

    model = create_denoiser("STDiT3-XL/2", pretrained="OpenSora-STDiT-v3", dtype="bf16")
    eps = model(x, t, y, mask, height=height, width=width, fps=fps)[:, :4]

A graph is compiled per latent size but not per caption length: captions are padded to the longest.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

from mg.checkpoints import LoadReport, StateDict
from mg.collectives import Group
from mg.diffusion.networks import weights
from mg.diffusion.networks.positions import rotary_frequencies
from mg.diffusion.networks.sequence import AllTokens, SharedTokens
from mg.models import naming
from mg.models.config import StoredConfig
from mg.models.registry import Registry, merge_config
from mg.models.stored import StoredModel, described_here

DENOISERS: "Registry[Denoiser]" = Registry()  # filled by `mg.diffusion.networks`


@dataclass(frozen=True, eq=False)
class DenoiserConfig(StoredConfig):
    """Config of a denoiser.

    Attributes:
        input_size: latent frames, rows and columns; None for any, if the network allows it.
        in_channels: of the latents.
        patch_size: latent frames, rows and columns of a patch.
        hidden_size, depth, num_heads: width, blocks and attention heads.
        mlp_ratio: width of the hidden layers of the MLPs, relative to hidden_size.
        pred_sigma: also predict a variance for every value: twice the output channels.
        caption_channels: of the text encoder.
        model_max_length: tokens of a caption.
        enable_flash_attn: flash attention on Ascend; no effect elsewhere.
    """

    width_factors: ClassVar[tuple[int, ...]] = (4,)  # hidden_size is divisible by them, and by the number of heads
    sized: ClassVar[bool] = False  # the network is for latents of one size

    input_size: list[int] | None = None
    in_channels: int = 4
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    caption_channels: int = 4096
    model_max_length: int = 120
    enable_flash_attn: bool = False

    def __post_init__(self):
        self.check_positive("in_channels", "hidden_size", "depth", "num_heads", "caption_channels", "model_max_length")
        for key in ("patch_size", "input_size"):
            value = self[key]
            if value is not None or key == "patch_size" or self.sized:
                listed = isinstance(value, (list, tuple)) and len(value) == 3 and all(type(n) is int for n in value)
                self.check(key, listed, "three whole numbers, [T, H, W]")
                object.__setattr__(self, key, list(value))
        channels, heads = self.hidden_size, self.num_heads
        factor = math.lcm(heads, *self.width_factors)
        self.check("hidden_size", channels % factor == 0, f"a multiple of {factor}")
        if channels // heads % 2:
            raise ValueError(f"{channels} channels in {heads} heads are an odd number per head; it must be even")


@dataclass(frozen=True, eq=False)
class STDiTConfig(DenoiserConfig):
    """Config of a network that takes given frames.

    Attributes:
        norm_given_twice: as Open-Sora does, see `T2IFinalLayer`.
    """

    norm_given_twice: bool = False


class Denoiser(StoredModel):
    """Base class of the networks. A subclass sets the class attributes and makes its layers in `build`.

    Args:
        config: overrides of the network's config.
        pretrained: file or folder of weights, ours or the original's, or PixArt's to start from.
        dtype: fp32 | fp16 | bf16, the precision of matrix products; norms, softmax, timesteps, sizes and positions are
            fp32.
        use_recompute: gradient checkpointing, block by block.

    Attributes:
        in_channels, out_channels: channels of the latents and of the prediction.
        extra_inputs: the network's other inputs per sample besides timestep and caption, in this order.
        takes_frame_mask: whether some frames may be given and the others generated.
        text_encoders: types of text encoders whose captions it takes, see `mg.text`.
        num_classes: the number of classes if captions are class numbers; else None.
        new_to_older: patterns of the parameters that PixArt's or DiT's files, which may be started from, lack; the
            parameters of the first pattern tell those files from this network's own.
        blocks_of_older: our name for the blocks of those files.
        variants: configs whose files differ in the kinds of their parameters.

    Raises:
        ValueError: a config that cannot be built.
        CheckpointError: weights that cannot be read or do not fit.
    """

    config: DenoiserConfig
    default_config: DenoiserConfig
    extra_inputs: tuple[str, ...] = ()
    takes_frame_mask = True
    text_encoders: tuple[str, ...] = ("t5",)
    num_classes: int | None = None
    new_to_older: tuple[str, ...] = ()
    blocks_of_older = "blocks."
    variants: tuple[dict, ...] = ({},)
    shallow = {"depth": 1}

    def __init__(
        self,
        config: dict | None = None,
        pretrained: str | Path | StateDict | None = None,
        dtype: str = "fp32",
        use_recompute: bool = False,
    ):
        super().__init__()
        stored = {} if pretrained is None else DENOISERS.stored_config(pretrained, type(self))
        self.config = self.complete({**stored, **(config or {})})
        self.in_channels = self.config.in_channels
        self.out_channels = self.in_channels * (2 if self.config.pred_sigma else 1)
        t, h, w = self.config.patch_size
        self.patch_size = (t, h, w)
        self.patch_values = math.prod(self.patch_size) * self.out_channels
        self.tokens = AllTokens()
        self.build()
        self.dtype = dtype
        self.finish(dtype, use_recompute, pretrained)

    # What a network implements or overrides.

    def build(self) -> None:
        """Make the layers."""
        raise NotImplementedError

    @classmethod
    def complete(cls, config: Mapping) -> DenoiserConfig:
        """The config with defaults filled in, checked.

        Raises:
            ValueError: an unknown key, or a value that cannot be built.
        """
        return merge_config(cls.default_config, config, cls.name)

    @classmethod
    def positions(cls, config: DenoiserConfig) -> dict[str, np.ndarray]:
        """The parameters named in `settings`."""
        return {}

    @property
    def null_caption(self) -> np.ndarray:
        """The null caption (L, D), in the text encoder's channels."""
        return self.y_embedder.y_embedding.asnumpy()

    def attentions_within_frames(self) -> list[nn.Cell]:
        """The attention layers over patches; [] if workers cannot share the patches."""
        return []

    def share_tokens(self, group: Group) -> None:
        """Sequence parallelism: the workers of a group share the patches of the same clips, and each returns the whole
        output. Each has part of the gradients; their mean over the workers is the full gradient.

        Raises:
            ValueError: the network's tokens cannot be shared.
        """
        attentions = self.attentions_within_frames()
        if not attentions:
            raise ValueError(f"{self.name} has no tokens that {group.size} workers could share; use an STDiT")
        for cell in (self, *attentions):
            cell.tokens = SharedTokens(group)

    def recompute_activations(self) -> None:
        """Gradient checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again."""
        for _, cell in self.cells_and_names():
            if isinstance(cell, nn.CellList):
                for block in cell:
                    block.recompute()

    # Called from Python; an enclosing graph calls `construct` and must pass all inputs in full.

    def __call__(self, x, t, y, mask=None, x_mask=None, **extra):
        """Predict the latents' noise (or velocity), followed by the variance values with `pred_sigma`.

        Args:
            x: latents (B, C, T, H, W).
            t: timesteps (B,).
            y: captions (B, 1, L, D), L up to `model_max_length`.
            mask: (B, L), nonzero at the caption's tokens; by default all are. Fewer rows than x has are repeated.
            x_mask: (B, T), True at frames to generate, False at given ones; T after patching.
            extra: `extra_inputs`, (B,) each, or fewer, repeated like mask's rows; height and width (in pixels) and
                num_frames are the video's, ar is height / width.

        Returns:
            (B, out_channels, T, H, W) in fp32.

        Raises:
            ValueError: a wrong shape, or an input that is missing or unknown.
        """
        b = self._check_latents(x)
        missing = [name for name in self.extra_inputs if extra.get(name) is None]
        unknown = [name for name in extra if name not in self.extra_inputs]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"takes no {', '.join(unknown)}"
            wanted = f"besides x, t, y and masks it takes {', '.join(self.extra_inputs) or 'nothing'}"
            raise ValueError(f"this call of {self.name} {wrong}; {wanted}")
        t = self._of_samples(t, b, "t", ms.float32)
        sizes = [self._of_samples(extra[name], b, name, ms.float32) for name in self.extra_inputs]
        y, mask = self._caption(y, mask, b)
        if x_mask is not None:
            frames = -(-x.shape[2] // self.patch_size[0])
            if not self.takes_frame_mask:
                raise ValueError(f"{self.name} takes no frame mask (x_mask): it generates all frames")
            if tuple(x_mask.shape) != (b, frames):
                raise ValueError(f"x_mask has shape {tuple(x_mask.shape)}; it must be {(b, frames)}, (B, T)")
            x_mask = x_mask.astype(ms.bool_)
        return super().__call__(x, t, y, mask, x_mask, *sizes)

    def _check_latents(self, x) -> int:
        """The batch size of x."""
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, {self.in_channels}, T, H, W)")
        return x.shape[0]

    def _of_samples(self, value, samples: int, name: str, dtype):
        """One value or row per sample: fewer are repeated in turn."""
        if value.shape[0] == 0 or samples % value.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must have {samples} rows, or a divisor of that"
            )
        value = value.astype(dtype)
        times = samples // value.shape[0]
        return value if times == 1 else mint.cat((value,) * times, dim=0)

    def _caption(self, y, mask, samples: int):
        """The captions and their mask, padded to the longest."""
        longest, channels = self.config.model_max_length, self.config.caption_channels
        if y.ndim != 4 or y.shape[1] != 1 or y.shape[3] != channels or y.shape[2] > longest:
            wanted = f"(B, 1, L, {channels}), L up to {longest}"
            raise ValueError(f"y has shape {tuple(y.shape)}; it must be {wanted}")
        tokens = y.shape[2]
        y = self._of_samples(y, samples, "y", ms.float32)
        if mask is None:
            mask = Tensor(np.ones((samples, tokens), np.bool_))
        elif tuple(mask.shape[1:]) != (tokens,):
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be (B, {tokens}), to match y")
        mask = self._of_samples(mask, samples, "mask", ms.float32)
        if tokens < longest:
            y = mint.cat((y, mint.zeros((samples, 1, longest - tokens, channels))), dim=2)
            mask = mint.cat((mask, mint.zeros((samples, longest - tokens))), dim=1)
        return y, mask > 0

    # Weights, under the originals' names.

    @classmethod
    def is_original_config(cls, config: Mapping) -> bool:
        architectures = config.get("architectures")
        named = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [])]
        return "model" not in config and any(name in cls.originals for name in named)

    @classmethod
    def translate_config(cls, config: Mapping) -> dict:
        if not cls.is_original_config(config):
            return dict(config)
        return weights.config_from_open_sora(config, cls.default_config)

    @classmethod
    def original_config(cls, config: Mapping) -> dict:
        if not cls.originals:  # Open-Sora 1.0's networks have none
            return described_here(cls.name)(config)
        return weights.config_to_open_sora(config, cls.originals[0])

    @classmethod
    def recognises(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file holds exactly this network's kinds of parameters, in one of its variants; parameters that
        follow from the config are optional."""
        for parts, kinds in _kinds(cls):  # type: ignore[arg-type]  # the __hash__ that mypy sees is an instance's
            own = naming.own_part(shapes, parts).items()
            if weights.kinds({name: shape for name, shape in own if name.partition(".")[0] in parts}) == kinds:
                return True
        return False

    @classmethod
    def fit(cls, state: Mapping, config: Mapping, wanted: Mapping[str, tuple[int, ...]]) -> tuple[Mapping, LoadReport]:
        """Also takes files of older networks, PixArt's or DiT's: `report.new` is then what they lack."""
        settings = cls.positions(cls.complete(config))
        return weights.fit(state, wanted, settings, cls.new_to_older, cls.blocks_of_older)


class RotaryDenoiser(Denoiser):
    """A denoiser for latents of any size, with rotary embeddings over frames."""

    settings = ("rope.freqs",)

    @classmethod
    def positions(cls, config):
        return {"rope.freqs": rotary_frequencies(config.hidden_size // config.num_heads)}


class SizedDenoiser(Denoiser):
    """A denoiser for latents of a single size, `input_size`, which its position embeddings depend on."""

    @staticmethod
    def grid(config: DenoiserConfig) -> tuple[int, int, int]:
        """The number of patches along T, H and W."""
        t, h, w = (-(-size // patch) for size, patch in zip(config.input_size or (), config.patch_size))
        return t, h, w

    def _check_latents(self, x) -> int:
        samples = super()._check_latents(x)
        if tuple(x.shape[2:]) != tuple(self.config.input_size or ()):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, and this {self.name} is for {self.config.input_size}, "
                "[T, H, W]; build it with that input_size"
            )
        return samples


@functools.cache
def _kinds(network: type[Denoiser]) -> list[tuple[set[str], set]]:
    """For each variant of a network: the parts that its files always have, and the kinds of parameters in those."""
    found = []
    for variant in network.variants:
        shapes = network.weight_shapes({**variant, **network.shallow})
        kept = {name: shape for name, shape in shapes.items() if name not in network.settings}
        found.append(({name.partition(".")[0] for name in kept}, weights.kinds(kept)))
    return found
