"""`VideoAutoencoder`: the interface that all autoencoders share.

    model = create_model("tae", pretrained="tae.ckpt")
    z, mean, logvar = model.encode(x)      # x (B, 3, T, H, W) in [-1, 1]
    x = model.decode(z)                    # all frames that the latents represent
    y = model(x)                           # reconstruction, with x's length and size
    for piece in model.encode_stream(read, num_frames):    # a video of any length, in constant memory
        ...

These are for inference and carry no gradient: `mg.codec` pads, tiles, samples and crops on the host, and two networks,
each compiled once per shape in graph mode, run on the device. Inside a larger graph, such as a training step or your
own loss, use `forward`, or its two halves `latents` and `reconstruct`: everything is then one graph, without tiles.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mg.checkpoints import StateDict
from mg.codec import Codec, Encoded, Geometry, Streams
from mg.models.layers.layout import Enter, Leave, narrow, repeat_edges, split
from mg.models.registry import AUTOENCODERS, merge_config
from mg.models.stored import StoredModel
from mg.tiling import TilingConfig

ms.jit_class(Geometry)  # so that graphs can use it too


class VideoAutoencoder(Streams, StoredModel):
    """Base class of all autoencoders. A model sets the class attributes and builds two cells, `encoder` and `decoder`.

    The decoder has `features` (everything but its last convolution), `picture` (that convolution) and `last_conv` (its
    cell): adversarial training weights its losses by their gradients there.

    Attributes:
        config: every setting that the weights depend on.
        spatial_compression, temporal_compression: pixels per latent along H and W, frames per latent along T.
        latent_channels: channels of z.
        has_posterior: the encoder outputs a mean and a log-variance; if False, the latents themselves.
        scaling: how latents get about unit variance, in one line: the config keys, and who applies them.
        applies_scaling: `encode` applies the scaling and `decode` undoes it.
        has_target: the model has two stages, and the second is trained to reproduce the first's latents.
        keeps_images: a single frame skips all layers that change the frame rate, and decodes to a single frame.
        lead: 1 if the first frame has its own latent frame and each later one covers temporal_compression frames;
            else 0.
        frame_multiple: clips are padded to a multiple of this many frames, the lead not counted.
        chunk: frames that the networks see at once if the model cuts time into chunks; else None.
        recomputed: cell types that `recompute_activations` checkpoints.
        default_tiling: what `enable_tiling` starts from.
        geometry: how latents relate to pixels.
    """

    spatial_compression: int
    temporal_compression: int
    latent_channels: int
    has_posterior = True
    scaling = "for the caller: z = (z - shift_factor) * scaling_factor after encode, undone before decode"
    applies_scaling = False
    has_target = False
    keeps_images = False
    lead = 0
    frame_multiple = 1
    chunk: int | None = None
    recomputed: tuple[type[nn.Cell], ...] = ()
    default_tiling = TilingConfig()
    geometry: Geometry

    def __init__(
        self,
        config: dict | None = None,
        sample_deterministic: bool = False,
        pretrained: "str | Path | StateDict | None" = None,
    ):
        super().__init__()
        stored = {} if pretrained is None else AUTOENCODERS.stored_config(pretrained, type(self))
        self.config = merge_config(self.default_config, {**stored, **(config or {})}, self.name)
        self.sample_deterministic = sample_deterministic
        self.tiling: TilingConfig | None = None
        self.enter, self.leave = Enter(), Leave()  # the networks may use their own layout

    def finish(self, dtype: str, use_recompute: bool, pretrained: str | Path | StateDict | None) -> None:
        self.geometry = Geometry(
            self.config["in_channels"],
            self.latent_channels,
            self.spatial_compression,
            self.temporal_compression,
            self.lead,
            self.frame_multiple,
            self.keeps_images,
            self.has_posterior,
            self.chunk,
        )
        super().finish(dtype, use_recompute, pretrained)

    # What a model may override.

    def encode_moments(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), padded -> mean and log-variance along the channels, (B, 2 z, t, h, w), or only latents"""
        return self.leave(self.encoder(self.enter(x)))

    def before_decoder(self, z: Tensor) -> Tensor:
        """The decoder's input, from z in the layers' layout."""
        return z

    def decode_latents(self, z: Tensor, still: bool = False) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W), where T is lead + (t - lead) * temporal_compression, and H and W are h
        and w times spatial_compression.

        Args:
            still: z is an image, t = T = 1; only for models with `keeps_images`.
        """
        return self.leave(self.decoder(self.before_decoder(self.enter(z))))

    def decode_features(self, z: Tensor, still: bool = False) -> Tensor:
        """`decode_latents` up to the input of the decoder's last convolution, in the layers' layout."""
        return self.decoder.features(self.before_decoder(self.enter(z)))

    def unscaled(self, z):
        """Undo the scaling that `encode` applies, on arrays or tensors."""
        return z

    def scaling_for(self, mean: float, std: float, means: list[float], stds: list[float]) -> dict:
        """The config keys that scale latents with these statistics (of unscaled latents) to about unit variance.

        Args:
            mean, std: over all latents.
            means, stds: per channel.
        """
        return {"scaling_factor": 1 / std, "shift_factor": mean}

    def align_frames(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Pad a clip (B, 3, T, H, W) to one of a few lengths, so that clips of any length need few compiled graphs.

        Returns:
            A clip for which `latents` returns the same, and which of its frames are x's: (T',) of 1 or 0, None for all.
        """
        return x, None

    # Inference.

    @property
    def codec(self) -> Codec:
        """The model as a codec on numpy arrays, with the current tiling."""
        encoder, decoder = on_host(self.encode_moments), on_host(self.decode_latents)
        return Codec(self.geometry, encoder, decoder, self.tiling, self.default_tiling)

    def encode(self, x: Tensor) -> Encoded:
        """Videos to latents, for inference.

        Args:
            x: (B, 3, T, H, W) in [-1, 1], of any size; an image is T = 1.

        Returns:
            z, mean and logvar in fp32, each of the shape that `latent_shape` returns. z is a sample of the posterior,
            or its mean if the model was built with sample_deterministic. Without a posterior z is the mean and logvar
            is None.
        """
        x = _array(x)
        certain = not self.has_posterior or self.sample_deterministic or x.ndim != 5
        noise = None if certain else ops.standard_normal(self.latent_shape(x.shape)).asnumpy()
        return Encoded(*(part if part is None else Tensor(part) for part in self.codec.encode(x, noise)))

    def decode(self, z: Tensor, num_target_frames: int | None = None) -> Tensor:
        """Latents to videos, for inference.

        Args:
            z: (B, z, t, h, w).
            num_target_frames: keep only the first n frames; by default all that the latents represent. A model that
                `keeps_images` decodes t = 1 as an image unless more frames are requested.

        Returns:
            (B, 3, T, H, W) in fp32, about [-1, 1]: not clipped.
        """
        return Tensor(self.codec.decode(_array(z), num_target_frames))

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct x (B, 3, T, H, W) from the posterior's mean, at its own size; in tiles if tiling is enabled."""
        return Tensor(self.codec.reconstruct(_array(x)))

    # Training: the same inside a larger graph, without tiles.

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
        code, z, mean, logvar, _ = self.latents(x, noise)
        return self.reconstruct(code, x.shape), z, mean, logvar

    def latents(
        self, x: Tensor, noise: Tensor | None = None, valid: Tensor | None = None, detached: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The first half of `forward`: everything before the pixel decoder.

        Args:
            valid: the mask that `align_frames` returned with x.
            detached: in a two-stage model, stop the gradient before the first stage.

        Returns:
            The decoder's input (z, or what a two-stage model computes from z), z, mean, logvar, and the target of the
            decoder's input in a model that `has_target`, else None.
        """
        mean, logvar = self.posterior(x)
        z = mean if logvar is None or noise is None else sample(mean, logvar, noise)
        return self.code(z, x.shape[2]), z, mean, logvar, None

    def reconstruct(self, code: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The second half of `forward`: pixels, cropped to the frames and size of `shape`, fp32."""
        return crop(self.pixels(code, shape[2]), shape)

    def features(self, code: Tensor, frames: int) -> Tensor:
        """The first part of `reconstruct`, up to the input of the decoder's last convolution."""
        return self.decode_features(code, self.geometry.is_still(code.shape[2], frames))

    def picture(self, h: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rest of `reconstruct`."""
        return crop(self.leave(self.pixel_decoder.picture(h)).astype(ms.float32), shape)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latents of a clip of any size; without a posterior, the latents and None."""
        for axis, missing in enumerate(self.geometry.missing(x.shape), 2):
            if missing:
                x = repeat_edges(x, axis, 0, missing)
        return self.split_moments(self.encode_moments(x))

    def code(self, z: Tensor, frames: int | None) -> Tensor:
        """The decoder's input: z itself, except in a two-stage model."""
        return z

    def pixels(self, code: Tensor, frames: int | None) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W) in fp32, not cropped.

        Args:
            frames: the clip's number of frames; None for all that the latents represent.
        """
        return self.decode_latents(code, self.geometry.is_still(code.shape[2], frames)).astype(ms.float32)

    def split_moments(self, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 2 z, t, h, w) -> mean and clamped log-variance in fp32; without a posterior, the latents and None."""
        moments = moments.astype(ms.float32)
        if not self.has_posterior:
            return moments, None
        mean, logvar = split(moments, self.latent_channels, 1)
        return mean, ops.clamp(logvar, -30.0, 20.0)

    @property
    def pixel_decoder(self) -> nn.Cell:
        """The decoder that outputs pixels."""
        return self.decoder

    @property
    def last_conv(self) -> nn.Cell:
        """The decoder's last convolution."""
        return self.pixel_decoder.last_conv

    def recompute_activations(self, output: bool = True) -> None:
        """Gradient checkpointing: keep only the inputs of blocks, and compute the rest again in the backward pass.

        Args:
            output: checkpoint the norm before the decoder's last convolution too.
        """
        for _, cell in self.cells_and_names():
            if isinstance(cell, self.recomputed):
                cell.recompute()
        if output:
            self.pixel_decoder.norm_out.recompute()

    def enable_tiling(self, **settings) -> None:
        """Make encode, decode and call work tile by tile, in time and, if requested, in space.

        Device memory then depends only on the tile size. Norms see a tile instead of the whole clip, so results differ
        slightly from untiled ones; overlapping tiles are blended linearly.

        Args:
            settings: fields of `mg.tiling.TilingConfig` that override `default_tiling`.

        Raises:
            ValueError: sizes that aren't multiples of the compression.
        """
        tiling = replace(self.default_tiling, **settings)
        tiling.encode_axes(self.temporal_compression, self.spatial_compression, self.lead)
        self.tiling = tiling

    def disable_tiling(self) -> None:
        """Encode and decode whole clips again."""
        self.tiling = None


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior."""
    return mean + ops.exp(0.5 * logvar) * noise


def crop(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Crop x (B, C, T, H, W) to the frames, rows and columns of `shape`."""
    _, _, t, h, w = shape
    for axis, length in ((2, t), (3, h), (4, w)):
        x = narrow(x, axis, 0, min(length, x.shape[axis]))
    return x


def on_host(network: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """Wrap a network on tensors as a function of float32 arrays, for a `Codec`."""

    def run(x: np.ndarray, *settings, **named) -> np.ndarray:
        return network(Tensor(np.ascontiguousarray(x)), *settings, **named).astype(ms.float32).asnumpy()

    return run


def _array(x: Tensor) -> np.ndarray:
    """Also for bf16, which numpy does not have."""
    return x.astype(ms.float32).asnumpy() if x.dtype in (ms.float16, ms.bfloat16) else x.asnumpy()
