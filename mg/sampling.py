"""Noise for sampling the posterior, from numpy.

A clip's noise depends only on the seed, its name and the latent frame's position, not on its batch, on what ran before
it, or on the device.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from mg.plain_text import name_bytes


def clip_seed(seed: int, name: str) -> list[int]:
    """The seed of a clip's noise."""
    return [seed, zlib.crc32(name_bytes(name))]


def clips_noise(seed: int, names: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of a shape (B, z, t, h, w) for a batch of clips, by name; padding after them gets the last
    clip's noise."""
    filled = [*names, *[names[-1]] * (shape[0] - len(names))]
    return np.concatenate([noise_at(clip_seed(seed, name), 0, (1, *shape[1:])) for name in filled])


def noise_at(seed: int | Sequence[int], start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of a shape (B, z, t, h, w) that starts at the video's latent frame `start`: a frame's noise
    depends only on the seed and its position, not on the piece it is in."""
    b, z, t, h, w = shape
    seed = [seed] if isinstance(seed, int) else list(seed)
    frames = [
        np.random.default_rng([*seed, at]).standard_normal((b, z, h, w), np.float32) for at in range(start, start + t)
    ]
    return np.stack(frames, axis=2)
