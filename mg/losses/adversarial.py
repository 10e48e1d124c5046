"""Adversarial losses, and VQGAN's balance between reconstruction and generator loss (arXiv 2012.09841).

The weight of the generator loss is |gradient of the reconstruction loss| / |gradient of the generator loss|, both at
the weight of the decoder's last convolution, so that neither drowns the other; with several workers, the gradients of
the global batch. `AdaptiveBalance` computes both within the step's regular backward pass.
"""

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import ParameterTuple, Tensor, mint, nn, ops

from mg.config import require
from mg.models.autoencoder import VideoAutoencoder
from mg.runtime import WorkerMean


@dataclass
class GeneratorLossConfig:
    """What the discriminator adds to the autoencoder's loss.

    Args:
        gen_start: number of updates without it at the start.
        disc_weight: its weight, multiplied by the adaptive one.
    """

    gen_start: int = 0
    disc_weight: float = 0.05

    def __post_init__(self):
        for name in ("gen_start", "disc_weight"):
            require(getattr(self, name) >= 0, self, name, "at least 0")


@dataclass
class DiscriminatorLossConfig:
    """The discriminator's own loss.

    Args:
        disc_start: number of autoencoder updates before the discriminator's first.
        disc_loss_type: hinge | vanilla.
    """

    disc_start: int = 0
    disc_loss_type: Literal["hinge", "vanilla"] = "hinge"

    def __post_init__(self):
        require(self.disc_start >= 0, self, "disc_start", "at least 0")


def generator_loss(fake: Tensor) -> Tensor:
    """The generator's loss; `fake`: the reconstruction's logits, of any shape."""
    return -mint.mean(fake)


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """The discriminator's loss for logits of any shape, positive for real; kind: hinge | vanilla."""
    if kind == "hinge":
        return 0.5 * (mint.mean(ops.relu(1.0 - real)) + mint.mean(ops.relu(1.0 + fake)))
    return 0.5 * (mint.mean(_softplus(-real)) + mint.mean(_softplus(fake)))


def _softplus(x):
    """log(1 + exp(x)), without overflow"""
    return ops.relu(x) + ops.log(1.0 + ops.exp(-ops.abs(x)))


class AdaptiveBalance(nn.Cell):
    """Passes a reconstruction to two losses; in the backward pass, adds their gradients with the adaptive weight.

    Inputs: y (B, 3, T, H, W), the reconstruction; h, the input of the model's last convolution for y; scale, the loss
    scale that both gradients contain; probe, any scalar.

    Returns:
        y for the reconstruction loss and y for the generator loss. The gradient of `probe` is the adaptive weight:
        clamp(|first| / (|second| + 1e-4), 0, 1e4) of their gradients at the last convolution's weight; y's gradient is
        the first loss's + disc_weight * adaptive weight * the second's.
    """

    def __init__(self, model: VideoAutoencoder, disc_weight: float, world_size: int = 1):
        super().__init__(auto_prefix=False)
        self.model = model
        self.over_workers = WorkerMean(world_size)
        self.disc_weight = disc_weight
        self.differentiate = ms.grad(self._product, None, ParameterTuple([model.last_conv.weight]))

    def construct(self, y, h, scale, probe):
        return y, y

    def bprop(self, y, h, scale, probe, out, dout):
        first, second = dout
        # Both in one message: with two, workers might send them in different orders.
        gradients = self.over_workers(ops.cat((self._gradient(h, first), self._gradient(h, second))))  # (2 C, ...)
        halves = mint.chunk(gradients, 2)
        reconstruction, generator = _norm(halves[0]), _norm(halves[1])
        weight = ops.clamp(reconstruction / (generator + 1e-4 * scale), 0.0, 1e4)
        weight = weight + 0.0 * generator  # let an overflow show, instead of a weight of 0
        return first + self.disc_weight * weight * second, ops.zeros_like(h), ops.zeros_like(scale), weight

    def _gradient(self, h, cotangent):
        return self.differentiate(h, cotangent)[0].astype(ms.float32)

    def _product(self, h, cotangent):
        return (self.model.picture(h, cotangent.shape) * cotangent).sum()


def _norm(x):
    return ops.sqrt(x.square().sum())
