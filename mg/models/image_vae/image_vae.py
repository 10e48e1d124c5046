"""The image VAE of Stable Diffusion (latent diffusion, arXiv 2112.10752), frame by frame over a video.

The defaults are SD3.5's: 8x8 compression, 16 channels, no quant convolutions. A TAE is inflated from this model.
"""

from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
from mindspore import Tensor, ops

from mg.checkpoints import StateDict
from mg.codec import Geometry
from mg.models.autoencoder import VideoAutoencoder
from mg.models.image_vae.weights import (
    config_from_diffusers,
    config_to_diffusers,
    image_vae_shapes,
    own_part,
    to_diffusers,
    to_latent_diffusion,
    translate,
)
from mg.models.layers.conv import SpatialConv
from mg.models.layers.layout import narrow, repeat_edges, split, swap_frames
from mg.models.layers.resnet import Decoder, Encoder, ResnetBlock
from mg.models.stored import Format, described_here
from mg.models.trainable import crop
from mg.tiling import TilingConfig

IMAGE_VAE_CONFIG = {
    "z_channels": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "norm_num_groups": 32,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


class ImageAutoencoder(VideoAutoencoder):
    """Encodes and decodes every frame independently: (B, 3, T, H, W) <-> (B, z, T, H/8, W/8).

    Set `micro_batch_size` to run at most this many frames at once and bound memory use.

    Args:
        config: overrides of IMAGE_VAE_CONFIG.
        pretrained: file or folder of weights. A config stored next to them becomes the default.
        use_recompute: use gradient checkpointing.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and matrix products.
    """

    name = "image_vae"
    default_config = IMAGE_VAE_CONFIG
    recomputed = (ResnetBlock,)
    default_tiling = TilingConfig(decode_overlap=0)  # frames are independent
    originals = ("AutoencoderKL",)
    formats = {
        "diffusers": Format(
            "diffusers' AutoencoderKL", "diffusion_pytorch_model.safetensors", to_diffusers, config_to_diffusers
        ),
        "latent_diffusion": Format(
            "latent diffusion's AutoencoderKL, ComfyUI",
            "model.safetensors",
            to_latent_diffusion,
            described_here("image_vae"),
        ),
    }
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
        widths = [config["ch"] * m for m in config["ch_mult"]]
        latents = config["z_channels"]
        self.geometry = Geometry(config["in_channels"], latents, spatial=2 ** (len(widths) - 1), temporal=1)
        shape = (widths, config["num_res_blocks"], config["norm_num_groups"])
        self.encoder = Encoder(config["in_channels"], 2 * latents, *shape)
        self.decoder = Decoder(latents, config["out_ch"], *shape)
        if config["use_quant_conv"]:
            self.quant_conv = SpatialConv(2 * latents, 2 * latents, 1, padding=(0, 0, 0, 0))
        if config["use_post_quant_conv"]:
            self.post_quant_conv = SpatialConv(latents, latents, 1, padding=(0, 0, 0, 0))
        self.finish(dtype, use_recompute, pretrained)

    @staticmethod
    def is_original_config(config: dict) -> bool:
        return config.get("_class_name", "AutoencoderKL" if "block_out_channels" in config else None) == "AutoencoderKL"

    @classmethod
    def translate_config(cls, config: dict) -> dict:
        return config_from_diffusers(config) if cls.is_original_config(config) else config

    @staticmethod
    def translate_weights(state: Mapping, config: dict) -> dict:
        return translate(state, config)

    @staticmethod
    def own_part(state: Mapping) -> dict:
        return own_part(state)

    @staticmethod
    def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
        return image_vae_shapes(config)

    def encode_moments(self, x):
        return _unfold(self._in_micro_batches(self._encode_images, _fold(x)), x.shape[2])

    def before_decoder(self, z):
        return self.post_quant_conv(z) if self.config["use_post_quant_conv"] else z

    def decode_latents(self, z, still=False):
        return _unfold(self._in_micro_batches(self._decode_images, _fold(z)), z.shape[2])

    def features(self, code, frames):
        return super().features(_fold(code), frames)

    def picture(self, h, shape):
        return crop(_unfold(self.leave(self.decoder.picture(h)), shape[2]).astype(ms.float32), shape)

    def _encode_images(self, x):
        moments = self.encoder(self.enter(x))
        return self.leave(self.quant_conv(moments) if self.config["use_quant_conv"] else moments)

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
