"""STDiT3, the network of Open-Sora 1.2: alternating blocks within frames and along time, for videos of any size.

Positions within frames come from `PositionEmbedding2D`, positions in time from rotation; the frame rate is added to the
timestep.
"""

from dataclasses import dataclass

from mindspore import mint, nn
from mindspore.common.initializer import Normal

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
class STDiT3Config(STDiTConfig):
    """Config of STDiT3.

    Attributes:
        input_sq_size: side in pixels of the squares whose positions other sizes are scaled to.
        qk_norm, qk_norm_legacy: normalise queries and keys; the latter after the rotation, as Open-Sora 1.1.
    """

    model_max_length: int = 300
    input_sq_size: int = 512
    qk_norm: bool = True
    qk_norm_legacy: bool = False


class STDiT3Block(nn.Cell):
    """Self-attention, attention to the caption, and an MLP. Tokens (B, T, S, C) -> the same

    Args:
        temporal: attend along time instead of within frames. Such a block starts as the identity.
    """

    def __init__(self, config: STDiT3Config, temporal: bool):
        super().__init__()
        channels, heads, flash = config.hidden_size, config.num_heads, config.enable_flash_attn
        start = "zeros" if temporal else None
        self.temporal = temporal
        self.scale_shift_table = scale_shift_table(6, channels)
        self.norm1 = ModulatedNorm(channels)
        self.attn = Attention(channels, heads, config.qk_norm, config.qk_norm_legacy, flash, start)
        self.cross_attn = MultiHeadCrossAttention(channels, heads, flash, start)
        self.norm2 = ModulatedNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels, last_init=start)
        self.gate = Gate()

    def construct(self, x, y, t, rope, hidden=None, patches=None):
        """y: the caption (B, L, C); t: six modulations, (B, 1 or T, 1, 6 * C)."""
        table = self.scale_shift_table.expand_dims(0)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulations(table, t)
        h = self.norm1(x, shift, scale)
        h = along_time(self.attn, h, rope) if self.temporal else within_frames(self.attn, h, patches)
        x = x + self.gate(gate, h)
        x = x + self.cross_attn(x, y, hidden)
        return x + self.gate(gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class STDiT3(RotaryDenoiser):
    """STDiT3. For its arguments see `mg.diffusion.networks.create_denoiser`."""

    name = "stdit3"
    config: STDiT3Config
    default_config = STDiT3Config()
    extra_inputs = ("height", "width", "fps")
    originals = ("STDiT3",)
    new_to_older = (r"^temporal_blocks\.", r"\.[qk]_norm\.", r"^fps_embedder\.")
    blocks_of_older = "spatial_blocks."

    def build(self) -> None:
        config = self.config
        channels = config.hidden_size
        self.pos_embed = PositionEmbedding2D(channels, config.input_sq_size)
        self.sum = Sum()
        self.rope = RotaryEmbedding(channels // config.num_heads)
        self.x_embedder = PatchEmbed3D(self.patch_size, config.in_channels, channels)
        self.t_embedder = ScalarEmbedder(channels)
        self.fps_embedder = ScalarEmbedder(channels, first_init=Normal(0.02), last_init="zeros")
        self.t_block = modulation_block(channels, 6)
        self.y_embedder = CaptionEmbedder(config.caption_channels, channels, config.model_max_length)
        self.spatial_blocks = nn.CellList([STDiT3Block(config, False) for _ in range(config.depth)])
        self.temporal_blocks = nn.CellList([STDiT3Block(config, True) for _ in range(config.depth)])
        self.final_layer = T2IFinalLayer(channels, self.patch_values, config.norm_given_twice)

    def attentions_within_frames(self):
        return [block.attn for block in self.spatial_blocks]

    def construct(self, x, t, y, mask=None, x_mask=None, height=None, width=None, fps=None):
        size = x.shape[2:]
        x = self.x_embedder(x)  # (B, T, H, W, C)
        grid = x.shape[1:4]
        pos_embed = self.pos_embed(narrow(height, 0, 0, 1), narrow(width, 0, 0, 1), grid[1], grid[2])
        patches = grid[1] * grid[2]
        x = self.sum(x.reshape(x.shape[0], grid[0], patches, x.shape[4]), pos_embed)
        x = self.tokens.own(x)  # (B, T, S, C)

        fps = self.fps_embedder(fps)
        t, t0 = self.t_embedder(t) + fps, self.t_embedder(mint.zeros(t.shape)) + fps
        t_mlp = of_frames(x_mask, self.t_block(t), self.t_block(t0))

        y = self.y_embedder(y.squeeze(1))  # (B, L, C)
        hidden = None if mask is None else hidden_tokens(mask)
        rope = self.rope(grid[0])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = spatial(x, y, t_mlp, rope, hidden, patches)
            x = temporal(x, y, t_mlp, rope, hidden)
        x = self.tokens.whole(self.final_layer(x, t, t0, x_mask), patches)
        return unpatchify(x, grid, self.patch_size, size)
