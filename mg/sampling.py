"""Noise for samples of a posterior, by numpy.

A clip's noise depends on the seed, its name and a latent frame's place alone: not on the batch that it comes in, on
what ran before it, or on which device.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from mg.plain_text import name_bytes


def clip_seed(seed: int, name: str) -> list[int]:
    """What a clip's noise is drawn from."""
    return [seed, zlib.crc32(name_bytes(name))]


def clips_noise(seed: int, names: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of a shape (B, z, t, h, w) for a batch of clips, by name; what fills the batch up behind
    them gets that of the last one."""
    filled = [*names, *[names[-1]] * (shape[0] - len(names))]
    return np.concatenate([noise_at(clip_seed(seed, name), 0, (1, *shape[1:])) for name in filled])


def noise_at(seed: int | Sequence[int], start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise of a shape (B, z, t, h, w) whose first latent frame is the video's frame `start`: a frame's
    noise depends on the seed and its place alone, not on the piece that it comes in."""
    b, z, t, h, w = shape
    seed = [seed] if isinstance(seed, int) else list(seed)
    frames = [
        np.random.default_rng([*seed, at]).standard_normal((b, z, h, w), np.float32) for at in range(start, start + t)
    ]
    return np.stack(frames, axis=2)
