"""STDiT, the network of Open-Sora 1.0: attention within frames and along time in every block, for videos of one size.

Positions are sinusoids for `input_size`; the temporal ones are only added in the first block. Attention along time is
not modulated, and shares the gate of attention within frames.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from mindspore import Parameter, Tensor, mint, nn

from mg.diffusion.networks.blocks import (
    Attention,
    CaptionEmbedder,
    Gate,
    Mlp,
    ModulatedNorm,
    MultiHeadCrossAttention,
    PatchEmbed3D,
    Sum,
    T2IFinalLayer,
    TimestepEmbedder,
    along_time,
    hidden_tokens,
    modulation_block,
    modulations,
    of_frames,
    scale_shift_table,
    unpatchify,
    within_frames,
)
from mg.diffusion.networks.denoiser import SizedDenoiser, STDiTConfig
from mg.diffusion.networks.positions import frame_embedding, grid_embedding


@dataclass(frozen=True, eq=False)
class STDiT1Config(STDiTConfig):
    """Config of STDiT.

    Attributes:
        space_scale, time_scale: what positions of rows and columns, and of frames, are divided by.
    """

    sized: ClassVar[bool] = True

    input_size: list[int] | None = field(default_factory=lambda: [16, 32, 32])
    space_scale: float = 1.0
    time_scale: float = 1.0


class STDiTBlock(nn.Cell):
    """Attention within frames, along time and to the caption, and an MLP. Tokens (B, T, S, C) -> the same"""

    def __init__(self, config: STDiT1Config):
        super().__init__()
        channels, heads, flash = config.hidden_size, config.num_heads, config.enable_flash_attn
        self.scale_shift_table = scale_shift_table(6, channels)
        self.norm1 = ModulatedNorm(channels)
        self.attn = Attention(channels, heads, flash=flash)
        self.attn_temp = Attention(channels, heads, flash=flash, proj_init="zeros")
        self.cross_attn = MultiHeadCrossAttention(channels, heads, flash, proj_init="zeros")
        self.norm2 = ModulatedNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)
        self.gate, self.sum = Gate(), Sum()

    def construct(self, x, y, t, t_generated, hidden=None, pos_embed_temporal=None, patches=None):
        """y: the caption (B, L, C); t: six modulations of each frame (B, 1 or T, 1, 6 * C); t_generated: those of
        generated frames (B, 1, 1, 6 * C), whose gate all frames use along time."""
        table = self.scale_shift_table.expand_dims(0)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulations(table, t)
        x = x + self.gate(gate, within_frames(self.attn, self.norm1(x, shift, scale), patches))
        h = x if pos_embed_temporal is None else self.sum(x, pos_embed_temporal)
        x = x + self.gate(modulations(table, t_generated)[2], along_time(self.attn_temp, h))
        x = x + self.cross_attn(x, y, hidden)
        return x + self.gate(gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class STDiT(SizedDenoiser):
    """STDiT. For its arguments see `mg.diffusion.networks.create_denoiser`."""

    name = "stdit"
    config: STDiT1Config
    default_config = STDiT1Config()
    new_to_older = (r"\.attn_temp\.",)
    settings = ("pos_embed", "pos_embed_temporal")

    @classmethod
    def positions(cls, config):
        (t, h, w), channels = cls.grid(config), config.hidden_size
        return {
            "pos_embed": grid_embedding(h, w, channels, config.space_scale),
            "pos_embed_temporal": frame_embedding(t, channels, config.time_scale),
        }

    def build(self) -> None:
        config = self.config
        channels = config.hidden_size
        positions = {name: Tensor(array) for name, array in self.positions(config).items()}
        self.pos_embed = Parameter(positions["pos_embed"], requires_grad=False)  # (1, S, C)
        self.pos_embed_temporal = Parameter(positions["pos_embed_temporal"], requires_grad=False)  # (1, T, C)
        self.x_embedder = PatchEmbed3D(self.patch_size, config.in_channels, channels)
        self.t_embedder = TimestepEmbedder(channels)
        self.t_block = modulation_block(channels, 6)
        self.y_embedder = CaptionEmbedder(config.caption_channels, channels, config.model_max_length)
        self.blocks = nn.CellList([STDiTBlock(config) for _ in range(config.depth)])
        self.final_layer = T2IFinalLayer(channels, self.patch_values, config.norm_given_twice, "zeros")
        self.sum = Sum()

    def attentions_within_frames(self):
        return [block.attn for block in self.blocks]

    def construct(self, x, t, y, mask=None, x_mask=None):
        size = x.shape[2:]
        x = self.x_embedder(x)  # (B, T, H, W, C)
        grid = x.shape[1:4]
        patches = grid[1] * grid[2]
        x = self.sum(x.reshape(x.shape[0], grid[0], patches, x.shape[4]), self.pos_embed.expand_dims(0))
        x = self.tokens.own(x)  # (B, T, S, C)

        t, t0 = self.t_embedder(t), self.t_embedder(mint.zeros(t.shape))
        t_generated = of_frames(None, self.t_block(t), None)
        t_mlp = of_frames(x_mask, self.t_block(t), self.t_block(t0))

        y = self.y_embedder(y.squeeze(1))  # (B, L, C)
        hidden = None if mask is None else hidden_tokens(mask)
        pos_embed_temporal = self.pos_embed_temporal.expand_dims(2)  # (1, T, 1, C)
        for block in self.blocks:
            x = block(x, y, t_mlp, t_generated, hidden, pos_embed_temporal, patches)
            pos_embed_temporal = None
        x = self.tokens.whole(self.final_layer(x, t, t0, x_mask), patches)
        return unpatchify(x, grid, self.patch_size, size)
