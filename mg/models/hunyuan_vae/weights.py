"""Names and shapes of the HunyuanVideo VAE's parameters and its config: ours, and those of the released files.

diffusers' folder, Open-Sora 2.0's `hunyuan_vae.safetensors` and Tencent's `pytorch_model.pt` use the same names, the
last with the prefix `vae.`. ComfyUI's `hunyuan_video_vae_bf16.safetensors` uses latent diffusion's, with a `conv`
inside each convolution and the attention's linear layers as 1x1x1 convolutions. Ours are latent diffusion's, as in
`mg.models.layers.resnet`: levels are numbered from the finest in the decoder too.

    diffusers, Open-Sora, Tencent                              here
    encoder.down_blocks.1.resnets.0.conv1.conv.weight          encoder.down.1.block.0.conv1.weight
    encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight  encoder.down.1.block.0.nin_shortcut.weight
    encoder.down_blocks.1.downsamplers.0.conv.conv.weight      encoder.down.1.downsample.weight
    encoder.mid_block.resnets.0.norm1.weight                   encoder.mid.block_1.norm1.gamma
    encoder.mid_block.attentions.0.to_out.0.weight             encoder.mid.attn_1.proj_out.weight
    decoder.up_blocks.0.upsamplers.0.conv.conv.weight          decoder.up.3.upsample.conv.weight
    decoder.conv_norm_out.weight                               decoder.norm_out.gamma

    ComfyUI
    encoder.down.1.block.0.conv1.conv.weight                   encoder.down.1.block.0.conv1.weight
    encoder.down.1.downsample.conv.conv.weight                 encoder.down.1.downsample.weight
    encoder.mid.attn_1.proj_out.weight (C, C, 1, 1, 1)         encoder.mid.attn_1.proj_out.weight (C, C)
    decoder.up.3.upsample.conv.conv.weight                     decoder.up.3.upsample.conv.weight
"""

from collections.abc import Iterator, Mapping

import numpy as np

from mg.checkpoints import CheckpointError, rename, rename_back
from mg.models import naming
from mg.models.naming import Layer, conv3d, linear, norm

_TENCENT = "vae."  # prefix of each name in Tencent's own file


def from_released(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The names and shapes of a released file -> ours; our own names, and unknown ones, are kept."""
    shapes = parameter_shapes(config)
    names = rename(rename(state, naming.original_names(layers(config))), comfyui_names(config))
    found = rename(names, {name: naming.torch_name(name) for name in shapes})
    for name, shape in shapes.items():
        if name in found and found[name].shape == (*shape, 1, 1, 1):  # a linear layer stored as a convolution
            found[name] = found[name].reshape(shape)
    return found


def to_diffusers(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Our names -> diffusers'.

    Raises:
        CheckpointError: a parameter is missing.
    """
    return rename_back(state, naming.original_names(layers(config)))


def to_tencent(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Our names -> Tencent's; raises as `to_diffusers` does."""
    return {f"{_TENCENT}{name}": value for name, value in to_diffusers(state, config).items()}


def to_comfyui(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Our names and shapes -> ComfyUI's; raises as `to_diffusers` does."""
    renamed = rename_back(state, comfyui_names(config))
    return {name: value.reshape(*value.shape, 1, 1, 1) if value.ndim == 2 else value for name, value in renamed.items()}


def comfyui_names(config: Mapping) -> dict[str, str]:
    """Our name of every parameter -> ComfyUI's."""

    def theirs(layer: Layer) -> str:
        if len(layer.shapes.get("weight", ())) != 5 or layer.name.endswith("quant_conv"):
            return layer.name
        return f"{layer.name}.conv.conv" if layer.name.endswith(".downsample") else f"{layer.name}.conv"

    return naming.original_names(layer._replace(original=theirs(layer)) for layer in layers(config))


def parameter_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Our name of every parameter -> its shape."""
    return naming.parameter_shapes(layers(config))


def factors(config: Mapping) -> list[tuple[int, int]]:
    """By how much time and space change after each level but the last, in forward order.

    The encoder starts with the finest level, the decoder with the coarsest: it does not mirror the encoder, since both
    change the frame rate last.
    """
    changes = len(config["block_out_channels"]) - 1
    in_time = config["temporal_compression_ratio"].bit_length() - 1
    in_space = config["spatial_compression_ratio"].bit_length() - 1
    return [(2 if i >= changes - in_time else 1, 2 if i < in_space else 1) for i in range(changes)]


def layers(config: Mapping) -> Iterator[Layer]:
    """The layers of a config, in forward order; raises as `check_config` does."""
    check_config(config)
    widths, count, latents = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    changed = [time * space > 1 for time, space in factors(config)] + [False]

    width = widths[0]
    yield conv3d("encoder.conv_in", "encoder.conv_in.conv", config["in_channels"], width)
    for i, next_width in enumerate(widths):
        ours, theirs = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        yield from _blocks(f"{ours}.block", f"{theirs}.resnets", width, next_width, count)
        width = next_width
        if changed[i]:
            yield conv3d(f"{ours}.downsample", f"{theirs}.downsamplers.0.conv.conv", width, width)
    yield from _middle("encoder", width, config["mid_block_add_attention"])
    yield norm("encoder.norm_out", "encoder.conv_norm_out", width)
    yield conv3d("encoder.conv_out", "encoder.conv_out.conv", width, 2 * latents)

    yield conv3d("quant_conv", "quant_conv", 2 * latents, 2 * latents, 1)
    yield conv3d("post_quant_conv", "post_quant_conv", latents, latents, 1)

    yield conv3d("decoder.conv_in", "decoder.conv_in.conv", latents, width)
    yield from _middle("decoder", width, config["mid_block_add_attention"])
    for i, next_width in enumerate(reversed(widths)):
        ours, theirs = f"decoder.up.{len(widths) - 1 - i}", f"decoder.up_blocks.{i}"
        yield from _blocks(f"{ours}.block", f"{theirs}.resnets", width, next_width, count + 1)
        width = next_width
        if changed[i]:
            yield conv3d(f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv.conv", width, width)
    yield norm("decoder.norm_out", "decoder.conv_norm_out", width)
    yield conv3d("decoder.conv_out", "decoder.conv_out.conv", width, config["out_channels"])


def _blocks(name: str, original: str, width: int, next_width: int, count: int) -> Iterator[Layer]:
    for i in range(count):
        yield from _block(f"{name}.{i}", f"{original}.{i}", width, next_width)
        width = next_width


def _block(name: str, original: str, width: int, next_width: int) -> Iterator[Layer]:
    yield norm(f"{name}.norm1", f"{original}.norm1", width)
    yield conv3d(f"{name}.conv1", f"{original}.conv1.conv", width, next_width)
    yield norm(f"{name}.norm2", f"{original}.norm2", next_width)
    yield conv3d(f"{name}.conv2", f"{original}.conv2.conv", next_width, next_width)
    if width != next_width:
        yield conv3d(f"{name}.nin_shortcut", f"{original}.conv_shortcut.conv", width, next_width, 1)


def _middle(part: str, width: int, attention: bool) -> Iterator[Layer]:
    ours, theirs = f"{part}.mid", f"{part}.mid_block"
    yield from _block(f"{ours}.block_1", f"{theirs}.resnets.0", width, width)
    if attention:
        yield norm(f"{ours}.attn_1.norm", f"{theirs}.attentions.0.group_norm", width)
        for name, original in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            yield linear(f"{ours}.attn_1.{name}", f"{theirs}.attentions.0.{original}", width)
    yield from _block(f"{ours}.block_2", f"{theirs}.resnets.1", width, width)


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


def check_config(config: Mapping) -> None:
    """Raise ValueError, with the key, unless a model of this config can be built."""
    for key in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
        if type(config[key]) is not int or config[key] <= 0:
            raise ValueError(f"hunyuan_vae config: {key} is {config[key]}; it must be a whole number above 0")
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    if np.size(widths) < 3 or any(type(width) is not int or width <= 0 or width % groups for width in widths):
        raise ValueError(
            f"hunyuan_vae config: block_out_channels is {widths}; it must be 3 or more multiples of {groups}, the "
            "config's norm_num_groups"
        )
    if config["temporal_compression_ratio"] != 4:
        raise ValueError(
            f"hunyuan_vae config: temporal_compression_ratio is {config['temporal_compression_ratio']}; it must be 4"
        )
    ratios = [2**i for i in range(len(widths))]
    if config["spatial_compression_ratio"] not in ratios:
        raise ValueError(
            f"hunyuan_vae config: spatial_compression_ratio is {config['spatial_compression_ratio']}; "
            f"it must be one of {', '.join(map(str, ratios))}"
        )
    if type(config["mid_block_add_attention"]) is not bool:
        raise ValueError(
            f"hunyuan_vae config: mid_block_add_attention is {config['mid_block_add_attention']}; it must be true or "
            "false"
        )
    factor = config["scaling_factor"]
    if not isinstance(factor, (int, float)) or factor <= 0:
        raise ValueError(f"hunyuan_vae config: scaling_factor is {factor}; it must be a number above 0")


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
