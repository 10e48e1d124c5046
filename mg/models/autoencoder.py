"""`VideoAutoencoder`: the one interface that every autoencoder here has.

    model = create_model("tae", pretrained="tae.ckpt")
    z, mean, logvar = model.encode(x)      # x (B, 3, T, H, W) in [-1, 1]
    x = model.decode(z)                    # all frames that the latents stand for
    y = model(x)                           # reconstruction, at x's own length and size
    for piece in model.encode_stream(read, num_frames):    # a video of any length, in constant memory
        ...

Called from Python, `encode` and `decode` run eager glue (padding, tiles, sampling) around two cells that graph mode
compiles once per shape. Inside a larger graph, a training step's, use `forward`, or the two halves that it is made of,
`latents` and `reconstruct`: there is then one graph, and no tiles.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mg.checkpoints import StateDict
from mg.models.layers.layout import Enter, Leave, narrow, repeat_edges, split
from mg.models.registry import AUTOENCODERS, merge_config
from mg.models.stored import StoredModel
from mg.models.streaming import Encoded, Streaming
from mg.models.tiling import tiled_tensor
from mg.tiling import TilingConfig


class VideoAutoencoder(Streaming, StoredModel):
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
        recomputed: kinds of cells whose activations `recompute_activations` does not keep.
        default_tiling: what `enable_tiling` starts from.
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
    recomputed: tuple[type[nn.Cell], ...] = ()
    default_tiling = TilingConfig()

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

    def unscaled(self, z: Tensor) -> Tensor:
        """Latents of `encode` as the networks have them, without the scaling that `encode` applies."""
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

    # Pixels to latents and back.

    def encode(self, x: Tensor) -> Encoded:
        """Videos to latents.

        Args:
            x: (B, 3, T, H, W) in [-1, 1], of any size; an image is T = 1.

        Returns:
            z, mean and logvar, each of the shape that `latent_shape` gives and in fp32; z is a sample of the posterior,
            or its mean where the model was built with sample_deterministic. Without a posterior z is the mean, and
            logvar None.
        """
        check_video(x, self.config["in_channels"], "x")
        mean, logvar = self.posterior(x)
        certain = logvar is None or self.sample_deterministic
        return self.encoded(mean, logvar, None if certain else ops.standard_normal(mean.shape))

    def encoded(self, mean: Tensor, logvar: Tensor | None, noise: Tensor | None) -> Encoded:
        """What `encode` returns for a posterior, with whatever scaling it applies; without noise z is the mean."""
        z = mean if logvar is None or noise is None else sample(mean, logvar, noise)
        return Encoded(z, mean, logvar)

    def decode(self, z: Tensor, num_target_frames: int | None = None) -> Tensor:
        """Latents to videos.

        Args:
            z: (B, z, t, h, w).
            num_target_frames: keep so many frames from the first on, by default all that the latents stand for. A
                model that keeps images takes t = 1 for an image unless more frames are asked for.

        Returns:
            (B, 3, T, H, W) in fp32, about [-1, 1]: not clipped.
        """
        check_video(z, self.latent_channels, "z")
        x = self.pixels(self.code(z, num_target_frames), num_target_frames)
        return x if num_target_frames is None else narrow(x, 2, 0, min(num_target_frames, x.shape[2]))

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct x (B, 3, T, H, W) from the posterior's mean, at its own size; tiled where that is on."""
        check_video(x, self.config["in_channels"], "x")
        return self.construct(x)  # as Python, not compiled as one graph: encoder and decoder compile on their own

    def construct(self, x: Tensor) -> Tensor:
        """What a surrounding graph sees of a call; tiles cannot be on there."""
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
        """`reconstruct` up to the input of the decoder's last convolution; untiled."""
        return self.decode_features(code, self._is_still(code.shape[2], frames))

    def picture(self, h: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rest of `reconstruct`."""
        return crop(self.leave(self.pixel_decoder.picture(h)).astype(ms.float32), shape)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latents of a clip of any size, or the latents and None; in tiles where those are
        on."""
        x = self._pad(x)
        if self.tiling is None:
            moments = self.encode_moments(x)
        else:
            axes = self.tiling.encode_axes(self.temporal_compression, self.spatial_compression, self.lead)
            moments = tiled_tensor(self.encode_moments, x, axes)
        return self.split_moments(moments)

    def code(self, z: Tensor, frames: int | None) -> Tensor:
        """What pixels are made of: z, but in a model of two stages."""
        return z

    def pixels(self, code: Tensor, frames: int | None) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W) in fp32, not cropped; tiled where that is on.

        Args:
            frames: how many the clip had; None for all that the latents stand for.
        """
        still = self._is_still(code.shape[2], frames)
        if self.tiling is None:
            return self.decode_latents(code, still).astype(ms.float32)
        axes = self.tiling.decode_axes(self.temporal_compression, self.spatial_compression, self.lead)
        if still:  # one frame from one latent frame: time is no axis to tile
            axes = [axis for axis in axes if axis.dim != 2]
        return tiled_tensor(partial(self.decode_latents, still=still), code, axes).astype(ms.float32)

    def split_moments(self, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 2 z, t, h, w) -> mean and clamped log-variance in fp32; without a posterior, the latents and None."""
        moments = moments.astype(ms.float32)
        if not self.has_posterior:
            return moments, None
        mean, logvar = split(moments, self.latent_channels, 1)
        return mean, ops.clamp(logvar, -30.0, 20.0)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latents of a (B, C, T, H, W) video."""
        b, _, t, h, w = shape
        c, s = self.temporal_compression, self.spatial_compression
        return b, self.latent_channels, self.lead - (self.lead - t) // c, -(-h // s), -(-w // s)

    @property
    def frames_at_once(self) -> int | None:
        """How many frames the networks see at once where the model cuts time by itself; None where it does not."""
        return None

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

    def _is_still(self, num_latents, frames):
        """Whether so many latent frames are an image's, of which so many frames are wanted; None for all of them."""
        return self.keeps_images and num_latents == 1 and frames in (None, 1)

    def missing(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many frames, rows and columns a clip lacks to whole latents; temporal layers of some models take any
        length."""
        _, _, t, h, w = shape
        s = self.spatial_compression
        behind = 0 if self.keeps_images and t == 1 else (self.lead - t) % self.frame_multiple
        return behind, -h % s, -w % s

    def _pad(self, x):
        """Repeat the last frame, row and column up to whole latents."""
        behind, bottom, right = self.missing(x.shape)
        if behind:
            x = repeat_edges(x, 2, 0, behind)
        if bottom:
            x = repeat_edges(x, 3, 0, bottom)
        if right:
            x = repeat_edges(x, 4, 0, right)
        return x


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior."""
    return mean + ops.exp(0.5 * logvar) * noise


def crop(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first frames, rows and columns of x, as many as `shape` has. (B, C, T, H, W)"""
    _, _, t, h, w = shape
    for axis, length in ((2, t), (3, h), (4, w)):
        x = narrow(x, axis, 0, min(length, x.shape[axis]))
    return x


def check_video(x: Tensor, channels: int, name: str) -> None:
    """Raise ValueError unless x is (B, channels, T, H, W)."""
    if x.ndim != 5 or x.shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, {channels}, T, H, W)")
