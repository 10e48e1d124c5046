"""Movie Gen's temporal autoencoder, TAE (arXiv 2410.13720, section 3.1.1): 8x8x8 compression, 16 channels.

An SD3.5 image VAE inflated in time: every 2-D convolution is followed by a 1-D one over the frames, every spatial
attention by a temporal one. `mg-inflate` makes its initial weights from the image VAE's. Parameters have the names and
shapes of mindone's checkpoints, which load directly.

    tae = TemporalAutoencoder(pretrained="tae.ckpt", use_tile=False)
    z, mean, logvar = tae.encode(x)              # x (B, 3, T, H, W) in [-1, 1] -> (B, 16, ceil(T/8), H/8, W/8)
    x = tae.decode(z)                            # all frames, 8 per latent frame
    x = tae.decode(z, num_target_frames=1)       # an image: spurious frames dropped
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops

from mg.checkpoints import StateDict
from mg.models.autoencoder import VideoAutoencoder
from mg.models.layers.conv import FactorizedConv
from mg.models.layers.resnet import ResnetBlock, ResnetDecoder, ResnetEncoder
from mg.models.stored import Format, described_here
from mg.models.tae.linear_start import linear_start
from mg.models.tae.weights import expected_shapes, from_mindone, own_part

TAE_CONFIG = {
    "double_z": True,
    "z_channels": 16,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
    "attn_type": "vanilla",
    "temporal_downsample_level": [0, 1, 2],
    "temporal_upsample_level": [3, 2, 1],
}


class TemporalAutoencoder(VideoAutoencoder):
    """The TAE. It accepts any T, H and W: clips are padded by repeating their edges, and cropped back.

    Args:
        config: overrides of TAE_CONFIG; also `temporal_upsample_padding`, "replicate" as in the paper or "zeros" as
            in mindone's weights, and `norm_num_groups`, the norms' groups (32).
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
    default_config = {**TAE_CONFIG, "temporal_upsample_padding": "replicate", "norm_num_groups": 32}
    recomputed = (ResnetBlock,)
    formats = {"mindone": Format("mindone", "model.ckpt", lambda state, config: dict(state), described_here("tae"))}

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
        _check(config)
        widths = [config["ch"] * multiplier for multiplier in config["ch_mult"]]
        self.latent_channels = config["z_channels"]
        self.spatial_compression = 2 ** (len(widths) - 1)
        self.temporal_compression = 2 ** len(config["temporal_downsample_level"])

        shared = {
            "widths": widths,
            "num_res_blocks": config["num_res_blocks"],
            "groups": config["norm_num_groups"],
            "temporal": True,
            "temporal_attention": config["attn_type"] == "vanilla",
        }
        self.encoder = ResnetEncoder(
            config["in_channels"],
            2 * self.latent_channels,
            temporal_levels=tuple(config["temporal_downsample_level"]),
            **shared,
        )
        if config["use_quant_conv"]:
            self.quant_conv = FactorizedConv(2 * self.latent_channels, 2 * self.latent_channels, 1)
        if config["use_post_quant_conv"]:
            self.post_quant_conv = FactorizedConv(self.latent_channels, self.latent_channels, 1)
        self.decoder = ResnetDecoder(
            self.latent_channels,
            config["out_ch"],
            temporal_levels=tuple(config["temporal_upsample_level"]),
            temporal_padding=config["temporal_upsample_padding"],
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

    def start_linear(self, clips: Sequence[np.ndarray]) -> None:
        """Fit the straight path of an untrained TAE to clips, see `mg.models.tae.linear_start`.

        Args:
            clips: (3, T, H, W) in [-1, 1], T, H and W multiples of the compression; a few dozen are enough.

        Raises:
            ValueError: a config whose straight path is not supported, or clips too few or too uniform to fit.
        """
        parameters = dict(self.named_weights())
        state = {name: parameter.asnumpy() for name, parameter in parameters.items()}
        for name, value in linear_start(state, self.config, clips).items():
            parameters[name].set_data(Tensor(value))

    @staticmethod
    def translate_weights(state: Mapping, config: dict) -> dict:
        found, report = from_mindone(state)
        return found | {name: state[name] for name in report.unexpected}

    @staticmethod
    def own_part(state: Mapping) -> dict:
        return own_part(state)

    @staticmethod
    def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
        return expected_shapes(config)

    def encode_moments(self, x):
        moments = self.encoder(self.enter(x))
        return self.leave(self.quant_conv(moments) if self.config["use_quant_conv"] else moments)

    def before_decoder(self, z):
        return self.post_quant_conv(z) if self.config["use_post_quant_conv"] else z

    def decode_latents(self, z, still=False):
        return self._all_frames(super().decode_latents(z, still), z.shape[2] * self.temporal_compression)

    def picture(self, h, shape):
        return self._all_frames(super().picture(h, shape), shape[2])

    def _all_frames(self, x, frames):
        """Repeat the only frame: the decoder returns one if all frames of a single latent frame are the same."""
        return ops.cat((x,) * frames, axis=2) if frames > 1 and x.shape[2] == 1 else x


def _check(config: dict) -> None:
    levels = len(config["ch_mult"])
    down, up = config["temporal_downsample_level"], config["temporal_upsample_level"]
    rules = {
        "double_z must be True: the TAE has a posterior": config["double_z"],
        "attn_resolutions must be []: only the middle has attention": not config["attn_resolutions"],
        "dropout must be 0": config["dropout"] == 0,
        "attn_type must be vanilla or spat_only": config["attn_type"] in ("vanilla", "spat_only"),
        f"temporal_downsample_level must be within 0..{levels - 1}": set(down) <= set(range(levels)),
        f"temporal_upsample_level must be within 0..{levels - 1}": set(up) <= set(range(levels)),
        "temporal_downsample_level and temporal_upsample_level must match in length": len(set(down)) == len(set(up)),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"TAE config: {rule}")
