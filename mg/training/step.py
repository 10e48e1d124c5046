"""One training step: the gradients of a batch, compiled for every shape, and the update, compiled only once.

In adversarial training each batch computes the autoencoder's gradients first, with the generator loss added and the
discriminator frozen, and then the discriminator's, on the same reconstruction. The host decides by the number of the
update which of the two run. Autoencoder and discriminator are updated the same way, each by an `Updater`.

With several workers, each has a part of the global batch: the gradients, the discriminator's statistics, the adaptive
weight and everything reported are those of the global batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops

from mg.collectives import Group
from mg.losses.adversarial import (
    AdaptiveBalance,
    DiscriminatorLossConfig,
    GeneratorLossConfig,
    discriminator_loss,
    generator_loss,
)
from mg.losses.reconstruction import AutoencoderLoss
from mg.models.autoencoder import VideoAutoencoder
from mg.models.discriminator import NLayerDiscriminator3D
from mg.runtime import WorkerMean
from mg.training.optim import OptimConfig, OptimizerConfig
from mg.training.updater import Gather, Updater, UpdateResult


@dataclass(frozen=True)
class StepResult(UpdateResult):
    """What an update of the autoencoder reports, and the discriminator's result if it was updated too.

    Attributes:
        loss, terms: means over the update's batches.
    """

    loss: float
    terms: dict[str, float]
    discriminator: UpdateResult | None = None


@dataclass(frozen=True)
class Adversary:
    """What adversarial training adds: the discriminator, its loss and the generator loss, and its optimizer."""

    discriminator: NLayerDiscriminator3D
    gen_loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    disc_loss: DiscriminatorLossConfig = field(default_factory=DiscriminatorLossConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)


class Step:
    """Accumulates the gradients of one network over batches, and updates its parameters.

    A subclass defines `accumulate`, which adds a batch's gradients to the updater's buffers and its report to
    `_reports`.

    Args:
        model: put into training mode.
        total_steps: updates of the whole run, for the learning rate schedule.
        dtype: of the model.
        world_size: workers that share the batches.
        sharers: the workers that shard optimizer states, gradients and averages; None if each has the whole.

    Attributes:
        done: updates made or skipped so far.
        updater: of the model.
        discriminator, discriminator_updater: of an adversary; None without one.
    """

    discriminator: NLayerDiscriminator3D = None
    discriminator_updater: Updater = None

    def __init__(
        self,
        model: nn.Cell,
        config: OptimConfig,
        total_steps: int,
        dtype: str = "fp32",
        world_size: int = 1,
        sharers: Group | None = None,
    ):
        model.set_train()
        self.done = 0
        self.world_size = world_size
        self.over_workers = WorkerMean(world_size)
        parameters = model.trainable_params()
        self.updater = Updater(parameters, config, total_steps, dtype, world_size, config.ema_decay, sharers)
        self.share = 1 / config.accumulation
        self._reports: list[tuple[tuple[str, ...], Tensor]] = []  # of each batch: the terms' names and values

    def accumulate(self, *inputs) -> None:
        """Add a batch's gradients."""
        raise NotImplementedError

    def update(self) -> StepResult:
        """Update the parameters with the gradients gathered since the last update, and clear those."""
        values: dict[str, list] = {}
        for names, report in self._reports:
            for name, value in zip(names, report.asnumpy()):
                values.setdefault(name, []).append(value)
        means = {name: float(np.mean(each)) for name, each in values.items()}
        if self.world_size > 1:
            over_all = self.over_workers(Tensor(list(means.values()), ms.float32)).asnumpy()
            means = dict(zip(means, over_all.tolist()))
        # One check covers all workers: the mean over them is finite only if all their losses are.
        result = self.updater.update(np.isfinite(means["loss"]))
        discriminator = self._update_others(means, result)
        self._reports = []
        self.done += 1
        return StepResult(**vars(result), loss=means.pop("loss"), terms=means, discriminator=discriminator)

    def state(self) -> dict[str, np.ndarray]:
        """Everything an exact resume needs besides the networks' own parameters."""
        return self.updater.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state` returned, with the same names and shapes."""
        self.updater.load_state(state)

    def _update_others(self, means: dict[str, float], result: UpdateResult) -> UpdateResult | None:
        """Make the other updates of this step."""
        return None

    def _scale(self, updater: Updater) -> Tensor:
        """The factor on a batch's loss: its share of the update, times the loss scale."""
        return updater.loss_scale() * self.share


class TrainStep(Step):
    """The training step of an autoencoder.

    Args:
        model, config, total_steps, dtype, sharers: as in `Step`.
        loss: of the autoencoder.
        world_size: workers; the adversary's discriminator must have been made for the same number.
        adversary: trains a discriminator, and the model against it; when each starts depends on `done`.
    """

    def __init__(
        self,
        model: VideoAutoencoder,
        loss: AutoencoderLoss,
        config: OptimConfig,
        total_steps: int,
        dtype: str = "fp32",
        world_size: int = 1,
        adversary: Adversary | None = None,
        sharers: Group | None = None,
    ):
        super().__init__(model, config, total_steps, dtype, world_size, sharers)
        self.adversary = adversary
        self._accumulate = _Accumulate(model, loss, self.updater, judged=adversary is not None)
        if adversary is not None:
            self.discriminator = adversary.discriminator
            self.discriminator.set_train()
            updates = max(total_steps - adversary.disc_loss.disc_start, 1)
            parameters = self.discriminator.trainable_params()
            self.discriminator_updater = Updater(
                parameters, adversary.optim, updates, dtype, world_size, sharers=sharers
            )
            self._compete = _Compete(model, loss, adversary, self.updater, world_size)
            self._judge = _Judge(adversary, self.discriminator_updater)
            self._track = _Track(self.discriminator)
        self._statistics: list[tuple[Updater, tuple[Tensor, ...]]] = []

    def accumulate(
        self,
        x: np.ndarray,
        noise: np.ndarray,
        generators: Sequence[np.random.Generator] | None = None,
        valid: np.ndarray | None = None,
    ) -> None:
        """Add a batch's gradients.

        Args:
            x: (B, 3, T, H, W) in [-1, 1].
            noise: standard normal, of the latents' shape.
            generators: one per video, for the discriminator's dropout masks; None disables dropout.
            valid: (T,), which frames count, if the model has aligned them; not with an adversary.
        """
        video, noise = Tensor(x), Tensor(noise)
        valid = None if valid is None else Tensor(valid)
        scale = self._scale(self.updater)
        if self.adversary is not None and self.done >= self.adversary.gen_loss.gen_start:
            masks = self._masks(x.shape, generators)
            report, *made, statistics = self._compete(video, noise, scale, Tensor(0.0, ms.float32), *masks)
            self._reports.append((self._compete.terms, report))
            self._statistics.append((self.updater, statistics))
        else:
            report, *made = self._accumulate(video, noise, scale, valid)
            self._reports.append((self._accumulate.terms, report))
        if self.adversary is not None and self.done >= self.adversary.disc_loss.disc_start:
            masks = self._masks(x.shape, generators) + self._masks(x.shape, generators)
            report, *statistics = self._judge(video, *made, self._scale(self.discriminator_updater), *masks)
            self._reports.append((self._judge.terms, report))
            self._statistics += [(self.discriminator_updater, each) for each in statistics]

    def state(self):
        state = super().state()
        if self.discriminator_updater is not None:
            state |= {f"discriminator.{name}": value for name, value in self.discriminator_updater.state().items()}
        return state

    def load_state(self, state):
        super().load_state(state)
        if self.discriminator_updater is not None:
            prefix = "discriminator."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            self.discriminator_updater.load_state(own)

    def _update_others(self, means, result):
        """Update the discriminator and its statistics."""
        judged = self.adversary is not None and self.done >= self.adversary.disc_loss.disc_start
        discriminator = self.discriminator_updater.update(np.isfinite(means["disc"])) if judged else None
        moved = {self.updater: result.updated, self.discriminator_updater: judged and discriminator.updated}
        for updater, statistics in self._statistics:
            if moved[updater]:  # statistics that are not finite must not be kept either
                self._track(*statistics)
        self._statistics = []
        return discriminator

    def _masks(self, shape: tuple[int, ...], generators: Sequence[np.random.Generator] | None) -> tuple[Tensor, ...]:
        return () if generators is None else tuple(map(Tensor, self.discriminator.draw_masks(shape, generators)))


# The parts hold parameters of the networks and must not rename them, as a Cell does with its children: auto_prefix.


class _Accumulate(Gather):
    """The autoencoder's gradients under its loss. Returns a vector of the loss and its terms, and the reconstruction if
    it is `judged`; pixels are decoded only if the loss or a discriminator needs them."""

    def __init__(self, model, loss, updater, judged):
        super().__init__(updater)
        self.model, self.loss, self.judged = model, loss, judged
        self.terms = ("loss", *loss.terms)
        self.differentiate = ms.value_and_grad(self._scaled_loss, None, updater.parameters, has_aux=True)

    def _scaled_loss(self, x, noise, scale, valid):
        of_two_stages = (valid, self.loss.detached) if self.model.two_stages else ()
        latents = self.model.latents(x, noise, *of_two_stages)
        y = self.model.reconstruct(latents["code"], x.shape) if self.loss.pixels or self.judged else None
        loss, terms = self.loss(x, y, valid=valid, **latents)
        outputs = (loss * scale, loss, terms)
        return outputs + (y,) if self.judged else outputs

    def construct(self, x, noise, scale, valid):
        outputs, gradients = self.differentiate(x, noise, scale, valid)
        loss, terms = outputs[1:3]
        self.gather(gradients)
        return (ops.cat((loss.reshape(1), terms)),) + outputs[3:]


class _Compete(Gather):
    """The autoencoder's gradients under its loss and the generator loss, combined by `AdaptiveBalance`.

    Returns a vector of the loss and its terms, the reconstruction, and the discriminator's statistics on it.
    """

    def __init__(self, model, loss, adversary, updater, world_size):
        super().__init__(updater)
        self.model, self.loss, self.discriminator = model, loss, adversary.discriminator
        self.disc_weight = adversary.gen_loss.disc_weight
        self.balance = AdaptiveBalance(model, self.disc_weight, world_size)
        self.terms = ("loss", *loss.terms, "gen", "adaptive_weight")
        self.differentiate = ms.value_and_grad(self._scaled_loss, 3, updater.parameters, has_aux=True)

    def _scaled_loss(self, x, noise, scale, probe, *masks):
        latents = self.model.latents(x, noise)
        h = self.model.features(latents["code"], x.shape[2])
        y = self.model.picture(h, x.shape)
        reconstruction, fake = self.balance(y, ops.stop_gradient(h), scale, probe)
        loss, terms = self.loss(x, reconstruction, **latents)
        logits, statistics = self.discriminator.forward(fake, masks)
        generator = generator_loss(logits)
        return (loss + generator) * scale, loss, terms, generator, y, statistics

    def construct(self, x, noise, scale, probe, *masks):
        outputs, gradients = self.differentiate(x, noise, scale, probe, *masks)
        loss, terms, generator, y, statistics = outputs[1:]
        weight, gradients = gradients
        loss = loss + self.disc_weight * weight * generator
        self.gather(gradients)
        return ops.cat((loss.reshape(1), terms, generator.reshape(1), weight.reshape(1))), y, statistics


class _Judge(Gather):
    """The discriminator's gradients on videos and their reconstructions.

    Returns a vector of its loss and mean logits, and its statistics on both.
    """

    terms = ("disc", "logits_real", "logits_fake")

    def __init__(self, adversary, updater):
        super().__init__(updater)
        self.discriminator = adversary.discriminator
        self.kind = adversary.disc_loss.disc_loss_type
        self.differentiate = ms.value_and_grad(self._scaled_loss, None, updater.parameters, has_aux=True)

    def _scaled_loss(self, x, y, scale, *masks):
        half = len(masks) // 2
        real, real_statistics = self.discriminator.forward(x, masks[:half])
        fake, fake_statistics = self.discriminator.forward(y, masks[half:])
        loss = discriminator_loss(real, fake, self.kind)
        report = ops.cat((loss.reshape(1), mint.mean(real).reshape(1), mint.mean(fake).reshape(1)))
        return loss * scale, report, real_statistics, fake_statistics

    def construct(self, x, y, scale, *masks):
        outputs, gradients = self.differentiate(x, y, scale, *masks)
        self.gather(gradients)
        return outputs[1:]


class _Track(nn.Cell):
    """Update the discriminator's running statistics."""

    def __init__(self, discriminator):
        super().__init__(auto_prefix=False)
        self.discriminator = discriminator

    def construct(self, *statistics):
        return self.discriminator.track(*statistics)
