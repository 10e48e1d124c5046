"""Gaussian diffusion with a learned variance (improved DDPM, arXiv 2102.09672), as Open-Sora 1.0 and 1.1 use it.

The network predicts the noise in its first C channels and, in the other C, where the logarithm of each value's variance
lies between the two that are possible. Sampling takes some of the steps of training.
"""

import math
from collections.abc import Callable, Iterable

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from mg.diffusion.schedules.frame_masks import mean_over_frames, over_frames
from mg.diffusion.schedules.guidance import GuidedModel
from mg.diffusion.schedules.schedule import Schedule, checked_steps
from mg.diffusion.schedules.tables import DiffusionTables, noise_betas, respaced


class IDDPM(Schedule):
    """iddpm.

    Args:
        num_sampling_steps: how many of the steps sampling takes, from the first to the last; None, all.
        timestep_respacing: in its place: "n" the same; "a,b,c" steps of as many equal sections; "ddimN" N at a whole
            stride; "" all.
        noise_schedule: linear | squaredcos_cap_v2.
        use_kl: train the variational bound alone.
        sigma_small: without a learned variance, the posterior's, in place of what a step adds.
        predict_xstart: the network predicts the latents in place of the noise.
        learn_sigma: the network has C more channels for the variance.
        rescale_learned_sigmas: weigh the bound by the number of steps / 1000 beside the squared error.
        diffusion_steps: of training.
        cfg_scale: of classifier-free guidance.
        cfg_channel: how many channels it guides; None, all. Open-Sora's 256 px models sample with 3.
        original_masks: do with frame masks exactly as Open-Sora does, for comparing: frames to keep take the network's
            answer in the last step, and come out nearly equal; a frame in the step that noises it is shown to the
            network as given.

    Raises:
        ValueError: values that do not go together.
    """

    name = "iddpm"

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
        cfg_channel: int | None = None,
        original_masks: bool = False,
    ):
        if num_sampling_steps is not None and timestep_respacing:
            raise ValueError(
                f"num_sampling_steps is {num_sampling_steps} and timestep_respacing is {timestep_respacing!r}; "
                "both choose the steps of sampling, so give one of them"
            )
        if num_sampling_steps is not None:
            timestep_respacing = str(checked_steps(num_sampling_steps, diffusion_steps))
        self.use_kl = use_kl
        self.predict_xstart = predict_xstart
        self.learn_sigma = learn_sigma
        self.cfg_scale = cfg_scale
        self.cfg_channel = cfg_channel
        self.original_masks = original_masks
        self.timesteps = respaced(diffusion_steps, timestep_respacing or "")  # as the network counts them
        self.num_steps = len(self.timesteps)
        self.tables = tables = DiffusionTables(noise_betas(noise_schedule, diffusion_steps)).kept(self.timesteps)

        # Logarithms of the variance: the one that a step adds and the posterior's, between which it is learned.
        self._log_betas = np.log(tables.betas)
        self._log_posterior = tables.posterior_log_variance_clipped
        if not learn_sigma:  # then there is one; the first step has no other choice than the posterior's
            large = np.append(self._log_posterior[:1], self._log_betas[1:])
            self._log_betas = self._log_posterior if sigma_small else large
        self._bound_weight = self.num_steps / 1000 if rescale_learned_sigmas else 1.0

        # What training looks up in a compiled step.
        self._times = _tensor(self.timesteps)
        self._signal = _tensor(tables.sqrt_alphas_cumprod)
        self._spread = _tensor(tables.sqrt_one_minus_alphas_cumprod)
        self._first_signal, self._first_spread = (
            _tensor(tables.sqrt_alphas_cumprod[0]),
            _tensor(tables.sqrt_one_minus_alphas_cumprod[0]),
        )
        self._recip = _tensor(tables.sqrt_recip_alphas_cumprod)
        self._recipm1 = _tensor(tables.sqrt_recipm1_alphas_cumprod)
        self._coef1 = _tensor(tables.posterior_mean_coef1)
        self._coef2 = _tensor(tables.posterior_mean_coef2)
        self._larger = _tensor(self._log_betas)
        self._smaller = _tensor(self._log_posterior)
        self._weights = _tensor(self._error_weights())

    def _error_weights(self) -> np.ndarray:
        """of the squared error at each step"""
        return np.ones(self.num_steps)

    # sampling: numpy

    def _sample(self, model: GuidedModel, z, mask, noise, size, steps: Iterable[int]) -> np.ndarray:
        if mask is not None:
            # The noisiest step (B, T) in which each frame takes part: n for those that start as noise.
            first = (mask * np.float32(self.num_steps)).astype(int)
            if not self.original_masks:
                first[mask == 0] = -1
        for step in steps:
            i = self.num_steps - 1 - step
            if mask is None:
                z = self._step(z, model(z, self.timesteps[i]), i, noise, step)
                continue
            if (first == i).any():
                z = np.where(over_frames(first == i), self._noised(z, noise(step, "renoise"), i), z)
            x_mask = first > i if self.original_masks else first >= i
            cleaner = self._step(z, model(z, self.timesteps[i], x_mask), i, noise, step)
            z = np.where(over_frames(first >= i), cleaner, z)
        return z

    def _noised(self, z: np.ndarray, noise: np.ndarray, i: int) -> np.ndarray:
        tables = self.tables
        return float(tables.sqrt_alphas_cumprod[i]) * z + float(tables.sqrt_one_minus_alphas_cumprod[i]) * noise

    def _step(self, z: np.ndarray, out: np.ndarray, i: int, noise: Callable[[int, str], np.ndarray], step: int):
        """From level i to the next cleaner one."""
        tables, c = self.tables, z.shape[1]
        _check_channels(out.shape[1], c, self.learn_sigma)
        if self.predict_xstart:
            x0 = out[:, :c]
        else:
            x0 = float(tables.sqrt_recip_alphas_cumprod[i]) * z
            x0 = x0 - float(tables.sqrt_recipm1_alphas_cumprod[i]) * out[:, :c]
        mean = float(tables.posterior_mean_coef1[i]) * x0 + float(tables.posterior_mean_coef2[i]) * z
        if i == 0:
            return mean
        log_variance = np.float32(self._log_betas[i])
        if self.learn_sigma:
            share = (out[:, c:] + 1) / 2  # of the larger one; not held to [0, 1]
            log_variance = share * log_variance + (1 - share) * np.float32(self._log_posterior[i])
        return mean + np.exp(0.5 * log_variance) * noise(step, "step")

    # training: tensors

    def draw_t(self, rng: np.random.Generator, batch: int, size=None) -> np.ndarray:
        return rng.integers(0, self.num_steps, batch, np.int32)

    def times_at(self, shares: np.ndarray) -> np.ndarray:
        return np.floor(np.asarray(shares) * self.num_steps).astype(np.int32)

    def mean_answer(self, mean: np.ndarray) -> np.ndarray:
        answer = mean if self.predict_xstart else np.zeros_like(mean)
        return np.concatenate([answer, np.zeros_like(mean)]) if self.learn_sigma else answer

    def training_losses(self, model, x0, t, noise, x_mask=None, **cond):
        error, bound = self.loss_terms(model, x0, t, noise, x_mask, **cond)
        return bound if self.use_kl else error + bound

    def loss_terms(self, model, x0, t, noise, x_mask=None, **cond):
        """What `training_losses` adds up, each (B,): the squared error, and the variational bound in bits per value.

        The bound trains the variance alone unless `use_kl` is set; without a learned variance or `use_kl` it is 0. It
        is taken as if given frames were noised too, which their mask leaves out.

        Raises:
            ValueError: a mask with `use_kl`, or channels that the schedule does not expect.
        """
        if self.use_kl and x_mask is not None:
            raise ValueError("use_kl trains without frame masks; leave mask_ratios out, or use_kl")
        c = x0.shape[1]
        t = t.astype(ms.int32)
        signal, spread = _at(self._signal, t), _at(self._spread, t)
        if x_mask is not None:  # given frames are at the first level: noised, but hardly
            frames = x_mask.reshape(x_mask.shape[0], 1, -1, 1, 1)
            signal = ops.where(frames, signal, self._first_signal)
            spread = ops.where(frames, spread, self._first_spread)
        x_t = signal * x0 + spread * noise
        times = ops.gather(self._times, t, 0)
        out = model(x_t, times, **cond) if x_mask is None else model(x_t, times, x_mask=x_mask, **cond)
        _check_channels(out.shape[1], c, self.learn_sigma)

        prediction = mint.narrow(out, 1, 0, c)
        error = mint.square(prediction - (x0 if self.predict_xstart else noise))
        error = mean_over_frames(error, x_mask) * ops.gather(self._weights, t, 0)
        if not (self.use_kl or self.learn_sigma):
            return error, ops.zeros_like(error)
        if not self.use_kl:
            prediction = ops.stop_gradient(prediction)
        bound = self._bound(x0, x_t, t, prediction, mint.narrow(out, 1, c, c) if self.learn_sigma else None)
        return error, mean_over_frames(bound, x_mask) * (self.num_steps if self.use_kl else self._bound_weight)

    def _bound(self, x0, x_t, t, prediction, values):
        """Bits for each value (B, C, T, H, W): KL(q || p) between a step's posteriors, at the first the likelihood."""
        coef1, coef2 = _at(self._coef1, t), _at(self._coef2, t)
        larger, smaller = _at(self._larger, t), _at(self._smaller, t)
        if not self.predict_xstart:
            prediction = _at(self._recip, t) * x_t - _at(self._recipm1, t) * prediction
        mean, true_mean = coef1 * prediction + coef2 * x_t, coef1 * x0 + coef2 * x_t
        log_variance = larger
        if values is not None:
            share = (values + 1) / 2
            log_variance = share * larger + (1 - share) * smaller
        distance = mint.square(true_mean - mean) * mint.exp(-log_variance)
        divergence = 0.5 * (log_variance - smaller - 1 + mint.exp(smaller - log_variance) + distance)
        first = t.reshape(-1, 1, 1, 1, 1) == 0
        nats = ops.where(first, -_log_likelihood(x0, mean, 0.5 * log_variance), divergence)
        return nats / math.log(2)


def _tensor(table) -> Tensor:
    return Tensor(np.asarray(table, np.float32))


def _at(table: Tensor, t: Tensor) -> Tensor:
    """The table's values at t (B,), beside latents: (B, 1, 1, 1, 1)"""
    return ops.gather(table, t, 0).reshape(-1, 1, 1, 1, 1)


def _log_likelihood(x, mean, log_scale):
    """The logarithm of a normal distribution's mass in the bin of x, 2/255 wide; the bins at -1 and 1 are open.

    In fp32 throughout, as networks are trained: far from the mean the difference of two probabilities is rounding.
    """
    centred, scale = x - mean, mint.exp(-log_scale)
    below_upper, below_lower = _normal_cdf(scale * (centred + 1 / 255)), _normal_cdf(scale * (centred - 1 / 255))
    mass = ops.where(x < -0.999, below_upper, ops.where(x > 0.999, 1 - below_lower, below_upper - below_lower))
    return mint.log(ops.where(mass > 1e-12, mass, Tensor(1e-12, ms.float32)))


def _normal_cdf(x):
    """its tanh approximation"""
    return 0.5 * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _tanh(x):
    """tanh to the last digit of fp32, and its slope 1 - tanh^2 of that, which decide what is left in the tails.
    MindSpore's own is off by 1e-4 on a CPU."""
    far = mint.exp(-2 * mint.abs(x))
    value = ops.stop_gradient(mint.sign(x) * (1 - 2 * far / (1 + far)))
    return value + (1 - value * value) * (x - ops.stop_gradient(x))


def _check_channels(found: int, latents: int, learn_sigma: bool) -> None:
    wanted = 2 * latents if learn_sigma else latents
    if found != wanted:
        raise ValueError(
            f"the network answers with {found} channels, not {wanted}, for latents of {latents}; "
            f"learn_sigma is {learn_sigma}"
        )
