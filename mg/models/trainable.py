"""`TrainableAutoencoder`: the half of an autoencoder that runs inside a larger graph, such as a training step.

Everything here is on tensors, differentiable and without tiles. `mg.codec` calls the same networks tile by tile.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from mg.codec import Geometry, Latents
from mg.models.layers.layout import Enter, Leave, narrow, repeat_edges, split

ms.jit_class(Geometry)  # so that graphs can use it too


class TrainableAutoencoder(nn.Cell):
    """Encoder and decoder, and what a loss needs from them. A model builds two cells, `encoder` and `decoder`.

    The decoder has `features` (everything but its last convolution), `picture` (that convolution) and `last_conv` (its
    cell): adversarial training weights its losses by their gradients there.

    Attributes:
        geometry: how latents relate to pixels.
        recomputed: cell types that `recompute_activations` checkpoints.
        two_stages: the model encodes the latents of a first stage, which its second is trained to reproduce; it then
            has what `mg.models.temporal_vae` has.
    """

    geometry: Geometry
    recomputed: tuple[type[nn.Cell], ...] = ()
    two_stages = False

    def __init__(self):
        super().__init__()
        self.enter, self.leave = Enter(), Leave()  # the networks may use their own layout

    # The networks. A model overrides these if they are not simply called one after the other.

    def encode_moments(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), padded -> mean and log-variance along the channels, (B, 2 z, t, h, w), or only latents"""
        return self.leave(self.encoder(self.enter(x)))

    def before_decoder(self, z: Tensor) -> Tensor:
        """The decoder's input, from z in the layers' layout."""
        return z

    def decode_latents(self, z: Tensor, still: bool = False) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W), where T is lead + (t - lead) * temporal, and H and W are h and w times
        spatial, see `Geometry`.

        Args:
            still: z is an image, t = T = 1; only for models that keep images.
        """
        return self.leave(self.decoder(self.before_decoder(self.enter(z))))

    # Forward.

    def construct(self, x: Tensor) -> Tensor:
        """What a call means inside a graph."""
        return self.forward(x)[0]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Encode and decode. The noise is an input, so that this can be compiled inside a larger graph.

        Args:
            x: (B, 3, T, H, W) in [-1, 1].
            noise: standard normal, of the latents' shape; None uses the posterior's mean. Unused without a posterior.

        Returns:
            Reconstruction (x's shape, fp32), z, mean, logvar.
        """
        found = self.latents(x, noise)
        return self.reconstruct(found["code"], x.shape), found["z"], found["mean"], found["logvar"]

    def latents(self, x: Tensor, noise: Tensor | None = None) -> Latents:
        """The first half of `forward`: everything before the pixel decoder."""
        mean, logvar = self.posterior(x)
        z = mean if logvar is None or noise is None else sample(mean, logvar, noise)
        return {"code": z, "z": z, "mean": mean, "logvar": logvar, "target": None}

    def reconstruct(self, code: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The second half of `forward`: pixels, cropped to the frames and size of `shape`, fp32."""
        return crop(self.pixels(code, shape[2]), shape)

    def features(self, code: Tensor, frames: int) -> Tensor:
        """The first part of `reconstruct`, up to the input of the decoder's last convolution, in the layers' layout."""
        return self.decoder.features(self.before_decoder(self.enter(code)))

    def picture(self, h: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rest of `reconstruct`."""
        return crop(self.leave(self.decoder.picture(h)).astype(ms.float32), shape)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latents of a clip of any size; without a posterior, the latents and None."""
        for axis, missing in enumerate(self.geometry.missing(x.shape), 2):
            if missing:
                x = repeat_edges(x, axis, 0, missing)
        return self.split_moments(self.encode_moments(x))

    def split_moments(self, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 2 z, t, h, w) -> mean and clamped log-variance in fp32; without a posterior, the latents and None."""
        moments = moments.astype(ms.float32)
        if not self.geometry.has_posterior:
            return moments, None
        mean, logvar = split(moments, self.geometry.latent_channels, 1)
        return mean, ops.clamp(logvar, -30.0, 20.0)

    def pixels(self, code: Tensor, frames: int | None) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W) in fp32, not cropped.

        Args:
            frames: the clip's number of frames; None for all that the latents represent.
        """
        return self.decode_latents(code, self.geometry.is_still(code.shape[2], frames)).astype(ms.float32)

    # Training.

    @property
    def last_conv(self) -> nn.Cell:
        """The last convolution of the decoder that outputs pixels."""
        return self.decoder.last_conv

    def recompute_activations(self, output: bool = True) -> None:
        """Gradient checkpointing: keep only the inputs of blocks, and compute the rest again in the backward pass.

        Args:
            output: checkpoint the norm before the decoder's last convolution too.
        """
        for _, cell in self.cells_and_names():
            if isinstance(cell, self.recomputed):
                cell.recompute()
        if output:
            self.decoder.norm_out.recompute()


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior."""
    return mean + ops.exp(0.5 * logvar) * noise


def crop(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Crop x (B, C, T, H, W) to the frames, rows and columns of `shape`."""
    _, _, t, h, w = shape
    for axis, length in ((2, t), (3, h), (4, w)):
        x = narrow(x, axis, 0, min(length, x.shape[axis]))
    return x
