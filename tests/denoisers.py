"""The originals' networks with random weights, what went into them and what came out (tests/data/generation)."""

import json
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mg.checkpoints import read_state_dict
from mg.diffusion.networks import Denoiser, create_denoiser

DATA = Path(__file__).parent / "data" / "generation"
CASES = ("stdit", "stdit2", "stdit3", "dit_text", "dit_label")


def config_of(case: str) -> dict:
    return json.loads((DATA / case / "meta.json").read_text())["config"]


def array(case: str, name: str) -> np.ndarray:
    return np.load(DATA / case / f"{name}.npy")


def original(case: str, **settings) -> Denoiser:
    """Our network with the original's weights."""
    return create_denoiser(
        case.partition("_")[0], DATA / case / "weights.safetensors", **{**config_of(case), **settings}
    )


def inputs(case: str, *masks: str) -> dict[str, Tensor]:
    """x, t, y, what the network wants to know beside, and `mask` or `x_mask` where they are asked for."""
    sizes = {"stdit2": ("height", "width", "num_frames", "ar", "fps"), "stdit3": ("height", "width", "fps")}
    return {name: Tensor(array(case, name)) for name in ("x", "t", "y", *sizes.get(case, ()), *masks)}


def read(case: str) -> dict[str, np.ndarray]:
    """The original's weights."""
    return read_state_dict(DATA / case / "weights.safetensors")
