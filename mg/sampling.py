"""Noise for samples of a posterior, by numpy."""

from collections.abc import Sequence

import numpy as np


def noise_at(seed: int | Sequence[int], start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of a shape (B, z, t, h, w) whose first latent frame is the video's frame `start`: a frame's
    noise depends on the seed and its place alone, not on the piece that it comes in."""
    b, z, t, h, w = shape
    seed = [seed] if isinstance(seed, int) else list(seed)
    frames = [
        np.random.default_rng([*seed, at]).standard_normal((b, z, h, w), np.float32) for at in range(start, start + t)
    ]
    return np.stack(frames, axis=2)
