"""Names of Video DC-AE's parameters in Open-Sora 2.0's checkpoints.

Open-Sora wraps every layer: a residual branch is `main`, a convolution `conv`, a sequence `op_list`, in which
resampling and blocks are numbered together.

    Open-Sora                                            here
    encoder.stages.0.op_list.1.main.conv2.norm.weight    encoder.stages.0.blocks.1.norm.gamma
    encoder.stages.0.op_list.2.main.conv.weight          encoder.stages.0.downsample.conv.weight
    decoder.stages.0.op_list.0.main.conv.conv.weight     decoder.stages.0.upsample.conv.weight
"""

from collections.abc import Mapping

from mg.models.naming import Rule, within


def open_sora_rules(config: Mapping) -> tuple[Rule, ...]:
    """The rules that turn our names into Open-Sora's."""
    depths, coarsest = config["encoder_depth_list"], len(config["decoder_depth_list"]) - 1
    blocks = (
        (r"(blocks\.\d+)\.(conv[12])\.", r"\1.main.\2.conv."),
        (r"(blocks\.\d+)\.norm\.", r"\1.main.conv2.norm."),
        (r"_module\.(qkv|proj|inverted_conv|depth_conv|point_conv)\.", r"_module.main.\1.conv."),
        (r"_module\.aggreg\.", r"_module.main.aggreg.0."),
        (r"context_module\.norm\.", r"context_module.main.proj.norm."),
        (r"local_module\.norm\.", r"local_module.main.point_conv.norm."),
    )
    encoder = (
        (r"^project_in\.", "project_in.conv."),
        (r"\.blocks\.", ".op_list."),
        (r"(\d+)\.downsample\.", lambda found: f"{found[1]}.op_list.{depths[int(found[1])]}.main."),  # after the blocks
        (r"^project_out\.", "project_out.main.op_list.0.conv."),
    )
    decoder = (
        (r"^project_in\.", "project_in.main.conv."),
        (r"\.upsample\.", ".op_list.0.main.conv."),
        (
            r"(\d+)\.blocks\.(\d+)",  # which follow the upsampling, except in the coarsest stage
            lambda found: f"{found[1]}.op_list.{int(found[2]) + (int(found[1]) < coarsest)}",
        ),
        (r"^project_out\.", "project_out.op_list.2.conv."),
        (r"^norm_out\.", "project_out.op_list.0."),
    )
    return (*blocks, within("encoder.", encoder), within("decoder.", decoder))
