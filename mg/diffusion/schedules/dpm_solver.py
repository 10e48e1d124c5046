"""DPM-Solver++ 2M (arXiv 2211.01095): few steps through the same noise as iddpm's networks are trained on.

It solves the diffusion's differential equation in the half logarithm of the signal-to-noise ratio, lambda, from two
predictions of the clean latents at a time.
"""

from collections.abc import Iterable

import numpy as np

from mg.diffusion.schedules.guidance import GuidedModel
from mg.diffusion.schedules.schedule import Schedule, checked_steps
from mg.diffusion.schedules.tables import DiffusionTables, noise_betas

_STEPS = 1000  # of the networks' training


class DPMSolver(Schedule):
    """dpm-solver; it samples only, and keeps no frames.

    Args:
        num_sampling_steps: calls of the network; 20, as released, where it is None.
        cfg_scale: of classifier-free guidance.

    Raises:
        ValueError: no such number of steps.
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
        earlier, earlier_lambda = None, 0.0  # the last step's prediction of the clean latents, and where it was made
        for step in steps:
            signal, spread, at = self._level(times[step])
            out = model(z, (times[step] - 1 / _STEPS) * _STEPS)  # the network counts from 0
            clean = (z - spread * out[:, : z.shape[1]]) / signal
            next_signal, next_spread, following = self._level(times[step + 1])
            ahead = following - at
            target = clean
            # Of first order: the first step, which has no other, and the last of few, which is more stable so.
            if earlier is not None and not (n < 10 and step == n - 1):
                target = clean + 0.5 * (clean - earlier) * (ahead / (at - earlier_lambda))
            z = next_spread / spread * z - next_signal * float(np.expm1(-ahead)) * target
            earlier, earlier_lambda = clean, at
        return z
