"""The originals' networks with random weights, what went into them and what came out (tests/data/generation)."""

import json
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mg.checkpoints import read_state_dict
from mg.diffusion.networks import DENOISERS, Denoiser, create_denoiser

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
    """x, t, y, the network's other conditions, and `mask` or `x_mask` if requested."""
    sizes = {"stdit2": ("height", "width", "num_frames", "ar", "fps"), "stdit3": ("height", "width", "fps")}
    return {name: Tensor(array(case, name)) for name in ("x", "t", "y", *sizes.get(case, ()), *masks)}


def read(case: str) -> dict[str, np.ndarray]:
    """The original's weights."""
    return read_state_dict(DATA / case / "weights.safetensors")


def pixart_weights(name: str, config: dict) -> dict[str, np.ndarray]:
    """What PixArt has of a network: one frame, no attention along time, no q/k norm; random."""
    network = DENOISERS.model_class(name)
    shapes = network.weight_shapes(network.complete(config))
    later = ("attn_temp", "_temporal", "temporal_blocks", "q_norm", "k_norm", "t_block_temp", "csize_", "ar_embedder")
    later += ("fl_embedder", "fps_embedder", "rope")
    rng, state = np.random.default_rng(0), {}
    for key, shape in shapes.items():
        if not any(part in key for part in later):
            shape = shape[:2] + shape[3:] if key == "x_embedder.proj.weight" else shape
            shape = (2, *shape[1:]) if key == "y_embedder.y_embedding" else shape  # of 2 tokens, for more
            state[key.replace("spatial_blocks", "blocks")] = rng.standard_normal(shape).astype(np.float32)
    return {**state, "pos_embed": np.zeros((1, 1024, 24), np.float32)}
