"""STDiT2, the network of Open-Sora 1.1: attention within frames and along time in every block, for videos of any size.

Positions within frames come from `PositionEmbedding2D`, positions in time from rotation. Height, width and aspect ratio
modulate attention within frames and the MLP, the number of frames and the frame rate modulate attention along time.
"""

from dataclasses import dataclass
from typing import ClassVar

from mindspore import mint, nn

from mg.diffusion.networks.blocks import (
    Attention,
    CaptionEmbedder,
    Gate,
    Mlp,
    ModulatedNorm,
    MultiHeadCrossAttention,
    PatchEmbed3D,
    ScalarEmbedder,
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
from mg.diffusion.networks.denoiser import RotaryDenoiser, STDiTConfig
from mg.diffusion.networks.positions import PositionEmbedding2D, RotaryEmbedding
from mg.models.layers.layout import narrow


@dataclass(frozen=True, eq=False)
class STDiT2Config(STDiTConfig):
    """Config of STDiT2.

    Attributes:
        input_sq_size: side in pixels of the squares whose positions other sizes are scaled to.
        qk_norm, qk_norm_legacy: normalise queries and keys; the latter after the rotation, as Open-Sora 1.1.
    """

    width_factors: ClassVar[tuple[int, ...]] = (3, 4)

    model_max_length: int = 200
    input_sq_size: int = 512
    qk_norm: bool = True
    qk_norm_legacy: bool = True


class STDiT2Block(nn.Cell):
    """Attention within frames, along time and to the caption, and an MLP. Tokens (B, T, S, C) -> the same"""

    def __init__(self, config: STDiT2Config):
        super().__init__()
        channels, heads, flash = config.hidden_size, config.num_heads, config.enable_flash_attn
        norms = {"qk_norm": config.qk_norm, "qk_norm_legacy": config.qk_norm_legacy, "flash": flash}
        self.scale_shift_table = scale_shift_table(6, channels)
        self.scale_shift_table_temporal = scale_shift_table(3, channels)
        self.norm1 = ModulatedNorm(channels)
        self.attn = Attention(channels, heads, **norms)
        self.norm_temp = ModulatedNorm(channels)
        self.attn_temp = Attention(channels, heads, **norms, proj_init="zeros")
        self.cross_attn = MultiHeadCrossAttention(channels, heads, flash, proj_init="zeros")
        self.norm2 = ModulatedNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)
        self.gate = Gate()

    def construct(self, x, y, t_spatial, t_temporal, rope, hidden=None, patches=None):
        """y: the caption (B, L, C); t_spatial, t_temporal: six and three modulations, (B, 1 or T, 1, n * C)."""
        table, table_temporal = self.scale_shift_table.expand_dims(0), self.scale_shift_table_temporal.expand_dims(0)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulations(table, t_spatial)
        x = x + self.gate(gate, within_frames(self.attn, self.norm1(x, shift, scale), patches))
        shift, scale, gate = modulations(table_temporal, t_temporal)
        x = x + self.gate(gate, along_time(self.attn_temp, self.norm_temp(x, shift, scale), rope))
        x = x + self.cross_attn(x, y, hidden)
        return x + self.gate(gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class STDiT2(RotaryDenoiser):
    """STDiT2. For its arguments see `mg.diffusion.networks.create_denoiser`."""

    name = "stdit2"
    config: STDiT2Config
    default_config = STDiT2Config()
    extra_inputs = ("height", "width", "num_frames", "ar", "fps")
    originals = ("STDiT2",)
    new_to_older = (
        r"\.attn_temp\.",
        r"\.scale_shift_table_temporal$",
        r"\.[qk]_norm\.",
        *(rf"^{layer}\." for layer in ("t_block_temp", "csize_embedder", "ar_embedder", "fl_embedder", "fps_embedder")),
    )

    def build(self) -> None:
        config = self.config
        channels = config.hidden_size
        self.pos_embed = PositionEmbedding2D(channels, config.input_sq_size)
        self.sum = Sum()
        self.x_embedder = PatchEmbed3D(self.patch_size, config.in_channels, channels)
        self.t_embedder = TimestepEmbedder(channels)
        self.t_block = modulation_block(channels, 6)
        self.t_block_temp = modulation_block(channels, 3)
        self.y_embedder = CaptionEmbedder(config.caption_channels, channels, config.model_max_length)
        self.rope = RotaryEmbedding(channels // config.num_heads)
        self.blocks = nn.CellList([STDiT2Block(config) for _ in range(config.depth)])
        self.final_layer = T2IFinalLayer(channels, self.patch_values, config.norm_given_twice, "zeros")
        self.csize_embedder = ScalarEmbedder(channels // 3)
        self.ar_embedder = ScalarEmbedder(channels // 3)
        self.fl_embedder = ScalarEmbedder(channels)
        self.fps_embedder = ScalarEmbedder(channels)

    def attentions_within_frames(self):
        return [block.attn for block in self.blocks]

    def construct(self, x, t, y, mask=None, x_mask=None, height=None, width=None, num_frames=None, ar=None, fps=None):
        size = x.shape[2:]
        x = self.x_embedder(x)  # (B, T, H, W, C)
        grid = x.shape[1:4]
        pos_embed = self.pos_embed(narrow(height, 0, 0, 1), narrow(width, 0, 0, 1), grid[1], grid[2])
        patches = grid[1] * grid[2]
        x = self.sum(x.reshape(x.shape[0], grid[0], patches, x.shape[4]), pos_embed)
        x = self.tokens.own(x)  # (B, T, S, C)

        of_size = mint.cat((self.csize_embedder(height), self.csize_embedder(width), self.ar_embedder(ar)), dim=1)
        of_length = self.fl_embedder(num_frames) + self.fps_embedder(fps)
        t, t0 = self.t_embedder(t), self.t_embedder(mint.zeros(t.shape))
        of_size0 = t0 + of_size
        t_spatial = of_frames(x_mask, self.t_block(t + of_size), self.t_block(of_size0))
        t_temporal = of_frames(x_mask, self.t_block_temp(t + of_length), self.t_block_temp(t0 + of_length))

        y = self.y_embedder(y.squeeze(1))  # (B, L, C)
        hidden = None if mask is None else hidden_tokens(mask)
        rope = self.rope(grid[0])
        for block in self.blocks:
            x = block(x, y, t_spatial, t_temporal, rope, hidden, patches)
        # Here generated frames get no size, and given frames do: it was trained this way.
        x = self.tokens.whole(self.final_layer(x, t, of_size0, x_mask), patches)
        return unpatchify(x, grid, self.patch_size, size)
