"""What every schedule can be asked for."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from mindspore import Tensor

from mg.diffusion.schedules.frame_masks import checked_frame_mask
from mg.diffusion.schedules.guidance import GuidedModel

Noise = Callable[[int, str], Any]  # see `Schedule.sample`
Size = tuple[float, float, float]  # height and width in pixels, latent frames


class Schedule:
    """How latents are noised in training, and how noise becomes latents.

    The network is any callable `model(x, t, **cond)` on tensors: x (B, C, T, H, W), t (B,) in fp32 and on the scale of
    0 to 1000 that it was trained on; it gets x_mask (B, T) too where some frames are given, False for these. It returns
    (B, C or 2C, T, H, W) in fp32.

    Attributes:
        name: what `create_schedule` calls it.
        trains, samples, takes_frame_mask: what it can do; what it cannot is a ValueError.
        num_steps: steps of sampling, each with one call of the network.
        cfg_scale: of classifier-free guidance; 1 is none, and half the work.
        cfg_channel: how many of the latents' channels are guided; None, all.
    """

    name: str
    trains = True
    samples = True
    takes_frame_mask = True
    num_steps: int
    cfg_scale: float
    cfg_channel: int | None = None

    def sample(
        self,
        model: Callable,
        z,
        *,
        cond: Mapping[str, Any],
        null: Mapping[str, Any],
        noise: Noise | None = None,
        frame_mask=None,
        size: Size | None = None,
        progress: Callable[[range], Iterable[int]] | None = None,
    ) -> np.ndarray:
        """Latents from noise.

        The network runs on its device; what a step does with its answer is the same little arithmetic everywhere, in
        numpy on the host.

        Args:
            model: see the class.
            z: (B, C, T, H, W), standard normal noise; frames with a mask below 1 hold the latents that are given.
            cond: the network's other inputs by name, of B samples each.
            null: what stands in their place for the half without a condition, of B samples or one for all: y, a null
                caption. What it does not name is the same in both halves, the mask of the captions too: a null caption
                is cut to the length of its sample's, as Open-Sora's networks are trained.
            noise: fresh noise (B, C, T, H, W) for a step, counted from 0, and a purpose: "step" for what a step adds,
                "renoise" for frames that are noised when their turn comes. It is asked only where noise is needed, so
                it must not depend on what was asked before: see `SampleNoise`. None where no step needs any.
            frame_mask: (B, T) in [0, 1]: 1 generates a frame, 0 keeps it to the bit, between them it is noised so far
                and generated from there. None generates all.
            size: height and width in pixels and number of latent frames, which rflow's timestep transform asks for.
            progress: wraps the range of the steps, such as `tqdm`.

        Returns:
            (B, C, T, H, W) in fp32.

        Raises:
            ValueError: the schedule does not sample or takes no masks, or the shapes do not fit.
        """
        if not self.samples:
            raise ValueError(f"{self.name} only trains; sample with iddpm, which fits the same networks")
        z = _array(z)
        if z.ndim != 5:
            raise ValueError(f"latents are (B, C, T, H, W); these have the shape {z.shape}")
        mask = checked_frame_mask(frame_mask, z.shape)
        if mask is not None and not self.takes_frame_mask:
            raise ValueError(f"{self.name} can keep no frames; use iddpm or rflow with a frame mask")
        if self.cfg_channel is not None and not 1 <= self.cfg_channel <= z.shape[1]:
            raise ValueError(f"cfg_channel is {self.cfg_channel}; the latents have {z.shape[1]} channels")
        guided = GuidedModel(model, cond, null, self.cfg_scale, self.cfg_channel)
        steps = range(self.num_steps)

        def draw(step: int, purpose: str) -> np.ndarray:
            if noise is None:
                raise ValueError(f"{self.name} needs noise in its steps; give `noise`, such as a SampleNoise")
            drawn = _array(noise(step, purpose))
            if drawn.shape != z.shape:
                raise ValueError(f"the noise of step {step} has the shape {drawn.shape}; the latents' is {z.shape}")
            return drawn

        return self._sample(guided, z, mask, draw, size, progress(steps) if progress else steps)

    def training_losses(
        self, model: Callable, x0: Tensor, t: Tensor, noise: Tensor, x_mask: Tensor | None = None, **cond
    ) -> Tensor:
        """The loss of each sample (B,), in fp32; runs inside a compiled step.

        Args:
            model: see the class.
            x0: latents (B, C, T, H, W).
            t: (B,), from `draw_t`.
            noise: standard normal, like x0.
            x_mask: (B, T) bool; False frames are given to the network as they are, and have no part in the loss. None:
                all are noised.
            cond: the network's other inputs.

        Raises:
            ValueError: the schedule does not train.
        """
        raise ValueError(f"{self.name} only samples; train with iddpm, which fits the same networks")

    def draw_t(self, rng: np.random.Generator, batch: int, size: Size | None = None) -> np.ndarray:
        """Times (B,) for `training_losses`.

        Args:
            rng: where draws are to depend on a sample's place alone, one for each sample, or one for the batch of all
                workers, whose parts they take.
            batch: how many.
            size: as in `sample`.

        Raises:
            ValueError: the schedule does not train.
        """
        raise ValueError(f"{self.name} only samples; train with iddpm, which fits the same networks")

    def times_at(self, shares: np.ndarray) -> np.ndarray:
        """Times for `training_losses` at shares of the schedule, from 0, where latents are clean, up to below 1, where
        they are noise; of the shape of `shares`.

        Raises:
            ValueError: the schedule does not train.
        """
        raise ValueError(f"{self.name} only samples; train with iddpm, which fits the same networks")

    def mean_answer(self, mean: np.ndarray) -> np.ndarray:
        """What a network answers that sees nothing and knows the mean of each channel of the latents (C,), the mean of
        what is to be predicted: (C,), or (2C,) with the middle of the variance's range behind it.

        Raises:
            ValueError: the schedule does not train.
        """
        raise ValueError(f"{self.name} only samples; train with iddpm, which fits the same networks")

    def _sample(
        self,
        model: GuidedModel,
        z: np.ndarray,
        mask: np.ndarray | None,
        noise: Callable[[int, str], np.ndarray],
        size: Size | None,
        steps: Iterable[int],
    ) -> np.ndarray:
        """`sample` of checked inputs"""
        raise NotImplementedError


def checked_steps(steps: int, most: int | None = None) -> int:
    """A number of sampling steps, if it is one.

    Raises:
        ValueError: it is none, or more than `most`.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or (most and steps > most):
        wanted = f"a whole number from 1 to {most}" if most else "a whole number, at least 1"
        raise ValueError(f"num_sampling_steps is {steps!r}; it must be {wanted}")
    return steps


def _array(values) -> np.ndarray:
    return np.asarray(values.asnumpy() if isinstance(values, Tensor) else values, np.float32)
