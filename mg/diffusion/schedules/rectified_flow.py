"""Rectified flow (arXiv 2209.03003), as Open-Sora 1.2 uses it.

Latents and noise lie at the ends of a straight line, and the network predicts the velocity along it, latents - noise.
Larger videos are noised further at the same time: their redundancy hides more of the noise (arXiv 2403.03206).
"""

from collections.abc import Iterable

import numpy as np
from mindspore import mint

from mg.diffusion.schedules.frame_masks import mean_over_frames, over_frames
from mg.diffusion.schedules.guidance import GuidedModel
from mg.diffusion.schedules.schedule import Schedule, Size, checked_steps


def timestep_transform(t, size: Size, scale: float = 1.0, num_timesteps: int = 1000) -> np.ndarray:
    """Times moved towards the noise for larger videos, and at most `num_timesteps`; fp64.

    Args:
        t: times of any shape in [0, num_timesteps].
        size: height and width in pixels, and latent frames as the autoencoder makes them: Open-Sora counts five for
            every 17 frames, so none for 2 to 16 frames, and then samples nothing.
        scale: further, or less far.

    Raises:
        ValueError: a size or scale that is not positive.
    """
    height, width, frames = size
    if not min(height, width, frames, scale) > 0:
        raise ValueError(f"the timestep transform of {height} x {width} pixels, {frames} latent frames, scale {scale}")
    t = np.asarray(t, np.float64) / num_timesteps
    ratio = np.sqrt(float(height) * float(width) / 512**2 * frames) * scale
    return np.minimum(ratio * t / (1 + (ratio - 1) * t) * num_timesteps, num_timesteps)


class RectifiedFlow(Schedule):
    """rflow.

    Args:
        num_sampling_steps: of equal length in time, before the transform.
        num_timesteps: the scale of the times that the network is given.
        cfg_scale: of classifier-free guidance.
        use_discrete_timesteps: whole times only.
        use_timestep_transform: see `timestep_transform`.
        sample_method: how times are drawn in training: uniform | logit-normal.
        loc, scale: of the normal distribution under logit-normal.
        transform_scale: of the transform in training.

    Raises:
        ValueError: values that do not go together.
    """

    name = "rflow"

    def __init__(
        self,
        num_sampling_steps: int = 10,
        num_timesteps: int = 1000,
        cfg_scale: float = 4.0,
        use_discrete_timesteps: bool = False,
        use_timestep_transform: bool = False,
        sample_method: str = "uniform",
        loc: float = 0.0,
        scale: float = 1.0,
        transform_scale: float = 1.0,
    ):
        if sample_method not in ("uniform", "logit-normal"):
            raise ValueError(f"sample_method is {sample_method!r}; it must be one of uniform, logit-normal")
        if use_discrete_timesteps and sample_method != "uniform":
            raise ValueError(f"use_discrete_timesteps draws whole times uniformly; sample_method is {sample_method!r}")
        self.num_steps = checked_steps(num_sampling_steps)
        self.num_timesteps = num_timesteps
        self.cfg_scale = cfg_scale
        self.use_discrete_timesteps = use_discrete_timesteps
        self.use_timestep_transform = use_timestep_transform
        self.sample_method = sample_method
        self.loc = loc
        self.scale = scale
        self.transform_scale = transform_scale

    # sampling: numpy

    def times(self, size: Size | None = None) -> np.ndarray:
        """The times at which sampling asks the network, from the noise on, in fp32.

        Raises:
            ValueError: there is a transform, but no size.
        """
        t = (1 - np.arange(self.num_steps) / self.num_steps) * self.num_timesteps
        return self._transformed(np.rint(t) if self.use_discrete_timesteps else t, size)

    def _sample(self, model: GuidedModel, z, mask, noise, size, steps: Iterable[int]) -> np.ndarray:
        times = np.append(self.times(size), np.float32(0))
        generated = mask == 1  # frames that are noise, or on their way from it
        for step in steps:
            t, before = times[step], z
            if mask is None:
                z = self._step(z, model(z, t), t, times[step + 1])
                continue
            active = mask * np.float32(self.num_timesteps) >= t  # (B, T)
            joining = active & ~generated
            if joining.any():
                level = float(t / self.num_timesteps)
                z = np.where(over_frames(joining), (1 - level) * z + level * noise(step, "renoise"), z)
            generated = active
            z = np.where(over_frames(active), self._step(z, model(z, t, active), t, times[step + 1]), before)
        return z

    def _step(self, z: np.ndarray, out: np.ndarray, t: np.float32, following: np.float32) -> np.ndarray:
        return z + out[:, : z.shape[1]] * float((t - following) / self.num_timesteps)

    # training: tensors

    def draw_t(self, rng: np.random.Generator, batch: int, size: Size | None = None) -> np.ndarray:
        if self.use_discrete_timesteps:
            t = rng.integers(0, self.num_timesteps, batch).astype(float)
        elif self.sample_method == "uniform":
            t = rng.random(batch) * self.num_timesteps
        else:
            t = 1 / (1 + np.exp(-(self.loc + self.scale * rng.standard_normal(batch)))) * self.num_timesteps
        return self._transformed(t, size, self.transform_scale)

    def times_at(self, shares: np.ndarray) -> np.ndarray:
        t = np.asarray(shares) * self.num_timesteps
        return (np.floor(t) if self.use_discrete_timesteps else t).astype(np.float32)

    def mean_answer(self, mean: np.ndarray) -> np.ndarray:
        return mean

    def training_losses(self, model, x0, t, noise, x_mask=None, **cond):
        c = x0.shape[1]
        level = (t / self.num_timesteps).reshape(-1, 1, 1, 1, 1)
        if x_mask is not None:  # given frames are clean
            level = level * x_mask.reshape(x_mask.shape[0], 1, -1, 1, 1).astype(level.dtype)
        x_t = (1 - level) * x0 + level * noise
        out = model(x_t, t, **cond) if x_mask is None else model(x_t, t, x_mask=x_mask, **cond)
        return mean_over_frames(mint.square(mint.narrow(out, 1, 0, c) - (x0 - noise)), x_mask)

    def _transformed(self, t: np.ndarray, size: Size | None, scale: float = 1.0) -> np.ndarray:
        if self.use_timestep_transform:
            if size is None:
                raise ValueError("use_timestep_transform needs the size: height, width and number of latent frames")
            t = timestep_transform(t, size, scale, self.num_timesteps)
        return t.astype(np.float32)
