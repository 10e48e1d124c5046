"""The loss of a video autoencoder: L1 + LPIPS + KL + outlier penalty.

L1 and KL are summed over a frame and averaged over frames, as in latent diffusion (arXiv 2112.10752); the distance of
LPIPS, one number per frame, counts for every value of it. The outlier penalty is Movie Gen's (arXiv 2410.13720,
section 3.1.1): it presses on latents that stand out of their frame, which would show as bright spots.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn, ops

from mg.config import require
from mg.losses.lpips import LPIPS


@dataclass
class LossConfig:
    """Weights of the loss; a weight of 0 leaves its term out.

    Args:
        perceptual_weight: of LPIPS (VGG16).
        lpips_weights: LPIPS' weights as `tools/convert_lpips.py` writes them.
        kl_weight: of the KL divergence from a standard normal.
        outlier_weight: of Movie Gen's outlier penalty (the paper's weight is 1e5).
        outlier_range: latents within this many standard deviations of their frame's mean are not penalised.
        outlier_per_channel: judge each latent value by its own channel, as mindone does, in place of the paper's norm
            over the channels.
    """

    perceptual_weight: float = 1.0
    lpips_weights: str = "models/lpips_vgg.safetensors"
    kl_weight: float = 1e-6
    outlier_weight: float = 0.0
    outlier_range: float = 3.0
    outlier_per_channel: bool = False

    def __post_init__(self):
        for name in ("perceptual_weight", "kl_weight", "outlier_weight", "outlier_range"):
            require(getattr(self, name) >= 0, self, name, "at least 0")


class AutoencoderLoss(nn.Cell):
    """Loss of a reconstruction and of its latents, in fp32.

    Inputs: x, y (B, 3, T, H, W) in [-1, 1]; z, mean, logvar (B, z, t, h, w); without a posterior logvar is None, and
    there is no KL.

    Returns:
        The loss to minimise, and its unweighted terms as a (4,) vector in the order of `terms`.
    """

    terms = ("l1", "lpips", "kl", "outlier")

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config
        self.lpips = LPIPS("vgg", config.lpips_weights) if config.perceptual_weight else None

    def construct(self, x, y, z, mean, logvar):
        b, c, t, h, w = x.shape
        l1 = ops.abs(x - y).mean()
        zero = ops.zeros((), ms.float32)
        perceptual = self.lpips(_frames(x), _frames(y)).mean() if self.lpips is not None else zero
        kl = zero if logvar is None else 0.5 * (mean.square() + ops.exp(logvar) - 1.0 - logvar).sum() / (b * t)
        outlier = self._outlier_penalty(z) if self.config.outlier_weight else zero
        loss = (
            (l1 + self.config.perceptual_weight * perceptual) * (c * h * w)
            + self.config.kl_weight * kl
            + self.config.outlier_weight * outlier
        )
        return loss, ops.stop_gradient(ops.stack((l1, perceptual, kl, outlier)))

    def _outlier_penalty(self, z: Tensor) -> Tensor:
        """mean over positions of max(|z - mean| - r std, 0), mean and std taken over each frame"""
        centred = z - z.mean(axis=(3, 4), keep_dims=True)
        variance = centred.square().mean(axis=(3, 4), keep_dims=True)  # (B, z, t, 1, 1)
        if self.config.outlier_per_channel:
            distance, deviation = ops.abs(centred), ops.sqrt(variance + 1e-12)
        else:
            distance = ops.sqrt(centred.square().sum(axis=1) + 1e-12)  # (B, t, h, w)
            deviation = ops.sqrt(variance.sum(axis=1) + 1e-12)
        return ops.relu(distance - self.config.outlier_range * deviation).mean()


def _frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)"""
    b, c, t, h, w = x.shape
    return x.transpose(0, 2, 1, 3, 4).reshape(b * t, c, h, w)
