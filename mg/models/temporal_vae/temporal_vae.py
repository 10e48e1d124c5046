"""The video VAE of Open-Sora 1.2: SDXL's image VAE frame by frame, then a causal temporal VAE. 4x8x8, 4 channels.

The spatial half is a `mg.models.image_vae`; the temporal half follows MAGVIT-v2 (arXiv 2310.05737). The defaults are
the released checkpoint's, OpenSora-VAE-v1.2.

    vae = create_model("temporal_vae", pretrained="OpenSora-VAE-v1.2/model.safetensors")
    z, mean, logvar = vae.encode(x)                    # x (B, 3, T, H, W) in [-1, 1] -> (B, 4, t, H/8, W/8)
    y = vae.decode(z, num_target_frames=x.shape[2])    # or vae(x)
    flat = vae.spatial_vae(x)                          # reconstruction by the spatial half only

Time is cut into independent chunks of `micro_frame_size` frames, 17, which become 5 latent frames each; the remainder
of a clip shrinks to a quarter, rounded up. A chunk is padded to a multiple of 4 by zeros before its first frame, in the
spatial latents, which are cropped after decoding. So decoding needs to know the number of frames: by default it returns
as many as the latents can represent, 17 for 5 latent frames and 4 for a single one, an image's. Within a chunk the
convolutions are causal, but the norms see all of it.

Latents are scaled to (z - shift) / scale, per channel, as Open-Sora's diffusion models expect; `decode` undoes it, and
the training step's `latents` skips it. The first half's latents are its posterior's mean times
`spatial_scaling_factor`: Open-Sora samples them from the posterior, whose deviation is small compared with theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mg.checkpoints import StateDict
from mg.codec import Codec, Geometry, TwoStageCodec
from mg.models import naming
from mg.models.autoencoder import VideoAutoencoder, on_host
from mg.models.config import StoredConfig, are_positive, is_above_0
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.image_vae.weights import SPELLINGS
from mg.models.layers.layout import narrow, split
from mg.models.layers.resnet import ResnetBlock
from mg.models.stored import Format
from mg.models.temporal_vae.blocks import TemporalVAE
from mg.models.temporal_vae.linear_start import linear_start
from mg.models.temporal_vae.weights import (
    ORIGINAL,
    buffers_of,
    config_from_open_sora,
    config_tensors,
    config_to_open_sora,
    open_sora_rules,
    spatial_config,
)
from mg.models.trainable import sample
from mg.tiling import TilingConfig, chunk_bounds


@dataclass(frozen=True, eq=False)
class TemporalVAEConfig(StoredConfig):
    """Config of the Open-Sora 1.2 VAE.

    Attributes:
        in_channels: of a frame.
        spatial_block_out_channels: channels of the spatial half's levels, finest first.
        spatial_layers_per_block: its residual blocks per level; the decoder has one more.
        spatial_latent_channels: of its latents.
        spatial_scaling_factor: what its latents are multiplied by for the temporal half.
        latent_channels: of z.
        filters, channel_multipliers: channels of the temporal half's levels: filters times a multiplier.
        num_res_blocks: its residual blocks per level.
        temporal_downsample: after which of its levels but the last the frame rate is halved.
        norm_num_groups: the norms' groups in both halves.
        micro_frame_size: frames per chunk; None for whole clips.
        micro_batch_size: frames that the spatial half sees at once; None for all.
        shift, scale: z is (z - shift) / scale; one number, or one per channel.
    """

    in_channels: int = 3
    spatial_block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    spatial_layers_per_block: int = 2
    spatial_latent_channels: int = 4
    spatial_scaling_factor: float = 0.18215
    latent_channels: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 4])
    temporal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])
    norm_num_groups: int = 32
    micro_frame_size: int | None = 17
    micro_batch_size: int | None = 4
    shift: float | list[float] = field(default_factory=lambda: [-0.10, 0.34, 0.27, 0.98])
    scale: float | list[float] = field(default_factory=lambda: [3.85, 2.32, 2.33, 3.06])

    def __post_init__(self):
        self.check_positive("in_channels", "spatial_layers_per_block", "spatial_latent_channels", "latent_channels")
        self.check_positive("filters", "num_res_blocks", "norm_num_groups")
        self.check_positive(*(key for key in ("micro_frame_size", "micro_batch_size") if self[key] is not None))
        widths, multipliers, halves = (
            self.spatial_block_out_channels,
            self.channel_multipliers,
            self.temporal_downsample,
        )
        multiples = are_positive(widths) and not any(width % widths[0] for width in widths)
        self.check("spatial_block_out_channels", multiples, "whole numbers above 0, multiples of the first")
        self.check("channel_multipliers", are_positive(multipliers), "whole numbers above 0")
        fit = len(halves) == len(multipliers) - 1 and all(type(value) is bool for value in halves)
        values = f"{len(multipliers) - 1} values, each true or false: one fewer than channel_multipliers"
        self.check("temporal_downsample", fit, values)
        for key in ("shift", "scale"):
            numbers = np.ravel(self[key])
            fit = numbers.dtype.kind in "iuf" and len(numbers) in (1, self.latent_channels)
            self.check(key, fit, f"a number, or {self.latent_channels}")
        for key in ("scale", "spatial_scaling_factor"):
            self.check(key, is_above_0(self[key]), "above 0")


TEMPORAL_VAE_CONFIG = TemporalVAEConfig()


class OpenSoraVAE(VideoAutoencoder):
    """The spatial VAE followed by the temporal VAE.

    Args:
        config: overrides of `TemporalVAEConfig`.
        pretrained: file or folder of weights in any format that `mg.checkpoints` reads. A config stored next to
            them becomes the default.
        use_recompute: use gradient checkpointing.
        sample_deterministic: `encode` returns the posterior's mean as z.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and matrix products; parameters and norms stay fp32.

    Raises:
        ValueError: a config that cannot be built.
        CheckpointError: weights that cannot be read or do not fit.
    """

    name = "temporal_vae"
    config: TemporalVAEConfig
    default_config = TEMPORAL_VAE_CONFIG
    shallow = {
        "spatial_block_out_channels": [128, 256],
        "spatial_layers_per_block": 1,
        "channel_multipliers": [1, 2],
        "temporal_downsample": [True],
        "num_res_blocks": 1,
    }
    scaling = "encode gives (z - shift) / scale, per channel; decode undoes it"
    applies_scaling = True
    two_stages = True
    starts_linear = True
    recomputed = (ResnetBlock,)
    originals = (ORIGINAL,)
    formats = {
        "open_sora": Format(
            f"Open-Sora 1.2's {ORIGINAL}",
            "model.safetensors",
            lambda config: config_to_open_sora(config, TEMPORAL_VAE_CONFIG),
            open_sora_rules,
            attention_axes=2,
            tensors=config_tensors,
        ),
    }
    spellings = ((r"^spatial_vae\.module\.", "spatial_vae."), *SPELLINGS)
    parts = {"image_vae": spatial_config}
    default_tiling = TilingConfig(
        encode_tile=0, encode_overlap=0, decode_tile=0, decode_overlap=0, spatial_tile=256, last="short"
    )

    def __init__(
        self,
        config: dict | None = None,
        pretrained: str | Path | StateDict | None = None,
        use_recompute: bool = False,
        sample_deterministic: bool = False,
        dtype: str = "fp32",
    ):
        super().__init__(config, sample_deterministic, pretrained)
        config = self.config
        self.geometry = Geometry(
            config.in_channels,
            config.latent_channels,
            spatial=2 ** (len(config.spatial_block_out_channels) - 1),
            temporal=2 ** sum(config.temporal_downsample),
            chunk=config.micro_frame_size,
        )
        self.factor, self.between = config.spatial_scaling_factor, config.spatial_latent_channels
        self.spatial_vae = ImageAutoencoder(spatial_config(config))
        self.spatial_vae.micro_batch_size = config.micro_batch_size
        self.temporal_vae = TemporalVAE(
            config.spatial_latent_channels,
            config.latent_channels,
            [config.filters * multiplier for multiplier in config.channel_multipliers],
            config.temporal_downsample,
            config.num_res_blocks,
            config.norm_num_groups,
        )
        self.finish(dtype, use_recompute, pretrained)

    @staticmethod
    def is_original_config(config: Mapping) -> bool:
        return "vae_2d" in config or "vae_temporal" in config or config.get("model_type") == ORIGINAL

    @classmethod
    def translate_config(cls, config: Mapping) -> dict:
        return config_from_open_sora(config) if cls.is_original_config(config) else dict(config)

    @classmethod
    def config_in_weights(cls, state: Mapping) -> dict:
        return buffers_of(naming.own_part(state, ("spatial_vae", "temporal_vae")))

    # The interface.

    @property
    def codec(self) -> TwoStageCodec:
        spatial = self.spatial_vae
        frames = Codec(
            replace(spatial.geometry, latent_channels=self.between, has_posterior=False),
            on_host(self.encode_frames),
            on_host(self.decode_frames),
            spatial.tiling,
        )
        encoder, decoder = on_host(self.temporal_vae.encode), on_host(self.temporal_vae.decode)
        shift, scale = self.config.shift, self.config.scale
        return TwoStageCodec(self.geometry, frames, encoder, decoder, self.tiling, shift, scale)

    def unscaled(self, z):
        return self.codec.unscaled(z)

    def scaling_for(self, mean, std, means, stds):
        return {"shift": means, "scale": stds}

    def linear_start(self, state, clips):
        """Fits the temporal half to the spatial half's latents."""
        part = "temporal_vae."
        temporal = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        latents = [self.encode_frames(Tensor(clip[None])).asnumpy()[0] for clip in clips]
        return {part + name: value for name, value in linear_start(temporal, self.config, latents).items()}

    def latents(self, x, noise=None, valid=None, detached=False):
        """Everything before the pixel decoder.

        Args:
            valid: the mask that `align_frames` returned with x.
            detached: stop the gradient before the first stage.
        """
        x_z = self.spatial_latents(x)
        if detached:
            x_z = ops.stop_gradient(x_z)
        if valid is not None:
            x_z = x_z * valid.reshape(1, 1, -1, 1, 1)
        mean, logvar = self.temporal_posterior(x_z)
        z = mean if noise is None else sample(mean, logvar, noise)
        return {"code": self.code(z, x.shape[2]), "z": z, "mean": mean, "logvar": logvar, "target": x_z}

    def posterior(self, x):
        return self.temporal_posterior(self.spatial_latents(x))

    def features(self, code, frames):
        return self.spatial_vae.features(code / self.factor, frames)

    def picture(self, h, shape):
        return self.spatial_vae.picture(h, shape)

    def pixels(self, code, frames):
        """Latents of the spatial half (B, 4, T, h, w) -> (B, 3, T, H, W)"""
        return self.spatial_vae.pixels(code / self.factor, frames)

    @property
    def decoder(self):
        return self.spatial_vae.decoder

    # The two halves.

    def encode_frames(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), H and W multiples of 8 -> the spatial half's latents (B, 4, T, H/8, W/8), scaled"""
        mean = self.spatial_vae.encode_moments(x)[:, : self.between]
        return mean.astype(ms.float32) * self.factor

    def decode_frames(self, x_z: Tensor, still: bool = False) -> Tensor:
        """The reverse: (B, 4, T, h, w) -> (B, 3, T, 8 h, 8 w)"""
        return self.spatial_vae.decode_latents(x_z / self.factor)

    def spatial_latents(self, x: Tensor) -> Tensor:
        """`encode_frames` of frames of any size"""
        return self.spatial_vae.posterior(x)[0] * self.factor

    def temporal_posterior(self, x_z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 4, T, h, w) -> mean and log-variance of the latents, (B, z, t, h, w) each, of all chunks"""
        moments = []
        for chunk in _chunks(x_z, self.geometry.chunk):
            b, c, frames, h, w = chunk.shape
            front = -frames % self.geometry.temporal
            if front:
                chunk = ops.cat((ops.zeros((b, c, front, h, w), chunk.dtype), chunk), axis=2)
            moments.append(self.temporal_vae.encode(chunk))
        return self.split_moments(_in_a_row(moments))

    def code(self, z: Tensor, frames: int | None) -> Tensor:
        """The decoder's input: (B, z, t, h, w) -> latents of the spatial half (B, 4, T, h, w), `frames` of them if that
        fits t, else as many as the latents can represent."""
        chunks = []
        kept = self.geometry.kept_frames(z.shape[2], frames)
        for chunk, number in zip(_chunks(z, self.geometry.latent_chunk), kept):
            decoded = self.temporal_vae.decode(chunk).astype(ms.float32)
            chunks.append(narrow(decoded, 2, decoded.shape[2] - number, number))
        return _in_a_row(chunks)

    def align_frames(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pad a clip (B, 3, T, H, W) to one of a few lengths, so that clips of any length need few compiled graphs.

        Returns:
            A clip for which `latents` returns the same, and which of its frames are x's: (T',) of 1 or 0.
        """
        frames = x.shape[2]
        start = frames - frames % (self.geometry.chunk or frames + 1)  # of the last chunk, if it isn't full
        front = -(frames - start) % self.geometry.temporal
        aligned = np.concatenate([x[:, :, :start], *[x[:, :, start : start + 1]] * front, x[:, :, start:]], axis=2)
        valid = np.ones(frames + front, np.float32)
        valid[start : start + front] = 0
        return aligned, valid

    # Tiles.

    def enable_tiling(self, **settings) -> None:
        """Work in spatial tiles from now on, in both halves. Time is always cut into chunks.

        Args:
            settings: fields of `mg.tiling.TilingConfig` that override `default_tiling`: spatial_tile, spatial_overlap
                and last.

        Raises:
            ValueError: tiles along time, or sizes that aren't multiples of the compression.
        """
        tiling = replace(self.default_tiling, **settings)
        for key in ("encode_tile", "decode_tile"):
            if getattr(tiling, key):
                raise ValueError(
                    f"{key} is {getattr(tiling, key)}; it must be 0: {self.name} already cuts time into chunks of the "
                    "config's micro_frame_size"
                )
        super().enable_tiling(**settings)
        self.spatial_vae.enable_tiling(**vars(tiling))

    def disable_tiling(self) -> None:
        super().disable_tiling()
        self.spatial_vae.disable_tiling()


def _chunks(x: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Cut along time, see `chunk_bounds`."""
    return split(x, tuple(stop - start for start, stop in chunk_bounds(x.shape[2], size)), 2)


def _in_a_row(chunks: list[Tensor]) -> Tensor:
    """Join along time; a single chunk is returned as is, since MindSpore 2.10 warns about the gradient of its cat."""
    return ops.cat(chunks, axis=2) if len(chunks) > 1 else chunks[0]
