"""Video DC-AE of Open-Sora 2.0 (arXiv 2503.09642): 4x32x32 compression, 128 channels, no posterior, not causal.

A deep-compression autoencoder (DC-AE, arXiv 2410.10733) in space and time. The defaults are the released checkpoint's,
F32T4C128_AE.safetensors (dc-ae-f32t4c128).

    dc_ae = create_model("dc_ae", pretrained="F32T4C128_AE.safetensors", scaling_factor=0.493)
    dc_ae.enable_tiling()                  # tiles of 256 pixels and 32 frames, overlapping by a quarter
    z, _, _ = dc_ae.encode(x)              # x (B, 3, T, H, W) in [-1, 1] -> (B, 128, ceil(T/4), H/32, W/32)
    y = dc_ae.decode(z, num_target_frames=x.shape[2])

Any T, H and W is accepted: clips are padded to multiples of 4 and 32 by repeating the edges, and cropped back. The
original rejects such clips, decodes 2 to 4 frames to one, and in tiles loses frames at some lengths, e.g. 3 of 52. A
single frame is an image and skips all layers that change the frame rate, so latents of t = 1 decode to one frame unless
`num_target_frames` requests more.

`scaling_factor` is the standard deviation of the latents: encode divides by it and decode multiplies, so that a
diffusion model sees about unit variance. None leaves latents unscaled; `mg-latent-statistics` measures it.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from mindspore import nn, ops

from mg.checkpoints import StateDict
from mg.codec import Geometry
from mg.models.autoencoder import VideoAutoencoder
from mg.models.config import StoredConfig, are_positive, is_above_0
from mg.models.dc_ae.blocks import (
    HEAD,
    Downsample,
    EfficientViTBlock,
    ResBlock,
    Upsample,
)
from mg.models.dc_ae.linear_start import linear_start
from mg.models.dc_ae.weights import open_sora_rules
from mg.models.layers.conv import Conv3d
from mg.models.layers.norm import RMSNorm
from mg.models.layers.shortcuts import AverageChannels, RepeatChannels
from mg.models.stored import Format, described_here
from mg.tiling import TilingConfig

# For each stage, finest first: its blocks, and whether its resampling changes the frame rate.
BLOCKS = (ResBlock,) * 3 + (EfficientViTBlock,) * 3
TEMPORAL = (False, False, False, True, True, False)


@dataclass(frozen=True, eq=False)
class DCAEConfig(StoredConfig):
    """Config of Video DC-AE.

    Attributes:
        in_channels: of a frame.
        latent_channels: of z.
        encoder_width_list, decoder_width_list: channels of the six stages, finest first.
        encoder_depth_list, decoder_depth_list: their blocks.
        scaling_factor: what latents are divided by; None leaves them unscaled.
    """

    in_channels: int = 3
    latent_channels: int = 128
    encoder_width_list: list[int] = field(default_factory=lambda: [128, 256, 512, 512, 1024, 1024])
    encoder_depth_list: list[int] = field(default_factory=lambda: [2, 2, 2, 3, 3, 3])
    decoder_width_list: list[int] = field(default_factory=lambda: [128, 256, 512, 512, 1024, 1024])
    decoder_depth_list: list[int] = field(default_factory=lambda: [3, 3, 3, 3, 3, 3])
    scaling_factor: float | None = None

    def __post_init__(self):
        self.check_positive("in_channels", "latent_channels")
        for part in ("encoder", "decoder"):
            key, count = f"{part}_width_list", len(BLOCKS)
            widths = self[key]
            for each in (key, f"{part}_depth_list"):
                self.check(each, are_positive(self[each], count), f"{count} whole numbers above 0")
            attending = [width for width, block in zip(widths, BLOCKS) if block is EfficientViTBlock]
            self.check(
                key,
                not any(width % HEAD for width in attending),
                f"six whole numbers, and the last three must be multiples of {HEAD}",
            )
            for width, coarser in itertools.pairwise(widths):
                # The shortcuts turn 4 pixels of an image into channels.
                self.check(
                    key, 4 * width % coarser == 0, f"six whole numbers, and 4 * {width} must be a multiple of {coarser}"
                )
            if widths[-1] % self.latent_channels:
                raise ValueError(
                    f"latent_channels is {self.latent_channels}; {key} ends in {widths[-1]}, which must be a multiple "
                    "of it"
                )
        factor = self.scaling_factor
        self.check("scaling_factor", factor is None or is_above_0(factor), "a number above 0, or null")


DC_AE_CONFIG = DCAEConfig()


class EncoderStage(nn.Cell):
    """Blocks, then downsampling to the next stage's width; the last stage has none."""

    def __init__(self, stage: int, widths: list[int], depth: int):
        super().__init__()
        width = widths[stage]
        self.blocks = nn.SequentialCell([BLOCKS[stage](width) for _ in range(depth)])
        self.shrinks = stage < len(widths) - 1
        if self.shrinks:
            self.downsample = Downsample(width, widths[stage + 1], TEMPORAL[stage])

    def construct(self, x):
        x = self.blocks(x)
        return self.downsample(x) if self.shrinks else x


class DecoderStage(nn.Cell):
    """Upsampling from the previous (next coarser) stage, then blocks; the coarsest stage has no upsampling."""

    def __init__(self, stage: int, widths: list[int], depth: int):
        super().__init__()
        width = widths[stage]
        self.grows = stage < len(widths) - 1
        if self.grows:
            self.upsample = Upsample(widths[stage + 1], width, TEMPORAL[stage])
        self.blocks = nn.SequentialCell([BLOCKS[stage](width) for _ in range(depth)])

    def construct(self, x, still):
        if self.grows:
            x = self.upsample(x, still)
        return self.blocks(x)


class StagedEncoder(nn.Cell):
    """(B, Cin, T, H, W), T = 1 or a multiple of 4, H and W of 32 -> (B, z, T/4 or 1, H/32, W/32)"""

    def __init__(self, in_channels: int, latent_channels: int, widths: list[int], depths: list[int]):
        super().__init__()
        self.project_in = Conv3d(in_channels, widths[0])
        self.stages = nn.SequentialCell([EncoderStage(i, widths, depth) for i, depth in enumerate(depths)])
        self.project_out = Conv3d(widths[-1], latent_channels)
        self.average = AverageChannels(latent_channels)

    def construct(self, x):
        x = self.stages(self.project_in(x))
        return self.project_out(x) + self.average(x)


class StagedDecoder(nn.Cell):
    """(B, z, t, h, w) -> (B, Cout, 4t or t, 32h, 32w)"""

    def __init__(self, latent_channels: int, out_channels: int, widths: list[int], depths: list[int]):
        super().__init__()
        self.project_in = Conv3d(latent_channels, widths[-1])
        self.repeat = RepeatChannels(widths[-1])
        self.stages = nn.CellList([DecoderStage(i, widths, depth) for i, depth in enumerate(depths)])
        self.num_stages = len(depths)
        self.norm_out = RMSNorm(widths[0])
        self.project_out = Conv3d(widths[0], out_channels)

    @property
    def last_conv(self) -> nn.Cell:
        return self.project_out

    def construct(self, z, still):
        return self.picture(self.features(z, still))

    def features(self, z, still):
        """Everything up to the input of the last convolution; `still`: z and the output are an image."""
        x = self.project_in(z) + self.repeat(z)
        for i in range(self.num_stages):
            x = self.stages[self.num_stages - 1 - i](x, still)  # the coarsest first
        return ops.relu(self.norm_out(x))

    def picture(self, x):
        """The last convolution."""
        return self.project_out(x)


class VideoDCAE(VideoAutoencoder):
    """Video DC-AE.

    Args:
        config: overrides of `DCAEConfig`.
        pretrained: file or folder of weights in any format that `mg.checkpoints` reads. A config stored next to
            them becomes the default.
        use_recompute: use gradient checkpointing.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and matrix products; parameters and norms stay fp32, as
            does the linear attention under fp16.

    Raises:
        ValueError: a config that cannot be built.
        CheckpointError: weights that cannot be read or do not fit.
    """

    name = "dc_ae"
    config: DCAEConfig
    default_config = DC_AE_CONFIG
    shallow = {"encoder_depth_list": [1] * len(BLOCKS), "decoder_depth_list": [1] * len(BLOCKS)}
    scaling = "encode divides latents by scaling_factor, decode multiplies them by it"
    applies_scaling = True
    starts_linear = True
    formats = {
        "open_sora": Format("Open-Sora 2.0", "model.safetensors", described_here("dc_ae"), open_sora_rules),
    }
    recomputed = (ResBlock, EfficientViTBlock, Downsample, Upsample)
    default_tiling = TilingConfig(
        encode_tile=32, encode_overlap=8, decode_tile=32, decode_overlap=8, spatial_tile=256, last="short"
    )

    def __init__(
        self,
        config: dict | None = None,
        pretrained: str | Path | StateDict | None = None,
        use_recompute: bool = False,
        dtype: str = "fp32",
    ):
        super().__init__(config, pretrained=pretrained)
        config = self.config
        channels, latents, temporal = config.in_channels, config.latent_channels, 2 ** sum(TEMPORAL)
        self.geometry = Geometry(
            channels,
            latents,
            spatial=2 ** (len(BLOCKS) - 1),
            temporal=temporal,
            frame_multiple=temporal,
            keeps_images=True,
            has_posterior=False,
        )
        self.scaling_factor = 1.0 if config.scaling_factor is None else config.scaling_factor
        self.encoder = StagedEncoder(channels, latents, config.encoder_width_list, config.encoder_depth_list)
        self.decoder = StagedDecoder(latents, channels, config.decoder_width_list, config.decoder_depth_list)
        self.finish(dtype, use_recompute, pretrained)

    def linear_start(self, state, clips):
        return linear_start(state, self.config, clips, TEMPORAL)

    def encode_moments(self, x):
        return super().encode_moments(x) * (1 / self.scaling_factor)

    def before_decoder(self, z):
        return self.unscaled(z)

    def unscaled(self, z):
        return z * self.scaling_factor

    def scaling_for(self, mean, std, means, stds):
        return {"scaling_factor": std}

    def decode_latents(self, z, still=False):
        return self.leave(self.decoder(self.before_decoder(self.enter(z)), still))

    def features(self, code, frames):
        still = self.geometry.is_still(code.shape[2], frames)
        return self.decoder.features(self.before_decoder(self.enter(code)), still)
