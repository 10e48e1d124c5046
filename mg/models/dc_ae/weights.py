"""Names and shapes of Video DC-AE's parameters: ours, and those of Open-Sora 2.0's checkpoints.

Open-Sora wraps every layer: a residual branch is `main`, a convolution `conv`, a sequence `op_list`, in which
resampling and blocks are numbered together.

    Open-Sora                                            here
    encoder.stages.0.op_list.1.main.conv2.norm.weight    encoder.stages.0.blocks.1.norm.gamma
    encoder.stages.0.op_list.2.main.conv.weight          encoder.stages.0.downsample.conv.weight
    decoder.stages.0.op_list.0.main.conv.conv.weight     decoder.stages.0.upsample.conv.weight
"""

from collections.abc import Iterator, Mapping

import numpy as np

from mg.checkpoints import rename, rename_back
from mg.models import naming
from mg.models.naming import Layer, conv3d, norm

# The blocks of each stage, finest first.
BLOCK_KINDS = ("residual",) * 3 + ("attention",) * 3


def from_open_sora(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Open-Sora's names -> ours; our own names, and unknown ones, are kept."""
    return rename(state, naming.original_names(layers(config)))


def to_open_sora(state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Our names -> Open-Sora's.

    Raises:
        CheckpointError: a parameter is missing.
    """
    return rename_back(state, naming.original_names(layers(config)))


def parameter_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Our name of every parameter -> its shape."""
    return naming.parameter_shapes(layers(config))


def layers(config: Mapping) -> Iterator[Layer]:
    """The layers of a config, in forward order."""
    channels, latents = config["in_channels"], config["latent_channels"]

    widths, depths = config["encoder_width_list"], config["encoder_depth_list"]
    yield conv3d("encoder.project_in", "encoder.project_in.conv", channels, widths[0])
    for i, (width, depth) in enumerate(zip(widths, depths)):
        ours, theirs = f"encoder.stages.{i}", f"encoder.stages.{i}.op_list"
        for j in range(depth):
            yield from _block(BLOCK_KINDS[i], f"{ours}.blocks.{j}", f"{theirs}.{j}", width)
        if i < len(widths) - 1:
            yield conv3d(f"{ours}.downsample.conv", f"{theirs}.{depth}.main.conv", width, widths[i + 1])
    yield conv3d("encoder.project_out", "encoder.project_out.main.op_list.0.conv", widths[-1], latents)

    widths, depths = config["decoder_width_list"], config["decoder_depth_list"]
    yield conv3d("decoder.project_in", "decoder.project_in.main.conv", latents, widths[-1])
    for i in reversed(range(len(widths))):
        ours, theirs = f"decoder.stages.{i}", f"decoder.stages.{i}.op_list"
        first = 0
        if i < len(widths) - 1:
            yield conv3d(f"{ours}.upsample.conv", f"{theirs}.0.main.conv.conv", widths[i + 1], widths[i])
            first = 1
        for j in range(depths[i]):
            yield from _block(BLOCK_KINDS[i], f"{ours}.blocks.{j}", f"{theirs}.{first + j}", widths[i])
    yield norm("decoder.norm_out", "decoder.project_out.op_list.0", widths[0])
    yield conv3d("decoder.project_out", "decoder.project_out.op_list.2.conv", widths[0], channels)


def _block(kind: str, name: str, original: str, width: int) -> Iterator[Layer]:
    if kind == "residual":
        yield conv3d(f"{name}.conv1", f"{original}.main.conv1.conv", width, width)
        yield conv3d(f"{name}.conv2", f"{original}.main.conv2.conv", width, width, bias=False)
        yield norm(f"{name}.norm", f"{original}.main.conv2.norm", width)
        return
    ours, theirs = f"{name}.context_module", f"{original}.context_module.main"
    yield conv3d(f"{ours}.qkv", f"{theirs}.qkv.conv", width, 3 * width, 1, bias=False)
    yield conv3d(f"{ours}.aggreg.0", f"{theirs}.aggreg.0.0", 1, 3 * width, 5, bias=False)
    yield conv3d(f"{ours}.aggreg.1", f"{theirs}.aggreg.0.1", 32, 3 * width, 1, bias=False)
    yield conv3d(f"{ours}.proj", f"{theirs}.proj.conv", 2 * width, width, 1, bias=False)
    yield norm(f"{ours}.norm", f"{theirs}.proj.norm", width)
    ours, theirs = f"{name}.local_module", f"{original}.local_module.main"
    yield conv3d(f"{ours}.inverted_conv", f"{theirs}.inverted_conv.conv", width, 8 * width, 1)
    yield conv3d(f"{ours}.depth_conv", f"{theirs}.depth_conv.conv", 1, 8 * width)
    yield conv3d(f"{ours}.point_conv", f"{theirs}.point_conv.conv", 4 * width, width, 1, bias=False)
    yield norm(f"{ours}.norm", f"{theirs}.point_conv.norm", width)
