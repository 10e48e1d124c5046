"""DiT (arXiv 2212.09748) for videos of one size: attention over all tokens, conditioned on a class or a text vector.

The condition is added to the timestep, and every block computes its own modulation from the sum (adaLN-Zero).
"""

import re
from dataclasses import dataclass, field
from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn

from mg.diffusion.networks.blocks import (
    Attention,
    CaptionEmbedder,
    Gate,
    LabelEmbedder,
    Mlp,
    ModulatedNorm,
    PatchEmbed3D,
    Sum,
    TimestepEmbedder,
    modulation_block,
    of_frames,
    unpatchify,
    within_frames,
)
from mg.diffusion.networks.denoiser import DenoiserConfig, SizedDenoiser
from mg.diffusion.networks.positions import frame_embedding, grid_embedding
from mg.models.layers.linear import Linear


@dataclass(frozen=True, eq=False)
class DiTConfig(DenoiserConfig):
    """Config of the DiT.

    Attributes:
        model_max_length: tokens of the text, which becomes one vector.
        condition: text, or label_N for N classes.
        no_temporal_pos_emb: no positions of frames.
    """

    sized: ClassVar[bool] = True

    input_size: list[int] | None = field(default_factory=lambda: [16, 32, 32])
    caption_channels: int = 512
    model_max_length: int = 77
    condition: str = "text"
    no_temporal_pos_emb: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.condition != "text" and self.classes is None:
            raise ValueError(f"condition is {self.condition!r}; it must be text or label_N, for N classes")

    @property
    def classes(self) -> int | None:
        """The number of classes; None if the condition is text."""
        found = re.fullmatch(r"label_([1-9]\d*)", str(self.condition))
        return int(found[1]) if found else None


class DiTBlock(nn.Cell):
    """Attention and an MLP. Tokens (B, 1, T * S, C) and condition (B, C) -> tokens"""

    def __init__(self, config: DiTConfig):
        super().__init__()
        channels = config.hidden_size
        self.norm1 = ModulatedNorm(channels)
        self.attn = Attention(channels, config.num_heads, flash=config.enable_flash_attn)
        self.norm2 = ModulatedNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)
        self.adaLN_modulation = modulation_block(channels, 6, "zeros")
        self.gate = Gate()

    def construct(self, x, c):
        modulation = of_frames(None, self.adaLN_modulation(c), None)  # (B, 1, 1, 6 * C)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = mint.split(modulation, x.shape[3], 3)
        x = x + self.gate(gate, within_frames(self.attn, self.norm1(x, shift, scale)))
        return x + self.gate(gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Cell):
    """Tokens (B, 1, T * S, C) to patches, with its own modulation."""

    def __init__(self, channels: int, values: int):
        super().__init__()
        self.norm_final = ModulatedNorm(channels)
        self.linear = Linear(channels, values, "zeros")
        self.adaLN_modulation = modulation_block(channels, 2, "zeros")

    def construct(self, x, c):
        shift, scale = mint.split(of_frames(None, self.adaLN_modulation(c), None), x.shape[3], 3)
        return self.linear(self.norm_final(x, shift, scale))


class DiT(SizedDenoiser):
    """DiT. For its arguments see `mg.diffusion.networks.create_denoiser`.

    With `condition` "text", y is (B, 1, 1, D), the text as one vector; with "label_1000" it is (B,), integers from 0 to
    1000, where 1000 stands for no class. There are no masks.
    """

    name = "dit"
    config: DiTConfig
    default_config = DiTConfig()
    takes_frame_mask = False
    text_encoders = ("clip", "classes")
    new_to_older = (r"^y_embedder\.",)
    settings = ("pos_embed_spatial", "pos_embed_temporal")
    variants = ({"condition": "text"}, {"condition": "label_1"})

    @classmethod
    def positions(cls, config):
        (t, h, w), channels = cls.grid(config), config.hidden_size
        return {
            "pos_embed_spatial": grid_embedding(h, w, channels),
            "pos_embed_temporal": frame_embedding(t, channels),
        }

    @property
    def null_caption(self):
        """The vector for no text (1, D); with classes, the number that stands for none."""
        return super().null_caption if self.num_classes is None else np.array([self.num_classes])

    def build(self) -> None:
        config = self.config
        channels, self.num_classes = config.hidden_size, config.classes
        positions = {name: Tensor(array) for name, array in self.positions(config).items()}
        self.pos_embed_spatial = Parameter(positions["pos_embed_spatial"], requires_grad=False)  # (1, S, C)
        self.pos_embed_temporal = Parameter(positions["pos_embed_temporal"], requires_grad=False)  # (1, T, C)
        self.x_embedder = PatchEmbed3D(self.patch_size, config.in_channels, channels)
        if self.num_classes is None:
            self.y_embedder = CaptionEmbedder(config.caption_channels, channels, 1)
        else:
            self.y_embedder = LabelEmbedder(self.num_classes, channels)
        self.t_embedder = TimestepEmbedder(channels)
        self.blocks = nn.CellList([DiTBlock(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(channels, self.patch_values)
        self.labels, self.in_time = self.num_classes is not None, not config.no_temporal_pos_emb
        self.sum = Sum()

    def construct(self, x, t, y, mask=None, x_mask=None):
        size = x.shape[2:]
        x = self.x_embedder(x)  # (B, T, H, W, C)
        b, frames, rows, columns, channels = x.shape
        x = self.sum(x.reshape(b, frames, rows * columns, channels), self.pos_embed_spatial.expand_dims(0))
        if self.in_time:
            x = self.sum(x, self.pos_embed_temporal.expand_dims(2))
        x = x.reshape(b, 1, frames * rows * columns, channels)

        y = self.y_embedder(y) if self.labels else self.y_embedder(y.reshape(b, -1))  # (B, C)
        c = self.t_embedder(t) + y
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).reshape(b, frames, rows * columns, -1)
        return unpatchify(x, (frames, rows, columns), self.patch_size, size)

    def _caption(self, y, mask, samples):
        if mask is not None:
            raise ValueError("dit takes no caption mask: its condition is one text vector, or a class")
        if self.labels:
            if y.ndim != 1:
                raise ValueError(f"y has shape {tuple(y.shape)}; it must be (B,), one class per sample")
            return self._of_samples(y, samples, "y", ms.int32), None
        channels = self.config.caption_channels
        if tuple(y.shape[1:]) != (1, 1, channels):
            raise ValueError(f"y has shape {tuple(y.shape)}; it must be (B, 1, 1, {channels})")
        return self._of_samples(y, samples, "y", ms.float32), None
