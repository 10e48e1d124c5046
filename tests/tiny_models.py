"""Configs of small models that several test files build."""

_WIDTHS, _DEPTHS = [32, 32, 32, 32, 64, 64], [1] * 6

# The ones that tests/data/dc_ae and tests/data/temporal_vae hold the originals' weights of.
DC_AE = {
    "encoder_width_list": _WIDTHS,
    "encoder_depth_list": _DEPTHS,
    "decoder_width_list": _WIDTHS,
    "decoder_depth_list": _DEPTHS,
    "latent_channels": 16,
}
TEMPORAL_VAE = {
    "spatial_block_out_channels": [32, 32, 32, 64],
    "spatial_layers_per_block": 1,
    "filters": 32,
    "channel_multipliers": [1, 1, 1, 2],
    "num_res_blocks": 1,
}
# The smallest of its kind: 2x2x2, chunks of 5 frames.
SMALL_TEMPORAL_VAE = {
    "spatial_block_out_channels": [32, 32],
    "spatial_layers_per_block": 1,
    "filters": 32,
    "channel_multipliers": [1, 1],
    "temporal_downsample": [True],
    "num_res_blocks": 1,
    "micro_frame_size": 5,
}
HUNYUAN_VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
# The smallest of its kind: 4x2x2; only the last change of time changes the frame too.
SMALL_HUNYUAN_VAE = {**HUNYUAN_VAE, "block_out_channels": [8, 8, 16], "spatial_compression_ratio": 2}
