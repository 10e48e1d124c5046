"""Where a denoiser's latents come from: a frozen autoencoder, as clips come, or a folder of `mg-encode-latents`.

Both make a loader of rows. Called with a batch they give its latents (B, z, t, h, w), float32: samples of the
posterior, each by noise from a seed of its own, or without seeds its mean. They are scaled to about unit variance, and
cut to the latents that their clip fills whole.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mg.data.buckets import Bucket, Groups, Place
from mg.data.index import IndexRow
from mg.data.loader import Batch, ClipLoader, DataConfig
from mg.data.video import is_image
from mg.generation.codec import LatentCodec
from mg.latents import LatentFolder
from mg.sampling import noise_at


class EncodedLatents:
    """Latents of clips, encoded one by one: so they do not depend on the batch."""

    def __init__(self, codec: LatentCodec):
        self.codec, self.in_channels, self.cell = codec, codec.in_channels, codec.cell

    def __call__(self, batch: Batch, seeds: Sequence[Sequence[int]] | None) -> np.ndarray:
        height, width = self.codec.pixel_size(batch.x.shape[3:])
        x = batch.x[:, :, :, :height, :width]
        each: Sequence = seeds or [None] * len(x)
        return np.concatenate([self.codec.encode(clip[None], seed) for clip, seed in zip(x, each)])

    def loader(self, rows: Sequence[IndexRow], data: DataConfig, seed: int, rank: int, world_size: int) -> ClipLoader:
        """Images and videos apart: of clips of one size all are videos, or where clips have one frame all there is."""
        apart = data.buckets is None and data.image_ratio is None
        if apart and not all(is_image(row.path) for row in rows):
            data = replace(data, image_ratio=1.0 if data.sample_n_frames == 1 else 0.0)
        return ClipLoader(rows, data, seed, rank, world_size, self.cell)


class StoredLatents:
    """Latents of a folder, which a loader reads in place of clips: it stands for a `ClipReader`.

    Of a posterior mean and log-variance come one behind the other along the channels.

    Args:
        latents: the folder.
        scaling: scaling_factor and shift_factor to take in place of those of the folder.

    Attributes:
        rows: of an index, one for each clip.
    """

    def __init__(self, latents: LatentFolder, scaling: dict[str, float]):
        settings: dict[str, Any] = latents.settings
        self.latents = latents
        self.has_posterior = "logvar" in settings["latents"]["stored"]
        factors = {} if settings["scaling"]["applied"] else {**settings["scaling"]["factors"], **scaling}
        self._scale, self._shift = factors.get("scaling_factor") or 1.0, factors.get("shift_factor") or 0.0
        stride = settings["clips"].get("frame_stride") or 1
        self.rows = []
        for name, clip in latents.items():
            path = Path(latents.folder) / name
            rate = None if clip.still else clip.fps * stride  # of the material
            self.rows.append(IndexRow(path, name, clip.caption, clip.frames, clip.height, clip.width, rate))
        if not self.rows:
            raise ValueError(f"{latents.folder}: has no latents; all of its videos failed")
        self.in_channels = latents[self.rows[0].name].shape[0]

    def loader(self, rows: Sequence[IndexRow], data: DataConfig, seed: int, rank: int, world_size: int) -> ClipLoader:
        groups = self.groups(rows, data.batch_size)
        return ClipLoader(rows, data, seed, rank, world_size, reader=self, groups=groups)

    def groups(self, rows: Sequence[IndexRow], batch_size: int) -> Groups:
        """Clips of one length and size each, so many of them at once."""
        clips = [self.latents[row.name] for row in rows]
        buckets = [Bucket("latents", clip.frames, batch_size, 1.0, 1.0) for clip in clips]
        return Groups([Place(bucket, (clip.height, clip.width)) for bucket, clip in zip(buckets, clips)])

    def latent_size(self, row: IndexRow) -> tuple[int, int, int]:
        """Frames, height and width of the latents of a row."""
        clip = self.latents[row.name]
        _, t, h, w = clip.shape
        return t, _whole(clip.height, h), _whole(clip.width, w)

    def read(self, row: IndexRow, num_frames: int, size: tuple[int, int], key: tuple[int, ...]) -> np.ndarray:
        clip = self.latents[row.name]
        _, h, w = self.latent_size(row)
        tensors = ("mean", "logvar") if self.has_posterior else ("z",)
        return np.concatenate([clip.read(tensor) for tensor in tensors])[:, :, :h, :w]

    def frame_rate(self, row: IndexRow) -> float:
        return row.fps or 0.0

    def __call__(self, batch: Batch, seeds: Sequence[Sequence[int]] | None) -> np.ndarray:
        z = batch.x
        if self.has_posterior:
            z, logvar = np.split(z, 2, axis=1)
            if seeds is not None:
                noise = np.concatenate([noise_at(seed, 0, (1, *z.shape[1:])) for seed in seeds])
                z = z + np.exp(np.float32(0.5) * logvar) * noise
        return ((z - np.float32(self._shift)) * np.float32(self._scale)).astype(np.float32)


def _whole(pixels: int, latents: int) -> int:
    """How many of so many latents along a side their pixels fill: encoders fill up the last one."""
    cell = 1
    while -(-pixels // cell) > latents:
        cell *= 2  # as all autoencoders here have it
    return pixels // cell or latents
