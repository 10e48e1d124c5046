"""DPM-Solver++ 2M (arXiv 2211.01095): sampling in few steps, on the noise schedule that iddpm's networks train on.

It solves the diffusion ODE in lambda, half the log signal-to-noise ratio, using the last two predictions of the clean
latents.
"""

from collections.abc import Iterable

import numpy as np

from mg.diffusion.schedules.guidance import GuidedModel
from mg.diffusion.schedules.schedule import Schedule, checked_steps
from mg.diffusion.schedules.tables import DiffusionTables, noise_betas

_STEPS = 1000  # that the networks are trained with


class DPMSolver(Schedule):
    """dpm-solver; it only samples, and takes no frame mask.

    Args:
        num_sampling_steps: network calls; None for 20, as released.
        cfg_scale: classifier-free guidance scale.

    Raises:
        ValueError: an invalid number of steps.
    """

    name = "dpm-solver"
    trains = False
    takes_frame_mask = False

    def __init__(self, num_sampling_steps: int | None = None, cfg_scale: float = 4.0):
        self.num_steps = 20 if num_sampling_steps is None else checked_steps(num_sampling_steps)
        self.cfg_scale = cfg_scale
        self._log_signal = 0.5 * np.log(DiffusionTables(noise_betas("linear", _STEPS)).alphas_cumprod)

    def _level(self, t: float) -> tuple[float, float, float]:
        """Signal, noise and lambda at a time in [1/1000, 1]."""
        log_signal = np.interp(t, np.arange(1, _STEPS + 1) / _STEPS, self._log_signal)
        signal, noise = float(np.exp(log_signal)), float(np.sqrt(-np.expm1(2 * log_signal)))
        return signal, noise, float(log_signal - np.log(noise))

    def _sample(self, model: GuidedModel, z, mask, noise, size, steps: Iterable[int]) -> np.ndarray:
        n = self.num_steps
        times = np.linspace(1, 1 / _STEPS, n + 1).tolist()
        earlier, earlier_lambda = None, 0.0  # the previous step's prediction of the clean latents, and its lambda
        for step in steps:
            signal, spread, at = self._level(times[step])
            out = model(z, (times[step] - 1 / _STEPS) * _STEPS)  # the network counts from 0
            clean = (z - spread * out[:, : z.shape[1]]) / signal
            next_signal, next_spread, following = self._level(times[step + 1])
            ahead = following - at
            target = clean
            # First order: the first step, which has no previous one, and the last of few steps, for stability.
            if earlier is not None and not (n < 10 and step == n - 1):
                target = clean + 0.5 * (clean - earlier) * (ahead / (at - earlier_lambda))
            z = next_spread / spread * z - next_signal * float(np.expm1(-ahead)) * target
            earlier, earlier_lambda = clean, at
        return z
