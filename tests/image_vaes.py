"""A small image VAE, such as a TAE is inflated from, with random weights in diffusers' names."""

import numpy as np

from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.tae.inflation import config_from_image_vae, image_config

TINY = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "shift_factor": 0.1,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_TAE = config_from_image_vae(TINY)


def image_vae(config=TINY_TAE, seed=0) -> dict[str, np.ndarray]:
    """A random image VAE in diffusers' names."""
    rng = np.random.default_rng(seed)
    shapes = ImageAutoencoder.weight_shapes(image_config(config))
    state = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    return ImageAutoencoder.original_weights(state, config)
