"""The loss of a video autoencoder: L1 + LPIPS + KL + outlier penalty, plus two more terms for two-stage models.

L1 and KL are summed over a frame and averaged over frames, as in latent diffusion (arXiv 2112.10752); LPIPS, one number
per frame, is multiplied by the frame's number of values. The outlier penalty is Movie Gen's (arXiv 2410.13720, section
3.1.1): it penalises latents that stand out in their frame, which would show as bright spots.

A two-stage model has a target, the first stage's latents, and a code, the second stage's reconstruction of them.
Open-Sora 1.2 trains the second stage on their distance before it trains on pixels, and initially also keeps the latents
of an image close to its target: the identity loss.
"""

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import Tensor, mint, nn, ops

from mg.config import require
from mg.losses.lpips import LPIPS
from mg.models.layers.layout import swap_frames
from mg.models.layers.portable import root


@dataclass
class LossConfig:
    """Weights of the loss; a weight of 0 leaves its term out.

    Args:
        pixel_weight: weight of L1 and LPIPS together; 0 trains a two-stage model without decoding pixels.
        pixel_error: l1 | l2, the squared error, whose minimum is the highest PSNR.
        perceptual_weight: weight of LPIPS (VGG16), relative to L1's 1.
        lpips_weights: LPIPS weights written by `mg-convert-lpips`.
        kl_weight: weight of the KL divergence from a standard normal.
        kl_per_clip: sum the divergence over a clip and average over clips, as Open-Sora 1.2 does, instead of summing
            over a frame and averaging over frames.
        outlier_weight: weight of Movie Gen's outlier penalty (1e5 in the paper).
        outlier_range: latents within this many standard deviations of their frame's mean are not penalised.
        outlier_per_channel: judge each latent value within its channel, as mindone does, instead of using the paper's
            norm over channels.
        latent_weight: weight of the L1 distance between the first stage's latents and the second's reconstruction of
            them, summed over a frame and averaged over frames.
        identity_weight: weight of the same distance between an image's first-stage and second-stage latents; not used
            for videos.
        detach_latents: train only the second stage with these two distances: no gradient reaches the first through its
            latents as the target or, without pixels, in any way. Otherwise it could learn latents that are easy to
            reconstruct but carry no information.
    """

    pixel_weight: float = 1.0
    pixel_error: Literal["l1", "l2"] = "l1"
    perceptual_weight: float = 1.0
    lpips_weights: str = "models/lpips_vgg.safetensors"
    kl_weight: float = 1e-6
    kl_per_clip: bool = False
    outlier_weight: float = 0.0
    outlier_range: float = 3.0
    outlier_per_channel: bool = False
    latent_weight: float = 0.0
    identity_weight: float = 0.0
    detach_latents: bool = True

    def __post_init__(self):
        for name in (
            "pixel_weight",
            "perceptual_weight",
            "kl_weight",
            "outlier_weight",
            "outlier_range",
            "latent_weight",
            "identity_weight",
        ):
            require(getattr(self, name) >= 0, self, name, "at least 0")


class AutoencoderLoss(nn.Cell):
    """Loss of a reconstruction and of its latents, in fp32.

    Inputs: x, y (B, 3, T, H, W) in [-1, 1], y None if the loss uses no pixels; z, mean, logvar (B, z, t, h, w); without
    a posterior logvar is None, and there is no KL; code, target (B, c, T, h, w), of a two-stage model; valid (T,), 1
    for frames that count and 0 for others, None for all. Latents always count.

    Returns:
        The loss to minimise, and its unweighted terms as a vector in the order of `terms`.

    Raises:
        ValueError: identity_weight is set, but target and z have different numbers of channels.

    Attributes:
        terms: l1 (or l2) and lpips with pixels, kl, outlier, then latent and identity if one of these has a weight.
        pixels, latents: whether the loss has terms for the reconstruction, and for code and target.
        detached: whether to stop the gradient before the first stage of a two-stage model.
    """

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config
        self.pixels = config.pixel_weight > 0
        self.latents = config.latent_weight > 0 or config.identity_weight > 0
        self.detached = config.detach_latents and not self.pixels
        self.terms: tuple[str, ...] = (config.pixel_error, "lpips") if self.pixels else ()
        self.terms += ("kl", "outlier")
        self.terms += ("latent", "identity") if self.latents else ()
        self.lpips = LPIPS("vgg", config.lpips_weights) if self.pixels and config.perceptual_weight else None

    def construct(self, x, y, z, mean, logvar, code=None, target=None, valid=None):
        config = self.config
        b, c, t, h, w = x.shape
        loss = zero = ops.zeros((), ms.float32)
        terms = ()
        if self.pixels:
            error = _mean(ops.abs(x - y) if config.pixel_error == "l1" else ops.square(x - y), valid)
            perceptual = zero
            if self.lpips is not None:
                distance = self.lpips(_frames(x), _frames(y))  # (B*T, 1, 1, 1)
                perceptual = _mean(distance.reshape(b, 1, t, 1, 1), valid)
            loss = config.pixel_weight * (error + config.perceptual_weight * perceptual) * (c * h * w)
            terms = (error, perceptual)

        kl = zero
        if logvar is not None:
            frames = t if valid is None else valid.sum()
            kl = 0.5 * (mean.square() + ops.exp(logvar) - 1.0 - logvar).sum() / b
            kl = kl if config.kl_per_clip else kl / frames
        outlier = self._outlier_penalty(z) if config.outlier_weight else zero
        loss = loss + config.kl_weight * kl + config.outlier_weight * outlier
        terms = terms + (kl, outlier)

        if self.latents:
            target = ops.stop_gradient(target) if config.detach_latents else target
            latent = _mean(ops.abs(target - code), valid) * _size(target) if config.latent_weight else zero
            identity = self._identity(target, z, valid) if config.identity_weight else zero
            loss = loss + config.latent_weight * latent + config.identity_weight * identity
            terms = terms + (latent, identity)
        return loss, ops.stop_gradient(ops.cat([term.reshape(1) for term in terms]))

    def _identity(self, target: Tensor, z: Tensor, valid: Tensor | None) -> Tensor:
        """|target - z| of images, summed over one image, which may follow frames that do not count"""
        frames = target.shape[2]
        if z.shape[2] > 1 or (valid is None and frames > 1):
            return ops.zeros((), ms.float32)
        if target.shape[1] != z.shape[1]:
            raise ValueError(
                f"identity_weight must be 0: the first stage's latents have {target.shape[1]} channels, the second's "
                f"{z.shape[1]}"
            )
        distance = mint.mean(ops.abs(mint.narrow(target, 2, frames - 1, 1) - z)) * _size(target)
        return distance if valid is None else distance * (valid.sum() == 1).astype(ms.float32)

    def _outlier_penalty(self, z: Tensor) -> Tensor:
        """mean over positions of max(|z - mean| - r std, 0), mean and std taken over each frame"""
        centred = z - mint.mean(z, (3, 4), True)
        variance = mint.mean(centred.square(), (3, 4), True)  # (B, z, t, 1, 1)
        if self.config.outlier_per_channel:
            distance, deviation = ops.abs(centred), root(variance + 1e-12)
        else:
            distance = root(centred.square().sum(axis=1) + 1e-12)  # (B, t, h, w)
            deviation = root(variance.sum(axis=1) + 1e-12)
        return mint.mean(ops.relu(distance - self.config.outlier_range * deviation))


def _frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)"""
    b, c, t, h, w = x.shape
    return swap_frames(x).reshape(b * t, c, h, w)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of (B, C, T, H, W) over the valid frames"""
    if valid is None:
        return mint.mean(values)
    return (mint.mean(values, (0, 1, 3, 4)) * valid).sum() / valid.sum()


def _size(x: Tensor) -> int:
    """Number of values in a frame of (B, C, T, H, W)"""
    _, c, _, h, w = x.shape
    return c * h * w
