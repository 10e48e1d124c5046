"""SpeeD (arXiv 2405.17403): training that draws timesteps less often where there is little left to learn.

The noisiest levels hardly differ from each other, so they are drawn less often. Timesteps are drawn in pairs that
balance each other, and the squared error is weighted by how noisy the level is.
"""

import numpy as np

from mg.diffusion.schedules.iddpm import IDDPM


class SpeeD(IDDPM):
    """iddpm-speed; it only trains, and iddpm samples what it trained.

    Args:
        timestep_respacing: "" or None, since it trains on all steps.
        others: as in iddpm.

    Raises:
        ValueError: fewer steps, or values that conflict.

    Attributes:
        probabilities: (diffusion_steps,), of drawing each timestep.
        meaningful_steps: the timestep that pairs are mirrored about.
    """

    name = "iddpm-speed"
    samples = False

    def __init__(
        self,
        num_sampling_steps: int | None = None,
        timestep_respacing: str | None = None,
        noise_schedule: str = "linear",
        use_kl: bool = False,
        sigma_small: bool = False,
        predict_xstart: bool = False,
        learn_sigma: bool = True,
        rescale_learned_sigmas: bool = False,
        diffusion_steps: int = 1000,
        cfg_scale: float = 4.0,
    ):
        if num_sampling_steps is not None or timestep_respacing:
            raise ValueError(
                "iddpm-speed only trains, and on all steps; leave num_sampling_steps and timestep_respacing out, "
                "or sample with iddpm"
            )
        super().__init__(
            noise_schedule=noise_schedule,
            use_kl=use_kl,
            sigma_small=sigma_small,
            predict_xstart=predict_xstart,
            learn_sigma=learn_sigma,
            rescale_learned_sigmas=rescale_learned_sigmas,
            diffusion_steps=diffusion_steps,
            cfg_scale=cfg_scale,
        )
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
