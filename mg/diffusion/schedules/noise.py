"""Fresh noise for sampling, with a seed per sample."""

from collections.abc import Sequence

import numpy as np

_PURPOSES = {"start": 0, "step": 1, "renoise": 2}


class SampleNoise:
    """Standard normal noise for a batch of samples: a sample's noise only depends on its seed, the step and the
    purpose, not on the batch that it is in or on what was drawn before.

    Args:
        seeds: the whole numbers that seed each sample's noise, such as seed, prompt, sample and loop.
        shape: (C, T, H, W) of one sample.
    """

    def __init__(self, seeds: Sequence[Sequence[int]], shape: tuple[int, ...]):
        self.seeds = [list(seed) for seed in seeds]
        self.shape = tuple(shape)

    def start(self) -> np.ndarray:
        """What sampling starts from (B, C, T, H, W)."""
        return self(0, "start")

    def __call__(self, step: int, purpose: str) -> np.ndarray:
        """The noise (B, C, T, H, W) of a step for a purpose, as `Schedule.sample` asks for it."""
        return np.stack(
            [
                np.random.default_rng([*seed, step, _PURPOSES[purpose]]).standard_normal(self.shape, np.float32)
                for seed in self.seeds
            ]
        )
