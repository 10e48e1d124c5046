"""Configs of small models that several test files build, and random weights for them."""

import numpy as np
from mindspore import Tensor, nn

from mg.codec import Geometry
from mg.tiling import TilingConfig

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
# A TAE of four levels, 8x8x8 as the released one, and an image VAE of two.
SMALL_TAE = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
IMAGE_VAE = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}


class InTiles:
    """What a stand-in for a model needs so that tiles can be turned on and off."""

    geometry = Geometry(in_channels=3, latent_channels=3, spatial=1, temporal=1)
    default_tiling = TilingConfig()
    tiling = None

    def enable_tiling(self, **settings):
        self.tiling = TilingConfig(**settings)

    def disable_tiling(self):
        self.tiling = None


def randomized(cell: nn.Cell, seed: int = 0) -> nn.Cell:
    """All parameters random, norms too: none is zero or one, as some are in an untrained model."""
    rng = np.random.default_rng(seed)
    for name, p in cell.parameters_and_names():
        deviation = np.prod(p.shape[1:]) ** -0.5 if p.ndim > 1 else 0.1
        p.set_data(Tensor(rng.normal(float(name.endswith("gamma")), deviation, p.shape).astype(np.float32)))
    return cell
