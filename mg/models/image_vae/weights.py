"""Names and shapes of the image VAE's parameters: latent diffusion's, which are ours, and diffusers'.

Everything follows from one list of layers, `layers(config)`. MindSpore calls a norm's parameters gamma and beta;
diffusers numbers the decoder's levels from the coarsest, latent diffusion from the finest, and stores the attention's
1x1 convolutions as linear layers.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mg.checkpoints import CheckpointError, LoadReport, rename_back
from mg.models import naming

_PARTS = ("encoder", "decoder")  # some have quant convolutions as well
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers until 2023

_NORM_PARAMETERS = {"gamma": "weight", "beta": "bias"}  # MindSpore's names and everyone else's


class Layer(NamedTuple):
    """One layer: latent diffusion's name, diffusers' name, kind (conv | norm | attention) and size."""

    name: str
    diffusers: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape, below the layer's name."""
        if self.kind == "norm":
            return {"gamma": (self.out_channels,), "beta": (self.out_channels,)}
        shape = (self.out_channels, self.in_channels, self.kernel, self.kernel)
        return {"weight": shape, "bias": (self.out_channels,)}


def layers(config: Mapping) -> Iterator[Layer]:
    """The layers of a config's VAE: ch, ch_mult, num_res_blocks, z_channels, in_channels, out_ch, quant convs."""
    widths = [config["ch"] * multiplier for multiplier in config["ch_mult"]]
    levels, blocks, z = len(widths), config["num_res_blocks"], config["z_channels"]
    moments = 2 * z if config.get("double_z", True) else z

    yield Layer("encoder.conv_in", "encoder.conv_in", "conv", config["in_channels"], widths[0], 3)
    width = widths[0]
    for i in range(levels):
        for j in range(blocks):
            yield from _resnet(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}", width, widths[i])
            width = widths[i]
        if i < levels - 1:
            name, diffusers = f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"
            yield Layer(name, diffusers, "conv", width, width, 3)
    yield from _middle("encoder", width)
    yield Layer("encoder.norm_out", "encoder.conv_norm_out", "norm", width, width)
    yield Layer("encoder.conv_out", "encoder.conv_out", "conv", width, moments, 3)

    if config.get("use_quant_conv", False):
        yield Layer("quant_conv", "quant_conv", "conv", moments, moments)
    if config.get("use_post_quant_conv", False):
        yield Layer("post_quant_conv", "post_quant_conv", "conv", z, z)

    yield Layer("decoder.conv_in", "decoder.conv_in", "conv", z, width, 3)
    yield from _middle("decoder", width)
    for i in range(levels):
        ours, theirs = f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        width = widths[min(i + 1, levels - 1)]
        for j in range(blocks + 1):
            yield from _resnet(f"{ours}.block.{j}", f"{theirs}.resnets.{j}", width, widths[i])
            width = widths[i]
        if i > 0:
            yield Layer(f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv", "conv", width, width, 3)
    yield Layer("decoder.norm_out", "decoder.conv_norm_out", "norm", widths[0], widths[0])
    yield Layer("decoder.conv_out", "decoder.conv_out", "conv", widths[0], config["out_ch"], 3)


def image_vae_names(config: Mapping) -> dict[str, str]:
    """Our name of every parameter -> diffusers' name."""
    return {
        f"{layer.name}.{parameter}": f"{layer.diffusers}.{_NORM_PARAMETERS.get(parameter, parameter)}"
        for layer in layers(config)
        for parameter in layer.shapes()
    }


def image_vae_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Our name of every parameter -> its shape."""
    return {
        f"{layer.name}.{parameter}": shape for layer in layers(config) for parameter, shape in layer.shapes().items()
    }


def rename(state: Mapping[str, np.ndarray], config: Mapping) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Find the image VAE in `state` and give it our names. Missing and misshapen parameters are in the report.

    Args:
        state: in diffusers' names, new or old, latent diffusion's or ours; it may be part of a larger model's
            checkpoint, with a prefix. Only the tensors that are used are read.

    Returns:
        Our names -> float32 arrays, and a report in the names of `state`.
    """
    own = naming.own_part(state, _PARTS)
    sources = own_part(own.sources)
    names = image_vae_names(config)
    if not any("_blocks." in name or ".mid_block." in name for name in sources):
        names = {name: _canonical(name) for name in names}
    renamed, report, taken = {}, LoadReport(), set()
    for name, shape in image_vae_shapes(config).items():
        if names[name] not in sources:
            report.missing.append(names[name])
            continue
        source = sources[names[name]]
        taken.add(source)
        array = np.asarray(state[source])
        if array.shape + (1, 1) == shape:  # a linear layer is a 1x1 convolution
            array = array.reshape(shape)
        if array.shape != shape:
            report.mismatched.append((source, array.shape, shape))
        else:
            report.used.append(source)
        renamed[name] = array.astype(np.float32, copy=False)
    report.unexpected = [name for name in state if name not in taken]
    return renamed, report


def translate(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The names that `rename` knows -> ours; others are kept."""
    renamed, report = rename(state, config)
    return renamed | {name: state[name] for name in report.unexpected}


def own_part(state: Mapping) -> dict:
    """An image VAE's names in their canonical spelling."""
    return {_canonical(name): value for name, value in state.items()}


def check_fit(report: LoadReport) -> None:
    """Raise unless the VAE that `rename` found is exactly the config's, complete and without extra parameters.

    Raises:
        CheckpointError: with the counts and first names; its `report` has all of them.
    """
    prefix = naming.prefix(report.used, _PARTS)
    parts = tuple(f"{prefix}{part}." for part in (*_PARTS, "quant_conv", "post_quant_conv"))
    if not report.complete or any(name.startswith(parts) for name in report.unexpected):
        raise CheckpointError(f"is not an image VAE of the expected architecture: {report.summary()}", report)


def from_diffusers(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The VAE in `state` (any names that `rename` knows) in our names; CheckpointError unless it fits the config."""
    renamed, report = rename(state, config)
    check_fit(report)
    return renamed


def to_latent_diffusion(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Our names -> those of latent diffusion's PyTorch code, which ComfyUI and others read.

    Raises:
        CheckpointError: a parameter is missing.
    """
    return rename_back(state, {name: naming.torch_name(name) for name in image_vae_names(config)})


def to_diffusers(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Our names -> diffusers' names and shapes.

    Raises:
        CheckpointError: a parameter is missing.
    """
    names, result = image_vae_names(config), {}
    for layer in layers(config):
        for parameter in layer.shapes():
            name = f"{layer.name}.{parameter}"
            if name not in state:
                raise CheckpointError(f"{name} is missing; an image VAE of this config has it")
            array = np.asarray(state[name])
            linear = layer.kind == "attention" and array.ndim == 4
            result[names[name]] = array[:, :, 0, 0] if linear else array
    return result


def config_from_diffusers(config_json: Mapping) -> dict:
    """Our config of the image VAE that a `config.json` of diffusers' AutoencoderKL describes.

    Raises:
        CheckpointError: it describes another class, or an unsupported AutoencoderKL.
    """
    widths = config_json.get("block_out_channels", [64])
    if not isinstance(widths, (list, tuple)) or not widths or not all(type(w) is int and w > 0 for w in widths):
        raise CheckpointError(f"block_out_channels is {widths}; it must be a list of whole numbers above 0")
    levels = len(widths)
    wanted = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latents_mean": None,
        "latents_std": None,
    }
    for key, value in wanted.items():
        found = config_json.get(key, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise CheckpointError(f"{key} is {found}; the image VAE only supports {value}")
    groups = _whole(config_json, "norm_num_groups", 32)
    if any(width % widths[0] or width % groups for width in widths):
        raise CheckpointError(f"block_out_channels is {widths}; each must be a multiple of the first and of {groups}")
    return {
        "z_channels": _whole(config_json, "latent_channels", 4),
        "in_channels": _whole(config_json, "in_channels", 3),
        "out_ch": _whole(config_json, "out_channels", 3),
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": _whole(config_json, "layers_per_block", 1),
        "norm_num_groups": groups,
        "scaling_factor": _real(config_json, "scaling_factor", 0.18215),
        "shift_factor": _real(config_json, "shift_factor", None) or 0.0,
        "use_quant_conv": bool(config_json.get("use_quant_conv", True)),
        "use_post_quant_conv": bool(config_json.get("use_post_quant_conv", True)),
    }


def config_to_diffusers(config: Mapping) -> dict:
    """The `config.json` that diffusers' AutoencoderKL reads, from ours.

    Raises:
        CheckpointError: a value of the wrong kind.
    """
    width, multipliers = _whole(config, "ch", 128), config["ch_mult"]
    if not isinstance(multipliers, (list, tuple)) or not all(type(m) is int for m in multipliers):
        raise CheckpointError(f"ch_mult is {multipliers}; it must be a list of whole numbers")
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [width * multiplier for multiplier in multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * len(multipliers),
        "up_block_types": ["UpDecoderBlock2D"] * len(multipliers),
        "layers_per_block": _whole(config, "num_res_blocks", 2),
        "norm_num_groups": _whole(config, "norm_num_groups", 32),
        "latent_channels": _whole(config, "z_channels", 16),
        "in_channels": _whole(config, "in_channels", 3),
        "out_channels": _whole(config, "out_ch", 3),
        "sample_size": _whole(config, "resolution", 256),
        "scaling_factor": _real(config, "scaling_factor", 1.0),
        "shift_factor": _real(config, "shift_factor", 0.0),
        "use_quant_conv": bool(config.get("use_quant_conv", False)),
        "use_post_quant_conv": bool(config.get("use_post_quant_conv", False)),
    }


def _resnet(name: str, diffusers: str, in_channels: int, out_channels: int) -> Iterator[Layer]:
    yield Layer(f"{name}.norm1", f"{diffusers}.norm1", "norm", in_channels, in_channels)
    yield Layer(f"{name}.conv1", f"{diffusers}.conv1", "conv", in_channels, out_channels, 3)
    yield Layer(f"{name}.norm2", f"{diffusers}.norm2", "norm", out_channels, out_channels)
    yield Layer(f"{name}.conv2", f"{diffusers}.conv2", "conv", out_channels, out_channels, 3)
    if in_channels != out_channels:
        yield Layer(f"{name}.nin_shortcut", f"{diffusers}.conv_shortcut", "conv", in_channels, out_channels)


def _middle(part: str, width: int) -> Iterator[Layer]:
    ours, theirs = f"{part}.mid", f"{part}.mid_block"
    yield from _resnet(f"{ours}.block_1", f"{theirs}.resnets.0", width, width)
    yield Layer(f"{ours}.attn_1.norm", f"{theirs}.attentions.0.group_norm", "norm", width, width)
    for name, diffusers in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield Layer(f"{ours}.attn_1.{name}", f"{theirs}.attentions.0.{diffusers}", "attention", width, width)
    yield from _resnet(f"{ours}.block_2", f"{theirs}.resnets.1", width, width)


def _canonical(name: str) -> str:
    """The canonical spelling of what old diffusers, latent diffusion's PyTorch code and MindSpore write differently."""
    head, _, parameter = name.rpartition(".")
    layer = head.rpartition(".")[2]
    if ".attentions." in head and layer in _OLD_ATTENTION:
        head = head.removesuffix(layer) + _OLD_ATTENTION[layer]
    return f"{head}.{_NORM_PARAMETERS.get(parameter, parameter)}"


def _whole(given: Mapping, key: str, default: int) -> int:
    value = given.get(key, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{key} is {value}; it must be a whole number above 0")
    return value


def _real(given: Mapping, key: str, default: float | None) -> float | None:
    value = given.get(key, default)
    if value is not default and type(value) not in (int, float):
        raise CheckpointError(f"{key} is {value}; it must be a number")
    return value
