"""A weight file of LPIPS with random numbers, for tests that need no sensible distance."""

from pathlib import Path

import numpy as np

from mg.checkpoints import write_state_dict
from mg.losses.backbones import BACKBONES, BackboneFeatures


def write_random_weights(path: Path, net: str = "alex", seed: int = 0) -> Path:
    """Weights that keep the signal's size through the depth, biases that matter, and positive linear layers."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, parameter in BackboneFeatures(BACKBONES[net]).parameters_dict().items():
        shape = parameter.shape
        scale = np.sqrt(2 / np.prod(shape[1:])) if name.endswith("weight") else 0.1
        tensors[f"backbone.{name}"] = (scale * rng.standard_normal(shape)).astype(np.float32)
    for index, channels in enumerate(BACKBONES[net].tap_channels):
        tensors[f"linear.{index}.weight"] = rng.uniform(0, 1 / channels, (1, channels)).astype(np.float32)
    write_state_dict(path, tensors)
    return path
