"""Configs of small models that several test files build."""

_WIDTHS, _DEPTHS = [32, 32, 32, 32, 64, 64], [1] * 6

# The one that tests/data/dc_ae holds the original's weights of.
DC_AE = {
    "encoder_width_list": _WIDTHS,
    "encoder_depth_list": _DEPTHS,
    "decoder_width_list": _WIDTHS,
    "decoder_depth_list": _DEPTHS,
    "latent_channels": 16,
}
