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
from dataclasses import dataclass, field
from pathlib import Path

from mg.checkpoints import StateDict
from mg.codec import Geometry
from mg.models.autoencoder import VideoAutoencoder
from mg.models.config import StoredConfig, are_positive, is_above_0
from mg.models.hunyuan_vae.blocks import CausalDecoder, CausalEncoder, Conv
from mg.models.hunyuan_vae.weights import (
    CLASSES,
    comfyui_rules,
    config_from_diffusers,
    config_to_diffusers,
    config_to_tencent,
    released_rules,
    tencent_rules,
)
from mg.models.layers.attention import CausalAttention
from mg.models.layers.resnet import ResnetBlock, start_certain
from mg.models.stored import Format, described_here
from mg.tiling import TilingConfig


@dataclass(frozen=True, eq=False)
class HunyuanVAEConfig(StoredConfig):
    """Config of the HunyuanVideo VAE, with the keys of diffusers' config.json.

    Attributes:
        in_channels, out_channels: of a frame.
        latent_channels: of z.
        block_out_channels: channels of the levels, finest first.
        layers_per_block: residual blocks of a level; the decoder has one more.
        norm_num_groups: the norms' groups.
        scaling_factor: 1 / the latents' deviation, for the caller.
        spatial_compression_ratio, temporal_compression_ratio: pixels per latent, frames per latent.
        mid_block_add_attention: attention between the two halves' coarsest blocks.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    mid_block_add_attention: bool = True

    def __post_init__(self):
        self.check_positive("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
        widths, groups = self.block_out_channels, self.norm_num_groups
        fit = are_positive(widths) and len(widths) >= 3 and not any(width % groups for width in widths)
        self.check("block_out_channels", fit, f"3 or more multiples of {groups}, the config's norm_num_groups")
        self.check("temporal_compression_ratio", self.temporal_compression_ratio == 4, "4")
        ratios = [2**i for i in range(len(widths))]
        one_of = f"one of {', '.join(map(str, ratios))}"
        self.check("spatial_compression_ratio", self.spatial_compression_ratio in ratios, one_of)
        self.check("mid_block_add_attention", type(self.mid_block_add_attention) is bool, "true or false")
        self.check("scaling_factor", is_above_0(self.scaling_factor), "a number above 0")


HUNYUAN_VAE_CONFIG = HunyuanVAEConfig()


def factors(config: Mapping) -> list[tuple[int, int]]:
    """By how much time and space change after each level but the last, in forward order.

    The encoder starts with the finest level, the decoder with the coarsest: it does not mirror the encoder, since both
    change the frame rate last.
    """
    changes = len(config["block_out_channels"]) - 1
    in_time = config["temporal_compression_ratio"].bit_length() - 1
    in_space = config["spatial_compression_ratio"].bit_length() - 1
    return [(2 if i >= changes - in_time else 1, 2 if i < in_space else 1) for i in range(changes)]


class HunyuanVAE(VideoAutoencoder):
    """The causal video VAE of HunyuanVideo.

    Args:
        config: overrides of `HunyuanVAEConfig`.
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
    config: HunyuanVAEConfig
    default_config = HUNYUAN_VAE_CONFIG
    shallow = {"layers_per_block": 1}
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
            config_to_diffusers,
            released_rules,
        ),
        "open_sora": Format("Open-Sora 2.0", "hunyuan_vae.safetensors", config_to_diffusers, released_rules),
        "tencent": Format("Tencent's AutoencoderKLCausal3D", "model.safetensors", config_to_tencent, tencent_rules),
        "comfyui": Format(
            "ComfyUI",
            "hunyuan_video_vae.safetensors",
            described_here("hunyuan_vae"),
            comfyui_rules,
            attention_axes=5,
        ),
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
        latents, temporal = config.latent_channels, config.temporal_compression_ratio
        self.geometry = Geometry(
            config.in_channels,
            latents,
            spatial=config.spatial_compression_ratio,
            temporal=temporal,
            lead=1,
            frame_multiple=temporal,
        )
        shape = (
            config.block_out_channels,
            factors(config),
            config.layers_per_block,
            config.norm_num_groups,
            config.mid_block_add_attention,
        )
        self.encoder = CausalEncoder(config.in_channels, 2 * latents, *shape)
        self.quant_conv = Conv(2 * latents, 2 * latents, kernel_size=1)
        self.post_quant_conv = Conv(latents, latents, kernel_size=1)
        self.decoder = CausalDecoder(latents, config.out_channels, *shape)
        start_certain(self.quant_conv)
        self.finish(dtype, use_recompute, pretrained)

    @staticmethod
    def is_original_config(config: Mapping) -> bool:
        return config.get("_class_name") in CLASSES

    @classmethod
    def translate_config(cls, config: Mapping) -> dict:
        return config_from_diffusers(config) if cls.is_original_config(config) else dict(config)

    def encode_moments(self, x):
        return self.leave(self.quant_conv(self.encoder(self.enter(x))))

    def before_decoder(self, z):
        return self.post_quant_conv(z)

    def scaling_for(self, mean, std, means, stds):
        return {"scaling_factor": 1 / std}
