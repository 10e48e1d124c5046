"""Pixels to latents and back, whichever engine runs the networks: padding, tiles, streams, sampling, scaling, cropping.

A `Codec` works on numpy arrays. It knows a model's `Geometry` and two functions, which encode and decode one tile and
may run in MindSpore or any engine of `mg.deploy`. `TwoStageCodec` puts a per-frame codec in front of a temporal half.

    codec = mg.from_pretrained("models/tae.ckpt").codec       # or mg.deploy.load("outputs/tae_onnx").codec
    z, mean, logvar = codec.encode(x)                         # x (B, 3, T, H, W) in [-1, 1]
    y = codec.decode(z, num_target_frames=x.shape[2])
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import numpy as np

from mg.overlap import read_pieces
from mg.sampling import noise_at
from mg.tiling import TilingConfig, chunk_bounds, stretches, tiled

Encoder = Callable[[np.ndarray], np.ndarray]
Decoder = Callable[[np.ndarray, bool], np.ndarray]
Read = Callable[[int, int], np.ndarray]


class Encoded(NamedTuple):
    """What `encode` returns, each (B, z, t, h, w), float32; `logvar` is None for a model without a posterior.

    Arrays from a codec, tensors from a MindSpore model.
    """

    z: np.ndarray
    mean: np.ndarray
    logvar: np.ndarray | None


class Latents(TypedDict):
    """What a loss compares, each (B, channels, t, h, w), float32. Arrays from a codec, tensors from a MindSpore model.

    A model builds it as a plain dict: only that carries gradients through MindSpore's graphs. A NamedTuple, or this
    type when called, makes them zero without a word; a `jit_class` cannot be built from tensors.

    Attributes:
        code: the decoder's input: z itself, or the first stage's latents as a two-stage model computes them from z.
        z, mean: unscaled.
        logvar: None without a posterior.
        target: what `code` should be, the first stage's latents of the clip; None in a one-stage model.
    """

    code: np.ndarray
    z: np.ndarray
    mean: np.ndarray
    logvar: np.ndarray | None
    target: np.ndarray | None


@dataclass(frozen=True)
class Geometry:
    """How an autoencoder's latents relate to its pixels.

    Attributes:
        in_channels: channels of a frame.
        latent_channels: channels of z.
        spatial, temporal: pixels per latent along H and W, frames per latent along T.
        lead: 1 if the first frame has its own latent frame and each later one covers `temporal` frames; else 0.
        frame_multiple: clips are padded to a multiple of this many frames, the lead not counted.
        keeps_images: a single frame skips all layers that change the frame rate, and decodes to a single frame.
        has_posterior: the encoder outputs a mean and a log-variance, otherwise the latents themselves.
        chunk: number of frames encoded independently of all others, e.g. 17; None if all frames are encoded together.
        images_only: the networks only accept single frames, though the model compresses time.
    """

    in_channels: int
    latent_channels: int
    spatial: int
    temporal: int
    lead: int = 0
    frame_multiple: int = 1
    keeps_images: bool = False
    has_posterior: bool = True
    chunk: int | None = None
    images_only: bool = False

    @property
    def latent_chunk(self) -> int | None:
        """Latent frames of a full chunk."""
        return self.chunk and -(-self.chunk // self.temporal)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latents of a (B, C, T, H, W) video."""
        b, _, t, h, w = shape
        chunks = chunk_bounds(t, self.chunk)
        frames = sum(self.lead - (self.lead - (stop - start)) // self.temporal for start, stop in chunks)
        return b, self.latent_channels, frames, -(-h // self.spatial), -(-w // self.spatial)

    def video_shape(self, shape: tuple[int, ...], still: bool = False) -> tuple[int, ...]:
        """The shape of the video that (B, z, t, h, w) latents decode to; a still is one frame."""
        b, _, t, h, w = shape
        frames = 1 if still else self.lead + (t - self.lead) * self.temporal
        return b, self.in_channels, frames, h * self.spatial, w * self.spatial

    def kept_frames(self, num_latents: int, frames: int | None) -> list[int]:
        """How many frames of each decoded chunk are the clip's; those in front of them are padding.

        Args:
            frames: the clip's number of frames; ignored if this many latent frames cannot be of such a clip. Then, and
                with None, a clip has as many as the latents can represent.
        """
        kept = []
        for i, (start, stop) in enumerate(chunk_bounds(num_latents, self.latent_chunk)):
            decoded = (stop - start) * self.temporal
            size = self.chunk or decoded
            most = min(decoded, size)
            left = most if frames is None else frames - i * size
            kept.append(left if decoded - self.temporal < left <= most else most)
        return kept

    def missing(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Frames, rows and columns to pad a (B, C, T, H, W) clip by; some models' temporal layers accept any length."""
        _, _, t, h, w = shape
        frames = 0 if self.keeps_images and t == 1 else (self.lead - t) % self.frame_multiple
        return frames, -h % self.spatial, -w % self.spatial

    def is_still(self, num_latents: int, frames: int | None) -> bool:
        """Whether this many latent frames are an image, if `frames` frames are requested (None: all)."""
        return self.keeps_images and num_latents == 1 and frames in (None, 1)


class Codec:
    """Codec of a one-stage model.

    Args:
        geometry: the model's.
        encoder: a tile (B, C, T, H, W), float32 -> (B, 2 z, t, h, w), or (B, z, t, h, w) without a posterior.
        decoder: a tile of latents (B, z, t, h, w), and whether it is a still -> (B, 3, T, H, W). Both may be called
            with any tile size up to that of `tiling`.
        tiling: None processes clips whole.
        stream_tiling: tiles along time for streams if `tiling` has none.
    """

    def __init__(
        self,
        geometry: Geometry,
        encoder: Encoder,
        decoder: Decoder,
        tiling: TilingConfig | None = None,
        stream_tiling: TilingConfig | None = None,
    ):
        self.geometry, self.encoder, self.decoder = geometry, encoder, decoder
        self.tiling = tiling
        self._stream_tiling = stream_tiling or TilingConfig()

    def encode(
        self, x: np.ndarray, noise: np.ndarray | None = None, seed: int | Sequence[int] | None = None
    ) -> Encoded:
        """Videos to latents.

        Args:
            x: (B, C, T, H, W) in [-1, 1], of any size; an image is T = 1.
            noise: standard normal, of the latents' shape, from which z is sampled.
            seed: draw the noise instead, as a function of only this and a latent's position. With neither, or without
                a posterior, z is the mean.

        Raises:
            ValueError: another shape or dtype.
        """
        mean, logvar = self.posterior(self._checked(x, self.geometry.in_channels, "x"))
        if seed is not None and logvar is not None:
            noise = noise_at(seed, 0, mean.shape)
        return self.encoded(mean, logvar, noise)

    def decode(self, z: np.ndarray, num_target_frames: int | None = None) -> np.ndarray:
        """Latents to videos.

        Args:
            z: (B, z, t, h, w).
            num_target_frames: keep only the first n frames; by default all that the latents represent. A model that
                `keeps_images` decodes t = 1 as an image unless more frames are requested.

        Returns:
            (B, C, T, H, W), float32, about [-1, 1]: not clipped.

        Raises:
            ValueError: another shape or dtype, or fewer than one frame requested.
        """
        _check_length("num_target_frames", num_target_frames)
        z = self.unscaled(self._checked(z, self.geometry.latent_channels, "z"))
        limit = 1 if self.geometry.is_still(z.shape[2], num_target_frames) else num_target_frames
        return self.pixels(z, num_target_frames)[:, :, :limit]

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        """Reconstruct x (B, C, T, H, W) from the posterior's mean, with its length and size."""
        return self.video(self.latents(x)["code"], x.shape)

    def encode_stream(
        self, read: Read, num_frames: int, seed: int | Sequence[int] | None = None, read_ahead: bool = False
    ) -> Generator[Encoded, None, None]:
        """`encode` for a video read piece by piece: yields its latents piece by piece, in constant memory.

        Concatenated, the pieces equal what `encode` returns with the same tiles. A stream is always tiled along time.

        Args:
            read: returns frames [start, stop) as (B, C, stop - start, H, W) in [-1, 1]; called in order, though a piece
                may overlap the previous one.
            num_frames: length of the video.
            seed: as for `encode`.
            read_ahead: call `read` in a thread, for the next piece while the model runs: one more piece in memory.
                Closing the stream waits for that thread.

        Yields:
            z, mean and logvar of the next latent frames, (B, z, t', h, w).

        Raises:
            ValueError: no frames, or `read` returned another shape or dtype.
        """
        _check_length("num_frames", num_frames)
        at, read = 0, self._checked_reader(read, self.geometry.in_channels, num_frames)
        for mean, logvar in self.posterior_stream(read, num_frames, read_ahead):
            noise = None if seed is None or logvar is None else noise_at(seed, at, mean.shape)
            at += mean.shape[2]
            yield self.encoded(mean, logvar, noise)

    def decode_stream(
        self, read: Read, num_latents: int, num_target_frames: int | None = None, read_ahead: bool = False
    ) -> Generator[np.ndarray, None, None]:
        """`decode` for latents read piece by piece: yields frames piece by piece, in constant memory.

        Concatenated, the pieces equal what `decode` returns with the same tiles; see `encode_stream`.

        Args:
            read: returns latent frames [start, stop) as (B, z, stop - start, h, w).
            num_latents: latent frames of the video.
            num_target_frames: as for `decode`.
            read_ahead: as for `encode_stream`.

        Yields:
            float32 (B, C, T', H, W), about [-1, 1]: not clipped.

        Raises:
            ValueError: as for `encode_stream`, of latents.
        """
        _check_length("num_latents", num_latents)
        _check_length("num_target_frames", num_target_frames)
        left, read = num_target_frames, self._checked_reader(read, self.geometry.latent_channels, num_latents)
        for frames in self.pixel_stream(read, num_latents, num_target_frames, read_ahead):
            frames = frames[:, :, :left]
            yield frames
            if left is not None:
                left -= frames.shape[2]
                if left == 0:
                    return

    def latents(self, x: np.ndarray, noise: np.ndarray | None = None) -> Latents:
        """What a loss compares, unscaled: everything before the pixel decoder, as in training but in tiles.

        Args:
            x, noise: as for `encode`.
        """
        mean, logvar = self.posterior(self._checked(x, self.geometry.in_channels, "x"))
        z = sampled(mean, logvar, noise)
        return {"code": z, "z": z, "mean": mean, "logvar": logvar, "target": None}

    def video(self, code: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The pixels of what `latents` calls code, cropped to the frames and size of `shape` (B, C, T, H, W)."""
        _, _, t, h, w = shape
        return self.decoded(code, t)[:, :, :t, :h, :w]

    def encoded(self, mean: np.ndarray, logvar: np.ndarray | None, noise: np.ndarray | None) -> Encoded:
        """`encode`'s result for this posterior; without noise z is the mean."""
        return Encoded(sampled(mean, logvar, noise), mean, logvar)

    # What a two-stage model does differently.

    @property
    def stream_tile(self) -> int | None:
        """Frames that `encode_stream` reads at once; None for all of them."""
        return self._tiles_along_time().encode_tile + self.geometry.lead

    def unscaled(self, z: np.ndarray) -> np.ndarray:
        """Undo the scaling that `encode` applies."""
        return z

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and log-variance of the latents of a clip of any size; without a posterior, the latents and None."""
        x = fill(x, self.geometry.missing(x.shape))
        axes = [] if self.tiling is None else self.tiling.encode_axes(*self._factors)
        return self.split(tiled(self.encoder, x, axes))

    def pixels(self, z: np.ndarray, frames: int | None) -> np.ndarray:
        """(B, z, t, h, w), unscaled -> (B, C, T, H, W), not cropped.

        Args:
            frames: the clip's number of frames; None for all that the latents represent.
        """
        return self.decoded(z, frames)

    def decoded(self, z: np.ndarray, frames: int | None) -> np.ndarray:
        """`pixels`, of the pixel decoder's input."""
        still = self.geometry.is_still(z.shape[2], frames)
        axes = [] if self.tiling is None else self.tiling.decode_axes(*self._factors)
        if still:  # one frame from one latent frame: no time axis to tile
            axes = [axis for axis in axes if axis.dim != 2]
        return tiled(lambda tile: self.decoder(tile, still), z, axes)

    def posterior_stream(
        self, read: Read, num_frames: int, ahead: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """`posterior`, piece by piece along time."""
        behind, _, _ = self.geometry.missing((1, 3, num_frames, 1, 1))

        def padded(start: int, stop: int) -> np.ndarray:
            x = read(start, min(stop, num_frames))
            _, bottom, right = self.geometry.missing(x.shape)
            return fill(x, (max(stop - num_frames, 0), bottom, right))

        axes = self._tiles_along_time().encode_axes(*self._factors)
        for moments in stretches(self.encoder, padded, num_frames + behind, axes, ahead):
            yield self.split(moments)

    def pixel_stream(
        self, read: Read, num_latents: int, frames: int | None, ahead: bool = False
    ) -> Iterator[np.ndarray]:
        """`pixels` of scaled latents, piece by piece along time."""
        if self.geometry.is_still(num_latents, frames):
            yield self.decode(read(0, 1), frames)
            return
        axes = self._tiles_along_time().decode_axes(*self._factors)
        yield from stretches(lambda tile: self.decoder(tile, False), read, num_latents, axes, ahead)

    def split(self, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 2 z, t, h, w) -> mean and clamped log-variance; without a posterior, the latents and None."""
        if not self.geometry.has_posterior:
            return moments, None
        mean, logvar = np.split(moments, 2, axis=1)
        return mean, np.clip(logvar, -30.0, 20.0)

    def _checked(self, x: np.ndarray, channels: int, name: str) -> np.ndarray:
        """x as float32"""
        if x.ndim != 5 or x.shape[1] != channels or not x.size:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, {channels}, T, H, W)")
        if x.dtype.kind != "f":
            raise ValueError(f"{name} has dtype {x.dtype}; it must be floating-point numbers")
        self._check_images_only(x.shape[2], name)
        return x.astype(np.float32, copy=False)

    def _checked_reader(self, read: Read, channels: int, length: int) -> Read:
        """A stream's `read`; each of its pieces is checked as a whole clip is."""
        self._check_images_only(length, "the stream")

        def checked(start: int, stop: int) -> np.ndarray:
            name = f"what read({start}, {stop}) returned"
            x = self._checked(read(start, stop), channels, name)
            if x.shape[2] != stop - start:
                raise ValueError(f"{name} has {x.shape[2]} frames; it must have {stop - start}")
            return x

        return checked

    def _check_images_only(self, frames: int, name: str) -> None:
        if self.geometry.images_only and frames != 1:
            raise ValueError(f"{name} has {frames} frames, but this export is for images (--frames 1): one frame each")

    @property
    def _factors(self) -> tuple[int, int, int]:
        return self.geometry.temporal, self.geometry.spatial, self.geometry.lead

    def _tiles_along_time(self) -> TilingConfig:
        """The current tiling, with that of `stream_tiling` along time if it has none."""
        default = self._stream_tiling
        tiling = self.tiling or replace(default, spatial_tile=0, spatial_overlap=None)
        for side in ("encode", "decode"):
            if not getattr(tiling, f"{side}_tile"):
                names = (f"{side}_tile", f"{side}_overlap")
                tiling = replace(tiling, **{name: getattr(default, name) for name in names})
        return tiling


class TwoStageCodec(Codec):
    """Codec of the Open-Sora 1.2 VAE: single frames first, then their latents along time in independent chunks.

    Latents are scaled to (z - shift) / scale. A chunk whose length isn't a multiple of the temporal compression is
    padded with zeros in front, which are cropped after decoding; so decoding needs to know the number of frames.

    Args:
        geometry: of both halves together; with `chunk` None a clip is one chunk.
        frames: the spatial half; its geometry has no posterior.
        encoder: frame latents, T a multiple of the temporal compression, (B, C, T, h, w) -> (B, 2 z, t, h, w).
        decoder: (B, z, t, h, w) -> (B, C, T, h, w).
        tiling: its spatial tiles, in pixels, apply to both halves; None processes clips whole.
        shift, scale: per channel, or one for all.
    """

    def __init__(
        self,
        geometry: Geometry,
        frames: Codec,
        encoder: Encoder,
        decoder: Encoder,
        tiling: TilingConfig | None,
        shift: float | Sequence[float],
        scale: float | Sequence[float],
    ):
        super().__init__(geometry, encoder, lambda z, still: decoder(z), tiling)
        self.frames, self._decode_chunk = frames, decoder
        self.shift, self.scale = (np.float32(values).reshape(1, -1, 1, 1, 1) for values in (shift, scale))

    @property
    def stream_tile(self):
        return self.geometry.chunk

    def encoded(self, mean, logvar, noise):
        z, mean, logvar = super().encoded(mean, logvar, noise)
        z, mean = ((value - self.shift) / self.scale for value in (z, mean))
        return Encoded(z, mean, logvar - 2 * np.log(self.scale))

    def unscaled(self, z):
        return z * self.scale + self.shift

    def posterior(self, x):
        return self._temporal_posterior(self.frames.posterior(x)[0])

    def latents(self, x, noise=None):
        x_z, _ = self.frames.posterior(self._checked(x, self.geometry.in_channels, "x"))
        mean, logvar = self._temporal_posterior(x_z)
        z = sampled(mean, logvar, noise)
        return {"code": self.frame_latents(z, x.shape[2]), "z": z, "mean": mean, "logvar": logvar, "target": x_z}

    def pixels(self, z, frames):
        return self.decoded(self.frame_latents(z, frames), frames)

    def decoded(self, z, frames):
        return self.frames.decoded(z, frames)

    def _temporal_posterior(self, x_z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The spatial half's latents (B, C, T, h, w) -> mean and log-variance of all chunks"""
        moments = []
        for start, stop in chunk_bounds(x_z.shape[2], self.geometry.chunk):
            front = -(stop - start) % self.geometry.temporal
            chunk = np.pad(x_z[:, :, start:stop], ((0, 0), (0, 0), (front, 0), (0, 0), (0, 0)))
            moments.append(tiled(self.encoder, chunk, self._axes()))
        return self.split(np.concatenate(moments, axis=2))

    def frame_latents(self, z: np.ndarray, frames: int | None) -> np.ndarray:
        """(B, z, t, h, w), unscaled -> the spatial half's latents (B, C, T, h, w): `frames` of them if that fits t,
        else as many as the latents can represent."""
        bounds = chunk_bounds(z.shape[2], self.geometry.latent_chunk)
        kept = self.geometry.kept_frames(z.shape[2], frames)
        chunks = [tiled(self._decode_chunk, z[:, :, start:stop], self._axes()) for start, stop in bounds]
        return np.concatenate([chunk[:, :, -number:] for chunk, number in zip(chunks, kept)], axis=2)

    def posterior_stream(self, read, num_frames, ahead=False):
        with closing(read_pieces(read, chunk_bounds(num_frames, self.geometry.chunk), ahead)) as chunks:
            yield from map(self.posterior, chunks)

    def pixel_stream(self, read, num_latents, frames, ahead=False):
        left = frames
        with closing(read_pieces(read, chunk_bounds(num_latents, self.geometry.latent_chunk), ahead)) as chunks:
            for z in chunks:
                chunk = self.decode(z, left)
                yield chunk
                left = None if left is None else left - chunk.shape[2]

    def _axes(self):
        """The temporal half keeps height and width, which are counted in latents."""
        if self.tiling is None:
            return []
        axes = self.tiling.decode_axes(self.geometry.temporal, self.geometry.spatial)
        return [replace(axis, up=1) for axis in axes if axis.dim != 2]


def _check_length(name: str, length: int | None) -> None:
    if length is not None and length < 1:
        raise ValueError(f"{name} is {length}; it must be at least 1")


def sampled(mean: np.ndarray, logvar: np.ndarray | None, noise: np.ndarray | None) -> np.ndarray:
    """A sample of the posterior; the mean without noise or log-variance."""
    return mean if logvar is None or noise is None else mean + np.exp(np.float32(0.5) * logvar) * noise


class Streams:
    """What every autoencoder with a `geometry` and a `codec` offers, in MindSpore and exported."""

    geometry: Geometry

    @property
    def codec(self) -> Codec:
        """The model as a codec on numpy arrays."""
        raise NotImplementedError

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along H and W."""
        return self.geometry.spatial

    @property
    def temporal_compression(self) -> int:
        """Frames per latent along T."""
        return self.geometry.temporal

    @property
    def latent_channels(self) -> int:
        """Channels of z."""
        return self.geometry.latent_channels

    def encode_stream(
        self, read: Read, num_frames: int, seed: int | Sequence[int] | None = None, read_ahead: bool = False
    ) -> Generator[Encoded, None, None]:
        """`encode` for a video read piece by piece, as arrays: see `Codec.encode_stream`."""
        return self.codec.encode_stream(read, num_frames, seed, read_ahead)

    def decode_stream(
        self, read: Read, num_latents: int, num_target_frames: int | None = None, read_ahead: bool = False
    ) -> Generator[np.ndarray, None, None]:
        """`decode` for latents read piece by piece: see `Codec.decode_stream`."""
        return self.codec.decode_stream(read, num_latents, num_target_frames, read_ahead)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latents of a (B, C, T, H, W) video."""
        return self.geometry.latent_shape(shape)


def fill(x: np.ndarray, missing: Sequence[int]) -> np.ndarray:
    """Repeat the last frame, row and column of x (B, C, T, H, W) this many times."""
    return np.pad(x, [(0, 0), (0, 0), *((0, n) for n in missing)], mode="edge") if any(missing) else x
