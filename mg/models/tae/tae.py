"""Movie Gen's temporal autoencoder, TAE (arXiv 2410.13720, section 3.1.1): 8x8x8 compression, 16 channels.

An SD3.5 image VAE inflated in time: every 2-D convolution is followed by a 1-D one over the frames, every spatial
attention by a temporal one. `mg-inflate` makes its initial weights from the image VAE's. Parameters have the names and
shapes of mindone's checkpoints, which load directly.

    tae = TemporalAutoencoder(pretrained="tae.ckpt", use_tile=False)
    z, mean, logvar = tae.encode(x)              # x (B, 3, T, H, W) in [-1, 1] -> (B, 16, ceil(T/8), H/8, W/8)
    x = tae.decode(z)                            # all frames, 8 per latent frame
    x = tae.decode(z, num_target_frames=1)       # an image: spurious frames dropped
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspore import ops

from mg.checkpoints import StateDict
from mg.codec import Geometry
from mg.models.autoencoder import VideoAutoencoder
from mg.models.image_vae.image_vae import ImageVAEConfig
from mg.models.layers.conv import FactorizedConv
from mg.models.layers.resnet import ResnetBlock, ResnetDecoder, ResnetEncoder
from mg.models.stored import Format, described_here
from mg.models.tae.linear_start import linear_start


@dataclass(frozen=True, eq=False)
class TAEConfig(ImageVAEConfig):
    """Config of the TAE: that of the image VAE it is inflated from, and more of mindone's keys.

    Attributes:
        double_z, attn_resolutions, dropout: with one supported value each.
        resolution: of the images that the weights were trained on; not used.
        attn_type: vanilla, spatial and temporal attention in the middle, or spat_only.
        temporal_downsample_level, temporal_upsample_level: the levels after which the frame rate is halved or doubled.
        temporal_upsample_padding: replicate, as in the paper, or zeros, as in mindone's weights.
    """

    double_z: bool = True
    resolution: int = 256
    attn_resolutions: list[int] = field(default_factory=list)
    dropout: float = 0.0
    attn_type: str = "vanilla"
    temporal_downsample_level: list[int] = field(default_factory=lambda: [0, 1, 2])
    temporal_upsample_level: list[int] = field(default_factory=lambda: [3, 2, 1])
    temporal_upsample_padding: str = "replicate"

    def __post_init__(self):
        super().__post_init__()
        self.check("double_z", self.double_z, "True: the TAE has a posterior")
        self.check("attn_resolutions", not self.attn_resolutions, "[]: only the middle has attention")
        self.check("dropout", self.dropout == 0, "0")
        self.check("attn_type", self.attn_type in ("vanilla", "spat_only"), "vanilla or spat_only")
        levels, down, up = range(len(self.ch_mult)), self.temporal_downsample_level, self.temporal_upsample_level
        for key in ("temporal_downsample_level", "temporal_upsample_level"):
            self.check(key, set(self[key]) <= set(levels), f"within 0..{levels[-1]}")
        self.check("temporal_upsample_level", len(set(up)) == len(set(down)), "as long as temporal_downsample_level")


# The keys of mindone's TAE_CONFIG.
TAE_CONFIG = {
    key: value for key, value in TAEConfig().items() if key not in ("temporal_upsample_padding", "norm_num_groups")
}


class TemporalAutoencoder(VideoAutoencoder):
    """The TAE. It accepts any T, H and W: clips are padded by repeating their edges, and cropped back.

    Args:
        config: overrides of `TAEConfig`.
        pretrained: file or folder of weights in any format that `mg.checkpoints` reads. A config stored next to
            them becomes the default.
        use_recompute: use gradient checkpointing.
        sample_deterministic: `encode` returns the posterior's mean as z.
        use_tile: encode and decode long videos in tiles along time, see `enable_tiling`.
        encode_tile, encode_overlap, decode_tile, decode_overlap: frames per tile and per overlap, multiples of 8.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and matrix products; parameters stay fp32.

    Raises:
        ValueError: a config that cannot be built.
        CheckpointError: weights that cannot be read or do not fit.
    """

    name = "tae"
    config: TAEConfig
    default_config = TAEConfig()
    shallow = {"ch_mult": [1, 2], "num_res_blocks": 1, "temporal_downsample_level": [0], "temporal_upsample_level": [1]}
    starts_linear = True
    recomputed = (ResnetBlock,)
    formats = {"mindone": Format("mindone", "model.ckpt", described_here("tae"))}

    def __init__(
        self,
        config: dict | None = None,
        pretrained: str | Path | StateDict | None = None,
        use_recompute: bool = False,
        sample_deterministic: bool = False,
        use_tile: bool = False,
        encode_tile: int = 32,
        encode_overlap: int = 0,
        decode_tile: int = 32,
        decode_overlap: int = 16,
        dtype: str = "fp32",
    ):
        super().__init__(config, sample_deterministic, pretrained)
        config = self.config
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        latents, halvings = config.z_channels, len(config.temporal_downsample_level)
        self.geometry = Geometry(config.in_channels, latents, spatial=2 ** (len(widths) - 1), temporal=2**halvings)

        shared: dict[str, Any] = {
            "widths": widths,
            "num_res_blocks": config.num_res_blocks,
            "groups": config.norm_num_groups,
            "temporal": True,
            "temporal_attention": config.attn_type == "vanilla",
        }
        self.encoder = ResnetEncoder(
            config.in_channels,
            2 * latents,
            temporal_levels=tuple(config.temporal_downsample_level),
            **shared,
        )
        self.quantized, self.dequantized = config.use_quant_conv, config.use_post_quant_conv
        if self.quantized:
            self.quant_conv = FactorizedConv(2 * latents, 2 * latents, 1)
        if self.dequantized:
            self.post_quant_conv = FactorizedConv(latents, latents, 1)
        self.decoder = ResnetDecoder(
            latents,
            config.out_ch,
            temporal_levels=tuple(config.temporal_upsample_level),
            temporal_padding=config.temporal_upsample_padding,
            **shared,
        )
        self.finish(dtype, use_recompute, pretrained)
        if use_tile:
            self.enable_tiling(
                encode_tile=encode_tile,
                encode_overlap=encode_overlap,
                decode_tile=decode_tile,
                decode_overlap=decode_overlap,
            )

    def linear_start(self, state, clips):
        return linear_start(state, self.config, clips)

    @classmethod
    def own_part(cls, state: Mapping) -> dict:
        return {name: value for name, value in state.items() if ".temb_proj." not in name}  # in mindone's, but not used

    def encode_moments(self, x):
        moments = self.encoder(self.enter(x))
        return self.leave(self.quant_conv(moments) if self.quantized else moments)

    def before_decoder(self, z):
        return self.post_quant_conv(z) if self.dequantized else z

    def decode_latents(self, z, still=False):
        return self._all_frames(super().decode_latents(z, still), z.shape[2] * self.geometry.temporal)

    def picture(self, h, shape):
        return self._all_frames(super().picture(h, shape), shape[2])

    def _all_frames(self, x, frames):
        """Repeat the only frame: the decoder returns one if all frames of a single latent frame are the same."""
        return ops.cat((x,) * frames, axis=2) if frames > 1 and x.shape[2] == 1 else x
