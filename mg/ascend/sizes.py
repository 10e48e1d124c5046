"""The sizes in which every autoencoder is checked: the smallest with all its kinds of layers, and the released one with
the clips of its configs; in between, a narrow one that is as deep as the released one, so that it sees frames the same
way. Also every denoiser and text encoder, small and as released."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model and a clip.

    Attributes:
        frames, pixels: of the clip, T and both H and W.
        config: overrides of the model's default config, the released one.
    """

    frames: int
    pixels: int
    config: dict[str, Any] = field(default_factory=dict)


SMALL = {
    "tae": Size(
        *(4, 32),
        {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4}
        | {"temporal_downsample_level": [0], "temporal_upsample_level": [1]},
    ),
    "dc_ae": Size(
        *(4, 64),
        {f"{side}_width_list": [32, 32, 32, 32, 64, 64] for side in ("encoder", "decoder")}
        | {f"{side}_depth_list": [1] * 6 for side in ("encoder", "decoder")}
        | {"latent_channels": 16},
    ),
    "temporal_vae": Size(
        *(5, 32),
        {"spatial_block_out_channels": [32, 32], "spatial_layers_per_block": 1, "filters": 32, "num_res_blocks": 1}
        | {"channel_multipliers": [1, 1], "temporal_downsample": [True], "micro_frame_size": 5},
    ),
    "hunyuan_vae": Size(
        *(5, 32),
        {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
        | {"spatial_compression_ratio": 2},
    ),
    "image_vae": Size(4, 32, {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}),
}
# A clip, or tile, as in configs/; images have no clip there, and are batched in fours.
FULL = {
    "tae": Size(32, 256),
    "dc_ae": Size(32, 256),
    "temporal_vae": Size(17, 256),
    "hunyuan_vae": Size(33, 256),
    "image_vae": Size(4, 256),
}
SIZES = {"small": SMALL, "full": FULL}
# The denoisers and their latents, (T, H, W): the smallest with an odd width, and the released ones with the videos of
# their configs, 16 frames of 256x256 or 240x426 and 51 of 240x426.
_SMALL_DENOISER = {"hidden_size": 96, "depth": 2, "num_heads": 4, "caption_channels": 32, "model_max_length": 12}
DENOISERS: dict[str, dict[str, tuple[tuple[int, int, int], dict[str, Any]]]] = {
    "small": {
        "stdit": ((4, 6, 8), _SMALL_DENOISER | {"input_size": (4, 6, 8)}),
        "stdit2": ((5, 6, 9), _SMALL_DENOISER),
        "stdit3": ((5, 6, 9), _SMALL_DENOISER),
        "dit": ((4, 8, 8), _SMALL_DENOISER | {"input_size": (4, 8, 8)}),
    },
    "full": {
        "stdit": ((16, 32, 32), {}),
        "stdit2": ((16, 30, 53), {}),
        "stdit3": ((15, 30, 53), {}),
        "dit": ((16, 32, 32), {}),
    },
}
NARROW = {
    "tae": Size(8, 256, {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}),
    "dc_ae": Size(4, 256, SMALL["dc_ae"].config),
    "temporal_vae": Size(
        *(5, 256),
        {"spatial_block_out_channels": [32, 32, 32, 64], "spatial_layers_per_block": 1, "filters": 32}
        | {"channel_multipliers": [1, 1, 1, 2], "num_res_blocks": 1, "micro_frame_size": 5},
    ),
    "hunyuan_vae": Size(
        *(5, 256),
        {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
    ),
    "image_vae": Size(2, 256, {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}),
}


@dataclass(frozen=True)
class TextSize:
    """A text encoder, and a text of `length` tokens.

    Attributes:
        config: overrides of the default config, the released one.
    """

    length: int
    config: dict[str, Any] = field(default_factory=dict)


TEXT_SIZES = {
    "small": {
        "t5": TextSize(12, {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
        "clip": TextSize(12, {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}),
    },
    "full": {"t5": TextSize(300), "clip": TextSize(77)},
}
