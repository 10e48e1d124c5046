"""Videos of any length in constant memory: the half of `VideoAutoencoder` that encodes and decodes by pieces."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mg.models.tiling import tensor_stretches
from mg.sampling import noise_at
from mg.tiling import TilingConfig


class Encoded(NamedTuple):
    """What `encode` returns, each (B, z, t, h, w); `logvar` is None for a model without a posterior."""

    z: Tensor
    mean: Tensor
    logvar: Tensor | None


class Streaming:
    """Encoding and decoding by pieces along time. `VideoAutoencoder` gives what it works with.

    A model that cuts time by itself has its own `stream_tile`, `posterior_stream` and `decode_stream`.
    """

    def encode_stream(
        self, read: Callable[[int, int], np.ndarray], num_frames: int, seed: int | Sequence[int] | None = None
    ) -> Iterator[Encoded]:
        """`encode` of a video that is read by pieces: its latents by pieces, in memory that does not grow with it.

        The pieces join to what `encode` gives in the same tiles. Along time a stream always works in tiles: in those
        of `default_tiling` where none are on.

        Args:
            read: gives frames [start, stop) as float32 (B, 3, stop - start, H, W) in [-1, 1]; called in order, though
                a piece may begin before the last one's end.
            num_frames: of the video.
            seed: take z as a sample of the posterior, by noise that depends on this and a latent's place alone; None
                takes the mean, as does a model without a posterior.

        Yields:
            z, mean and logvar of a stretch along time, numpy arrays (B, z, t', h, w).
        """
        at = 0
        for mean, logvar in self.posterior_stream(read, num_frames):
            noise = None if seed is None else Tensor(noise_at(seed, at, mean.shape))
            pieces = self.encoded(mean, logvar, noise)
            at += mean.shape[2]
            yield Encoded(*(piece if piece is None else piece.asnumpy() for piece in pieces))

    def decode_stream(
        self, read: Callable[[int, int], np.ndarray], num_latents: int, num_target_frames: int | None = None
    ) -> Iterator[np.ndarray]:
        """`decode` of latents that are read by pieces: frames by pieces, in memory that does not grow with the video.

        The pieces join to what `decode` gives in the same tiles; see `encode_stream`.

        Args:
            read: gives latent frames [start, stop) as float32 (B, z, stop - start, h, w), in order as there.
            num_latents: latent frames of the video.
            num_target_frames: as for `decode`.

        Yields:
            float32 (B, 3, T', H, W), about [-1, 1]: not clipped.
        """
        if self._is_still(num_latents, num_target_frames):  # one frame from one latent frame: time is no axis to tile
            yield self.decode(Tensor(read(0, 1)), num_target_frames).asnumpy()
            return
        axes = self._stream_tiling().decode_axes(self.temporal_compression, self.spatial_compression, self.lead)
        left = num_target_frames
        for pixels in tensor_stretches(self.decode_latents, read, num_latents, axes):
            frames = pixels.astype(ms.float32).asnumpy()[:, :, :left]
            if left is not None:
                left -= frames.shape[2]
            yield frames
            if left == 0:
                return

    @property
    def stream_tile(self) -> int | None:
        """How many frames of a video `encode_stream` takes in at once; None for all of them."""
        return self._stream_tiling().encode_tile + self.lead

    def posterior_stream(
        self, read: Callable[[int, int], np.ndarray], num_frames: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`posterior` by stretches along time."""

        def padded(start: int, stop: int) -> np.ndarray:
            x = read(start, min(stop, num_frames))
            _, bottom, right = self.missing(x.shape)
            missing = (max(stop - num_frames, 0), bottom, right)
            return np.pad(x, [(0, 0), (0, 0), *((0, n) for n in missing)], mode="edge") if any(missing) else x

        length = num_frames + self.missing((1, 3, num_frames, 1, 1))[0]
        axes = self._stream_tiling().encode_axes(self.temporal_compression, self.spatial_compression, self.lead)
        for moments in tensor_stretches(self.encode_moments, padded, length, axes):
            yield self.split_moments(moments)

    def _stream_tiling(self) -> TilingConfig:
        """The tiles that are on, and along time those of `default_tiling` where none are."""
        default = self.default_tiling
        tiling = self.tiling or replace(default, spatial_tile=0, spatial_overlap=None)
        for side in ("encode", "decode"):
            if not getattr(tiling, f"{side}_tile"):
                times = {name: getattr(default, name) for name in (f"{side}_tile", f"{side}_overlap")}
                tiling = replace(tiling, **times)
        return tiling
