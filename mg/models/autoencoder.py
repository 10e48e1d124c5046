"""`VideoAutoencoder`: the one interface that every autoencoder here has.

    model = create_model("tae", pretrained="tae.ckpt")
    z, mean, logvar = model.encode(x)      # x (B, 3, T, H, W) in [-1, 1]
    x = model.decode(z)                    # all frames that the latents stand for
    y = model(x)                           # reconstruction, at x's own length and size
    for piece in model.encode_stream(read, num_frames):    # a video of any length, in constant memory
        ...

These are for inference: `mg.codec` pads, cuts into tiles, samples and crops on the host, and two networks, each
compiled once per shape in graph mode, run on the device. They carry no gradient. In a larger graph, a training step's
or a loss of your own, use `forward`, or its two halves `latents` and `reconstruct`: all of it is then one graph,
without tiles.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mg.checkpoints import StateDict
from mg.codec import Codec, Encoded, Geometry, Read
from mg.models.layers.layout import Enter, Leave, narrow, repeat_edges, split
from mg.models.registry import AUTOENCODERS, merge_config
from mg.models.stored import StoredModel
from mg.tiling import TilingConfig

ms.jit_class(Geometry)  # so that graphs may ask it, too


class VideoAutoencoder(StoredModel):
    """Base of all autoencoders. A model sets the class attributes and builds `encoder` and `decoder`, two cells.

    The decoder has `features`, all but its last convolution, `picture`, that convolution, and `last_conv`, its cell:
    adversarial training weighs its losses by their gradients there.

    Attributes:
        config: every setting that the weights depend on.
        spatial_compression, temporal_compression: pixels per latent along H and W, frames per latent along T.
        latent_channels: z.
        has_posterior: the encoder gives a mean and a log-variance; without one it gives the latents themselves.
        scaling: what brings the latents to about unit variance, in one line: the config's keys, and who applies them.
        applies_scaling: `encode` does, and `decode` undoes it.
        has_target: the model has two stages, and the second is trained to give back the latents of the first.
        keeps_images: a single frame passes by all that changes the frame rate, and decodes to a single frame.
        lead: 1 where the first frame has a latent frame of its own, and temporal_compression frames each later one;
            else 0.
        frame_multiple: clips are padded to a multiple of so many frames, the lead aside.
        chunk: frames that the networks see at once where the model cuts time by itself; None where it does not.
        recomputed: kinds of cells whose activations `recompute_activations` does not keep.
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
        self.enter, self.leave = Enter(), Leave()  # of the networks, which may have a layout of their own

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
        """(B, 3, T, H, W), padded -> mean and log-variance along the channels, (B, 2 z, t, h, w), or latents alone"""
        return self.leave(self.encoder(self.enter(x)))

    def before_decoder(self, z: Tensor) -> Tensor:
        """What the decoder is given in place of z, which has entered."""
        return z

    def decode_latents(self, z: Tensor, still: bool = False) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W), T being lead + (t - lead) * temporal_compression, and H and W h and w
        times spatial_compression.

        Args:
            still: z is an image's, t = 1 and so is T; only for models that keep images.
        """
        return self.leave(self.decoder(self.before_decoder(self.enter(z))))

    def decode_features(self, z: Tensor, still: bool = False) -> Tensor:
        """`decode_latents` up to the input of the decoder's last convolution, in the layers' layout."""
        return self.decoder.features(self.before_decoder(self.enter(z)))

    def unscaled(self, z):
        """Latents of `encode`, arrays or tensors, without the scaling that `encode` applies."""
        return z

    def scaling_for(self, mean: float, std: float, means: list[float], stds: list[float]) -> dict:
        """The config's keys that bring latents of these statistics, unscaled, to about unit variance.

        Args:
            mean, std: of all latents.
            means, stds: of each channel.
        """
        return {"scaling_factor": 1 / std, "shift_factor": mean}

    def align_frames(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Bring a clip (B, 3, T, H, W) to one of a few lengths, so that clips of any length need few compiled graphs.

        Returns:
            A clip that `latents` makes the same of, and which of its frames are x's: (T',), 1 or 0, None for all.
        """
        return x, None

    # Inference.

    @property
    def codec(self) -> Codec:
        """The same on numpy arrays, in the tiles that are on now."""
        encoder, decoder = on_host(self.encode_moments), on_host(self.decode_latents)
        return Codec(self.geometry, encoder, decoder, self.tiling, self.default_tiling)

    def encode(self, x: Tensor) -> Encoded:
        """Videos to latents, for inference.

        Args:
            x: (B, 3, T, H, W) in [-1, 1], of any size; an image is T = 1.

        Returns:
            z, mean and logvar, each of the shape that `latent_shape` gives and in fp32; z is a sample of the posterior,
            or its mean where the model was built with sample_deterministic. Without a posterior z is the mean, and
            logvar None.
        """
        x = _array(x)
        certain = not self.has_posterior or self.sample_deterministic or x.ndim != 5
        noise = None if certain else ops.standard_normal(self.latent_shape(x.shape)).asnumpy()
        return Encoded(*(part if part is None else Tensor(part) for part in self.codec.encode(x, noise)))

    def decode(self, z: Tensor, num_target_frames: int | None = None) -> Tensor:
        """Latents to videos, for inference.

        Args:
            z: (B, z, t, h, w).
            num_target_frames: keep this many frames from the first on, by default all that the latents stand for. A
                model that keeps images takes t = 1 for an image unless more frames are asked for.

        Returns:
            (B, 3, T, H, W) in fp32, about [-1, 1]: not clipped.
        """
        return Tensor(self.codec.decode(_array(z), num_target_frames))

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct x (B, 3, T, H, W) from the posterior's mean, at its own size; in tiles where those are on."""
        return Tensor(self.codec.reconstruct(_array(x)))

    def encode_stream(self, read: Read, num_frames: int, seed: int | Sequence[int] | None = None) -> Iterator[Encoded]:
        """`encode` of a video that is read piece by piece, as arrays: see `mg.codec.Codec.encode_stream`."""
        return self.codec.encode_stream(read, num_frames, seed)

    def decode_stream(self, read: Read, num_latents: int, num_target_frames: int | None = None) -> Iterator[np.ndarray]:
        """`decode` of latents that are read piece by piece: see `mg.codec.Codec.decode_stream`."""
        return self.codec.decode_stream(read, num_latents, num_target_frames)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latents of a (B, C, T, H, W) video."""
        return self.geometry.latent_shape(shape)

    # Training: the same within a larger graph, without tiles.

    def construct(self, x: Tensor) -> Tensor:
        """What a surrounding graph sees of a call."""
        return self.forward(x)[0]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Encode and decode. The randomness comes from outside, so that it can be compiled within a larger graph.

        Args:
            x: (B, 3, T, H, W) in [-1, 1].
            noise: standard normal, of the latents' shape; None gives the posterior's mean. Unused without a posterior.

        Returns:
            Reconstruction (x's shape, fp32), z, mean, logvar.
        """
        code, z, mean, logvar, _ = self.latents(x, noise)
        return self.reconstruct(code, x.shape), z, mean, logvar

    def latents(
        self, x: Tensor, noise: Tensor | None = None, valid: Tensor | None = None, detached: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The first half of `forward`: all but what makes pixels.

        Args:
            valid: what `align_frames` gave beside x.
            detached: let no gradient into the first stage of a model of two.

        Returns:
            What pixels are made of (z, or what a model of two stages makes of z), z, mean, logvar, and what the first
            of these is to be like, in a model that `has_target`; None elsewhere.
        """
        mean, logvar = self.posterior(x)
        z = mean if logvar is None or noise is None else sample(mean, logvar, noise)
        return self.code(z, x.shape[2]), z, mean, logvar, None

    def reconstruct(self, code: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The second half of `forward`: pixels, cropped to the frames and size of `shape`, fp32."""
        return crop(self.pixels(code, shape[2]), shape)

    def features(self, code: Tensor, frames: int) -> Tensor:
        """`reconstruct` up to the input of the decoder's last convolution."""
        return self.decode_features(code, self.geometry.is_still(code.shape[2], frames))

    def picture(self, h: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rest of `reconstruct`."""
        return crop(self.leave(self.pixel_decoder.picture(h)).astype(ms.float32), shape)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latents of a clip of any size, or the latents and None."""
        for axis, missing in enumerate(self.geometry.missing(x.shape), 2):
            if missing:
                x = repeat_edges(x, axis, 0, missing)
        return self.split_moments(self.encode_moments(x))

    def code(self, z: Tensor, frames: int | None) -> Tensor:
        """What pixels are made of: z, but in a model of two stages."""
        return z

    def pixels(self, code: Tensor, frames: int | None) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W) in fp32, not cropped.

        Args:
            frames: how many the clip had; None for all that the latents stand for.
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
        """The decoder that gives pixels."""
        return self.decoder

    @property
    def last_conv(self) -> nn.Cell:
        """The decoder's last convolution."""
        return self.pixel_decoder.last_conv

    def recompute_activations(self, output: bool = True) -> None:
        """Gradient checkpointing: keep the inputs of blocks for the backward pass, and compute the rest again there.

        Args:
            output: checkpoint the norm before the decoder's last convolution too.
        """
        for _, cell in self.cells_and_names():
            if isinstance(cell, self.recomputed):
                cell.recompute()
        if output:
            self.pixel_decoder.norm_out.recompute()

    def enable_tiling(self, **settings) -> None:
        """From now on encode, decode and call work tile by tile, in time and, if asked for, in space.

        Memory on the device then depends on the tile alone. Norms see a tile in place of the whole clip, so results
        differ a little from untiled ones; overlapping tiles are blended linearly.

        Args:
            settings: fields of `mg.tiling.TilingConfig`, laid over `default_tiling`.

        Raises:
            ValueError: sizes that are no multiples of the compression.
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
    """The first frames, rows and columns of x, as many as `shape` has. (B, C, T, H, W)"""
    _, _, t, h, w = shape
    for axis, length in ((2, t), (3, h), (4, w)):
        x = narrow(x, axis, 0, min(length, x.shape[axis]))
    return x


def on_host(network: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """A network of tensors as a function of float32 arrays, for a `Codec`."""

    def run(x: np.ndarray, *settings, **named) -> np.ndarray:
        return network(Tensor(np.ascontiguousarray(x)), *settings, **named).astype(ms.float32).asnumpy()

    return run


def _array(x: Tensor) -> np.ndarray:
    """bf16 too, which numpy does not have"""
    return x.astype(ms.float32).asnumpy() if x.dtype in (ms.float16, ms.bfloat16) else x.asnumpy()
