"""Names of the HunyuanVideo VAE's parameters and its config in the released files.

diffusers' folder, Open-Sora 2.0's `hunyuan_vae.safetensors` and Tencent's `pytorch_model.pt` use the same names, the
last with the prefix `vae.`. ComfyUI's `hunyuan_video_vae_bf16.safetensors` uses latent diffusion's, with a `conv`
inside each convolution and the attention's linear layers as 1x1x1 convolutions. Ours are latent diffusion's, as in
`mg.models.layers.resnet`: levels are numbered from the finest in the decoder too.

    diffusers, Open-Sora, Tencent                              here
    encoder.down_blocks.1.resnets.0.conv1.conv.weight          encoder.down.1.block.0.conv1.weight
    encoder.down_blocks.1.downsamplers.0.conv.conv.weight      encoder.down.1.downsample.weight
    encoder.mid_block.attentions.0.to_out.0.weight             encoder.mid.attn_1.proj_out.weight
    decoder.up_blocks.0.upsamplers.0.conv.conv.weight          decoder.up.3.upsample.conv.weight
    decoder.conv_norm_out.weight                               decoder.norm_out.gamma

    ComfyUI
    encoder.down.1.downsample.conv.conv.weight                 encoder.down.1.downsample.weight
    encoder.mid.attn_1.proj_out.weight (C, C, 1, 1, 1)         encoder.mid.attn_1.proj_out.weight (C, C)
"""

from collections.abc import Mapping

import numpy as np

from mg.checkpoints import CheckpointError
from mg.models.naming import Rule, diffusers_rules

# A convolution inside each convolution, except in the quant convolutions.
_CONVOLUTIONS: tuple[Rule, ...] = (
    (r"\.downsample\.", ".downsample.conv."),
    (r"\.(conv_in|conv_out|conv1|conv2|nin_shortcut|downsample\.conv|upsample\.conv)\.", r".\1.conv."),
)


def comfyui_rules(config: Mapping) -> tuple[Rule, ...]:
    """The rules that turn our names into ComfyUI's."""
    return _CONVOLUTIONS


def released_rules(config: Mapping) -> tuple[Rule, ...]:
    """The rules that turn our names into diffusers' and Open-Sora's."""
    return _CONVOLUTIONS + diffusers_rules(len(config["block_out_channels"]))


def tencent_rules(config: Mapping) -> tuple[Rule, ...]:
    """The rules that turn our names into those of Tencent's own file."""
    return (*released_rules(config), ("^", "vae."))


# Configs. Ours has diffusers' keys, except those with only one supported value.

_BLOCKS = {  # class -> its blocks
    "AutoencoderKLHunyuanVideo": ("HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D"),
    "AutoencoderKLCausal3D": ("DownEncoderBlockCausal3D", "UpDecoderBlockCausal3D"),  # Tencent's
}
CLASSES = tuple(_BLOCKS)
_THEIR_KEYS = {"time_compression_ratio": "temporal_compression_ratio"}  # Tencent's
_LEFT_OUT = ("sample_size", "sample_tsize")  # Tencent's tiles


def config_from_diffusers(config: Mapping) -> dict:
    """Our config from the `config.json` of diffusers or Tencent.

    Raises:
        CheckpointError: it describes an unsupported model.
    """
    down, up = _BLOCKS[config["_class_name"]]
    single = {"act_fn": "silu", "down_block_types": down, "up_block_types": up}
    for key, value in single.items():
        if any(found != value for found in np.ravel(config.get(key, value))):
            raise CheckpointError(f"{key} is {config[key]}; this VAE only supports {value}")
    return {
        _THEIR_KEYS.get(key, key): value
        for key, value in config.items()
        if key not in single and key not in _LEFT_OUT and not key.startswith("_")
    }


def config_to_tencent(config: Mapping) -> dict:
    """The `config.json` that Tencent's AutoencoderKLCausal3D reads, from ours."""
    theirs = {ours: name for name, ours in _THEIR_KEYS.items()}
    keys = {theirs.get(key, key): value for key, value in config.items()}
    return {**_described(CLASSES[1], config), "sample_size": 256, "sample_tsize": 64, **keys}


def config_to_diffusers(config: Mapping) -> dict:
    """The `config.json` that diffusers' AutoencoderKLHunyuanVideo reads, from ours."""
    return {**_described(CLASSES[0], config), **config}


def _described(kind: str, config: Mapping) -> dict:
    """The keys of a class's config that ours leaves out, since only one value is supported."""
    levels = len(config["block_out_channels"])
    down, up = _BLOCKS[kind]
    types = {"down_block_types": [down] * levels, "up_block_types": [up] * levels}
    return {"_class_name": kind, "act_fn": "silu", **types}
