"""A denoiser's gradients under the loss of its schedule, compiled for every shape of latents."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

from mg.collectives import Group
from mg.diffusion.networks import Denoiser
from mg.diffusion.schedules import Schedule
from mg.training.optim import OptimConfig
from mg.training.step import Step
from mg.training.updater import Gather


class DenoiserStep(Step):
    """The step of a denoiser.

    Args:
        model, config, total_steps, dtype, world_size, sharers: as of `Step`.
        schedule: how latents are noised, and the loss.
    """

    def __init__(
        self,
        model: Denoiser,
        schedule: Schedule,
        config: OptimConfig,
        total_steps: int,
        dtype: str = "fp32",
        world_size: int = 1,
        sharers: Group | None = None,
    ):
        super().__init__(model, config, total_steps, dtype, world_size, sharers)
        self._losses = _Losses(model, schedule)
        self._accumulate = _Denoise(self._losses, self.updater)

    def accumulate(
        self,
        x0: np.ndarray,
        t: np.ndarray,
        noise: np.ndarray,
        x_mask: np.ndarray | None,
        y: np.ndarray,
        mask: np.ndarray | None,
        *sizes: np.ndarray,
    ) -> None:
        """Add a batch's gradients.

        Args:
            x0: latents (B, C, T, H, W).
            t: (B,), as `Schedule.draw_t` has them.
            noise: standard normal, like x0.
            x_mask: (B, T) bool, False at frames that are given; None gives none.
            y: captions (B, 1, L, D), as long as the network's are, or classes (B,).
            mask: (B, L) bool, True at tokens of the caption; None where there is no padding.
            sizes: the network's `extra_inputs`, (B,) each.
        """
        report = self._accumulate(self._scale(self.updater), *_tensors(x0, t, noise, x_mask, y, mask, *sizes))
        self._reports.append((("loss",), report))

    def losses(self, *batch: np.ndarray | None) -> np.ndarray:
        """The loss of each sample (B,) of a batch, given as to `accumulate`, of which nothing is learnt."""
        return self._losses(*_tensors(*batch)).asnumpy()


def _tensors(*values: np.ndarray | None) -> list[Tensor | None]:
    return [None if value is None else Tensor(value) for value in values]


class _Losses(nn.Cell):
    """The denoiser's loss of each sample, (B,)."""

    def __init__(self, model, schedule):
        super().__init__(auto_prefix=False)
        self.model, self.schedule = model, schedule

    def construct(self, x0, t, noise, x_mask, y, mask, *sizes):
        model = self.model

        def predict(x, t, x_mask=None):  # not the call of a cell, whose inputs by name have no order in a graph
            return model.construct(x, t, y, mask, x_mask, *sizes)

        return self.schedule.training_losses(predict, x0, t, noise, x_mask)


class _Denoise(Gather):
    """The denoiser's gradients; returns its mean loss, (1,)."""

    def __init__(self, losses, updater):
        super().__init__(updater)
        self.losses = losses
        self.differentiate = ms.value_and_grad(self._scaled_loss, None, updater.parameters, has_aux=True)

    def _scaled_loss(self, scale, *batch):
        loss = mint.mean(self.losses(*batch))
        return loss * scale, loss

    def construct(self, scale, x0, t, noise, x_mask, y, mask, *sizes):
        (_, loss), gradients = self.differentiate(scale, x0, t, noise, x_mask, y, mask, *sizes)
        self.gather(gradients)
        return loss.reshape(1)
