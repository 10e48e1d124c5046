"""The image VAE of Stable Diffusion (latent diffusion, arXiv 2112.10752), frame by frame over a video.

The defaults are SD3.5's: 8x8 compression, 16 channels, no quant convolutions. A TAE is inflated from this model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, ops

from mg.checkpoints import StateDict
from mg.codec import Geometry
from mg.models.autoencoder import VideoAutoencoder
from mg.models.config import StoredConfig, are_positive
from mg.models.image_vae.weights import SPELLINGS, config_from_diffusers, config_to_diffusers
from mg.models.layers.conv import SpatialConv
from mg.models.layers.layout import narrow, repeat_edges, split, swap_frames
from mg.models.layers.resnet import ResnetBlock, ResnetDecoder, ResnetEncoder
from mg.models.naming import diffusers_rules
from mg.models.stored import Format, described_here
from mg.models.trainable import crop
from mg.tiling import TilingConfig


@dataclass(frozen=True, eq=False)
class ImageVAEConfig(StoredConfig):
    """Config of the image VAE, with latent diffusion's keys; the defaults are SD3.5's.

    Attributes:
        z_channels: of z.
        in_channels, out_ch: of an image.
        ch, ch_mult: channels of a level, finest first: ch times its multiplier.
        num_res_blocks: residual blocks of a level; the decoder has one more.
        norm_num_groups: the norms' groups.
        scaling_factor, shift_factor: for the caller, z = (z - shift_factor) * scaling_factor.
        use_quant_conv, use_post_quant_conv: a 1x1 convolution after the encoder, and before the decoder.
    """

    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    def __post_init__(self):
        self.check_positive("z_channels", "in_channels", "out_ch", "ch", "num_res_blocks", "norm_num_groups")
        self.check("ch_mult", are_positive(self.ch_mult), "whole numbers above 0")


IMAGE_VAE_CONFIG = ImageVAEConfig()


class ImageAutoencoder(VideoAutoencoder):
    """Encodes and decodes every frame independently: (B, 3, T, H, W) <-> (B, z, T, H/8, W/8).

    Set `micro_batch_size` to run at most this many frames at once and bound memory use.

    Args:
        config: overrides of `ImageVAEConfig`.
        pretrained: file or folder of weights. A config stored next to them becomes the default.
        use_recompute: use gradient checkpointing.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and matrix products.
    """

    name = "image_vae"
    config: ImageVAEConfig
    default_config = IMAGE_VAE_CONFIG
    shallow = {"ch_mult": [1, 2], "num_res_blocks": 1}
    recomputed = (ResnetBlock,)
    default_tiling = TilingConfig(decode_overlap=0)  # frames are independent
    originals = ("AutoencoderKL",)
    formats = {
        "diffusers": Format(
            "diffusers' AutoencoderKL",
            "diffusion_pytorch_model.safetensors",
            config_to_diffusers,
            rules=lambda config: diffusers_rules(len(config["ch_mult"])),
            attention_axes=2,
        ),
        "latent_diffusion": Format(
            "latent diffusion's AutoencoderKL, ComfyUI",
            "model.safetensors",
            described_here("image_vae"),
            rules=lambda config: (),
        ),
    }
    spellings = SPELLINGS
    micro_batch_size: int | None = None

    def __init__(
        self,
        config: dict | None = None,
        pretrained: str | Path | StateDict | None = None,
        use_recompute: bool = False,
        dtype: str = "fp32",
    ):
        super().__init__(config, pretrained=pretrained)
        config = self.config
        widths = [config.ch * m for m in config.ch_mult]
        latents = config.z_channels
        self.geometry = Geometry(config.in_channels, latents, spatial=2 ** (len(widths) - 1), temporal=1)
        shape = (widths, config.num_res_blocks, config.norm_num_groups)
        self.encoder = ResnetEncoder(config.in_channels, 2 * latents, *shape)
        self.decoder = ResnetDecoder(latents, config.out_ch, *shape)
        self.quantized, self.dequantized = config.use_quant_conv, config.use_post_quant_conv
        if self.quantized:
            self.quant_conv = SpatialConv(2 * latents, 2 * latents, 1, padding=(0, 0, 0, 0))
        if self.dequantized:
            self.post_quant_conv = SpatialConv(latents, latents, 1, padding=(0, 0, 0, 0))
        self.finish(dtype, use_recompute, pretrained)

    @staticmethod
    def is_original_config(config: Mapping) -> bool:
        return config.get("_class_name", "AutoencoderKL" if "block_out_channels" in config else None) == "AutoencoderKL"

    @classmethod
    def translate_config(cls, config: Mapping) -> dict:
        return config_from_diffusers(config) if cls.is_original_config(config) else dict(config)

    def encode_moments(self, x):
        return _unfold(self._in_micro_batches(self._encode_images, _fold(x)), x.shape[2])

    def before_decoder(self, z):
        return self.post_quant_conv(z) if self.dequantized else z

    def decode_latents(self, z, still=False):
        return _unfold(self._in_micro_batches(self._decode_images, _fold(z)), z.shape[2])

    def features(self, code, frames):
        return super().features(_fold(code), frames)

    def picture(self, h, shape):
        return crop(_unfold(self.leave(self.decoder.picture(h)), shape[2]).astype(ms.float32), shape)

    def _encode_images(self, x):
        moments = self.encoder(self.enter(x))
        return self.leave(self.quant_conv(moments) if self.quantized else moments)

    def _decode_images(self, z):
        return self.leave(self.decoder(self.before_decoder(self.enter(z))))

    def _in_micro_batches(self, fn, x):
        n, size = x.shape[0], self.micro_batch_size
        if size is None or n <= size:
            return fn(x)
        if n % size:  # fill up the last one, so that a compiled graph sees only one shape
            x = repeat_edges(x, 0, 0, -n % size)
        return narrow(ops.cat([fn(images) for images in split(x, size, 0)]), 0, 0, n)


def _fold(x: Tensor) -> Tensor:
    """Make frames a batch of images, so that norms see one at a time: (B, C, T, H, W) -> (B*T, C, 1, H, W)"""
    b, c, t, h, w = x.shape
    return swap_frames(x).reshape(b * t, c, 1, h, w)


def _unfold(x: Tensor, frames: int) -> Tensor:
    """(B*T, C, 1, H, W) -> (B, C, T, H, W)"""
    n, c, _, h, w = x.shape
    return swap_frames(x.reshape(n // frames, frames, c, h, w))
