"""The VAE of HunyuanVideo (arXiv 2412.03603): 4x8x8 compression, 16 channels, causal in time.

Latent diffusion's autoencoder in three dimensions; HunyuanVideo and Open-Sora 2.0 generate its latents. The defaults
are the released checkpoint's. Its weights are under Tencent's community licence and are not shipped here.

    vae = create_model("hunyuan_vae", pretrained="hunyuan_vae.safetensors")
    z, mean, logvar = vae.encode(x)        # x (B, 3, 4 k + 1, H, W) in [-1, 1] -> (B, 16, k + 1, H/8, W/8)
    y = vae.decode(z, num_target_frames=x.shape[2])

The first frame gets its own latent frame, so that an image is a clip of one frame; every 4 later ones share one. Clips
whose length isn't 4 k + 1 are padded by repeating the last frame, and cropped back. No convolution or attention looks
ahead, but the norms see the whole clip.

Latents are not scaled: the caller multiplies them by the config's `scaling_factor`, 0.476986, as diffusers' pipelines
do; Open-Sora's `encode` does so itself.
"""

from collections.abc import Mapping
from pathlib import Path

from mg.checkpoints import StateDict
from mg.codec import Geometry
from mg.models.autoencoder import VideoAutoencoder
from mg.models.hunyuan_vae.blocks import Conv, Decoder, Encoder
from mg.models.hunyuan_vae.weights import (
    CLASSES,
    check_config,
    config_from_diffusers,
    config_to_diffusers,
    config_to_tencent,
    factors,
    from_released,
    parameter_shapes,
    to_comfyui,
    to_diffusers,
    to_tencent,
)
from mg.models.layers.attention import CausalAttention
from mg.models.layers.resnet import ResnetBlock, start_certain
from mg.models.stored import Format, described_here
from mg.tiling import TilingConfig

HUNYUAN_VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.476986,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "mid_block_add_attention": True,
}


class HunyuanVAE(VideoAutoencoder):
    """The causal video VAE of HunyuanVideo.

    Args:
        config: overrides of HUNYUAN_VAE_CONFIG, with the keys of diffusers' config.json: widths of the levels, finest
            first; blocks per level; `scaling_factor`, for the caller.
        pretrained: file or folder of weights in any format that `mg.checkpoints` reads. A config stored next to
            them becomes the default.
        use_recompute: use gradient checkpointing.
        sample_deterministic: `encode` returns the posterior's mean as z.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and matrix products; parameters, norms and softmax stay
            fp32.

    Raises:
        ValueError: a config that cannot be built.
        CheckpointError: weights that cannot be read or do not fit.
    """

    name = "hunyuan_vae"
    default_config = HUNYUAN_VAE_CONFIG
    scaling = "for the caller: z * scaling_factor after encode, undone before decode"
    recomputed = (ResnetBlock, CausalAttention)
    default_tiling = TilingConfig(
        encode_tile=64, encode_overlap=16, decode_tile=64, decode_overlap=16, spatial_tile=256, last="short"
    )
    originals = CLASSES
    formats = {
        "diffusers": Format(
            "diffusers' AutoencoderKLHunyuanVideo",
            "diffusion_pytorch_model.safetensors",
            to_diffusers,
            config_to_diffusers,
        ),
        "open_sora": Format("Open-Sora 2.0", "hunyuan_vae.safetensors", to_diffusers, config_to_diffusers),
        "tencent": Format("Tencent's AutoencoderKLCausal3D", "model.safetensors", to_tencent, config_to_tencent),
        "comfyui": Format("ComfyUI", "hunyuan_video_vae.safetensors", to_comfyui, described_here("hunyuan_vae")),
    }

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
        check_config(config)
        latents, temporal = config["latent_channels"], config["temporal_compression_ratio"]
        self.geometry = Geometry(
            config["in_channels"],
            latents,
            spatial=config["spatial_compression_ratio"],
            temporal=temporal,
            lead=1,
            frame_multiple=temporal,
        )
        shape = (
            config["block_out_channels"],
            factors(config),
            config["layers_per_block"],
            config["norm_num_groups"],
            config["mid_block_add_attention"],
        )
        self.encoder = Encoder(config["in_channels"], 2 * latents, *shape)
        self.quant_conv = Conv(2 * latents, 2 * latents, kernel_size=1)
        self.post_quant_conv = Conv(latents, latents, kernel_size=1)
        self.decoder = Decoder(latents, config["out_channels"], *shape)
        start_certain(self.quant_conv)
        self.finish(dtype, use_recompute, pretrained)

    @staticmethod
    def is_original_config(config: dict) -> bool:
        return config.get("_class_name") in CLASSES

    @classmethod
    def translate_config(cls, config: dict) -> dict:
        return config_from_diffusers(config) if cls.is_original_config(config) else config

    @staticmethod
    def translate_weights(state: Mapping, config: dict) -> dict:
        return from_released(state, config)

    @staticmethod
    def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(config)

    def encode_moments(self, x):
        return self.leave(self.quant_conv(self.encoder(self.enter(x))))

    def before_decoder(self, z):
        return self.post_quant_conv(z)

    def scaling_for(self, mean, std, means, stds):
        return {"scaling_factor": 1 / std}
