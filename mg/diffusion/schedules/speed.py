"""SpeeD (arXiv 2405.17403): training that draws timesteps less often where there is little left to learn.

The noisiest levels hardly differ from each other, so they are drawn less often. Timesteps are drawn in pairs that
balance each other, and the squared error is weighted by how noisy the level is.
"""

import inspect

import numpy as np

from mg.diffusion.schedules.iddpm import IDDPM


class SpeeD(IDDPM):
    """iddpm-speed; it only trains, and iddpm samples what it trained.

    Args:
        config: arguments of iddpm, without those that only matter for sampling: steps, cfg_channel, original_masks.

    Raises:
        ValueError: an argument of sampling, or values that conflict.

    Attributes:
        probabilities: (diffusion_steps,), of drawing each timestep.
        meaningful_steps: the timestep that pairs are mirrored about.
    """

    name = "iddpm-speed"
    samples = False

    __signature__ = inspect.signature(IDDPM)  # whose arguments `create_schedule` compares names with

    def __init__(self, **config):
        of_sampling = ("num_sampling_steps", "timestep_respacing", "cfg_channel", "original_masks")
        given = [name for name in of_sampling if config.get(name)]
        if given:
            raise ValueError(
                f"iddpm-speed only trains, and on all steps; leave {' and '.join(given)} out, or sample with iddpm"
            )
        super().__init__(**config)
        slope = np.gradient(self.tables.sqrt_one_minus_alphas_cumprod)
        self.meaningful_steps = int(np.argmax(slope < 5e-5)) + 1
        likely = np.tanh(1e6 * (slope - 1e-4)) + 1.5
        self.probabilities = likely / likely.sum()

    def _error_weights(self) -> np.ndarray:
        """1 / (1 + signal-to-noise ratio)"""
        return 1 - self.tables.alphas_cumprod

    def draw_t(self, rng: np.random.Generator, batch: int, size=None) -> np.ndarray:
        """Timesteps (B,), about half of them drawn and the others their mirror images, so draw for the whole batch of
        all workers at once. See `Schedule.draw_t`."""
        drawn = rng.choice(self.num_steps, batch // 2 + 1, p=self.probabilities)
        middle = self.meaningful_steps
        mirrored = np.where(drawn < middle, middle - drawn, drawn - middle)
        return np.concatenate([drawn, mirrored])[:batch].astype(np.int32)
