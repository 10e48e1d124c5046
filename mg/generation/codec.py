"""A common interface for diffusion to all autoencoders of this project, in MindSpore or exported.

    codec = LatentCodec(from_pretrained("models/sd-vae-ft-ema"))
    codec.latent_size((16, 256, 256))           # (16, 32, 32)
    z = codec.encode(x)                         # x (B, 3, T, H, W) in [-1, 1] -> z of about unit variance
    x = codec.decode(z, num_frames=16)

Channels, compression, frames and scaling come from the model; none are hard-coded here. Arrays are numpy's.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mg.deploy.autoencoder import SETTINGS_FILE, DeployedAutoencoder
from mg.deploy.autoencoder import load as load_exported
from mg.generation.config import AutoencoderSection
from mg.inference.fitting import Fitting
from mg.models import VideoAutoencoder, from_pretrained, model_class, model_name

# Open-Sora's names for autoencoders, and ours.
AUTOENCODERS = {"VideoAutoencoderKL": "image_vae", "OpenSoraVAE_V1_2": "temporal_vae"}


class LatentCodec:
    """Pixels to latents and back.

    Args:
        model: the autoencoder.
        fitting: how to fit it into memory, see `Fitting`; an exported one has the tiles that it was exported with.

    Attributes:
        in_channels: channels of the latents.
        cell: side in pixels of the square that one latent represents.
    """

    def __init__(self, model: VideoAutoencoder | DeployedAutoencoder, fitting: Fitting | None = None):
        self.model = model
        self.in_channels = model.latent_channels
        self.cell = model.spatial_compression
        self._fitting = fitting or Fitting(enable_tile=False)
        own = {} if model_class(model.name).applies_scaling else model.config
        self._scale, self._shift = own.get("scaling_factor") or 1.0, own.get("shift_factor") or 0.0

    @property
    def chunk(self) -> tuple[int, int] | None:
        """Frames and latent frames of a chunk: 1 and 1 for an image VAE, 17 and 5 for the Open-Sora 1.2 VAE; None if
        all frames are encoded together."""
        frames = 1 if self.model.temporal_compression == 1 else self.model.geometry.chunk
        return (frames, self._latent_frames(frames)) if frames else None

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the latents of a clip (T, H, W). H and W are rounded down to whole latents, as in
        the released networks' training; `pixel_size` is the decoded size.

        Raises:
            ValueError: a clip smaller than one latent.
        """
        frames, height, width = size
        if min(height, width) < self.cell:
            raise ValueError(
                f"image_size is {height} x {width}; a latent of {self.model.name} represents {self.cell} x "
                f"{self.cell} pixels, and there must be at least one"
            )
        return self._latent_frames(frames), height // self.cell, width // self.cell

    def pixel_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width without the rows and columns that do not fill a latent."""
        return size[0] // self.cell * self.cell, size[1] // self.cell * self.cell

    def frames_of(self, latents: int) -> int:
        """How many frames this many latent frames at the start of a clip represent.

        Raises:
            ValueError: they are not whole chunks.
        """
        if self.chunk and latents % self.chunk[1]:
            frames, of = self.chunk
            raise ValueError(
                f"{latents} latent frames end within a chunk of {self.model.name}, which turns {frames} frames "
                f"into {of} at once; it must be a multiple of {of}"
            )
        if self.chunk:
            return latents // self.chunk[1] * self.chunk[0]
        frames = (latents - 1) * self.model.temporal_compression + 1
        while self._latent_frames(frames + 1) <= latents:
            frames += 1
        return frames

    def encode(self, x: np.ndarray, seed: int | Sequence[int] | None = None) -> np.ndarray:
        """Clips (B, 3, T, H, W) in [-1, 1] -> latents (B, z, t, h, w), scaled.

        Args:
            seed: sample the posterior, with noise that only depends on this and a latent's position; None uses the
                mean.
        """
        return self._scaled(self._run(x.shape, "encode", lambda: self.model.codec.encode(x, seed=seed).z))

    def decode(self, z: np.ndarray, num_frames: int) -> np.ndarray:
        """Scaled latents (B, z, t, h, w) -> clips (B, 3, num_frames, H, W), about [-1, 1]: not clipped."""
        z = (z / np.float32(self._scale) + np.float32(self._shift)).astype(np.float32)
        b, _, _, h, w = z.shape
        shape = (b, 3, num_frames, h * self.cell, w * self.cell)
        return self._run(shape, "decode", lambda: self.model.codec.decode(z, num_frames))

    def _run(self, shape: tuple[int, ...], part: str, fn: Callable[[], np.ndarray]) -> np.ndarray:
        """Run `fn` for a clip of this shape, whole or in tiles; an exported model has its own tiles."""
        if isinstance(self.model, VideoAutoencoder):
            return self._fitting.run(self.model, shape, fn, (part,))
        return fn()

    def _scaled(self, z: np.ndarray) -> np.ndarray:
        return ((z - np.float32(self._shift)) * np.float32(self._scale)).astype(np.float32)

    def _latent_frames(self, frames: int) -> int:
        return self.model.latent_shape((1, 3, frames, self.cell, self.cell))[2]


def load_codec(section: AutoencoderSection, dtype: str) -> LatentCodec:
    """Load the autoencoder of a config, of any kind.

    Raises:
        ValueError, OSError: weights that cannot be read, or settings that this autoencoder does not have.
    """
    path = Path(section.from_pretrained or "")
    factors = {"scaling_factor": section.scaling_factor, "shift_factor": section.shift_factor}
    overrides = {key: value for key, value in factors.items() if value is not None} | section.config
    if section.type == "exported" or (section.type is None and (path / SETTINGS_FILE).is_file()):
        exported = load_exported(path, section.engine)
        fixed = set(overrides) - (set() if model_class(exported.name).applies_scaling else set(factors))
        if fixed:
            raise ValueError(f"{path}: the settings of an exported {exported.name} are fixed; leave {min(fixed)} out")
        exported.config |= overrides
        return LatentCodec(exported)
    name = AUTOENCODERS.get(section.type or "", section.type) or model_name(path)
    if name == "temporal_vae":
        micro = {"micro_batch_size": section.micro_batch_size, "micro_frame_size": section.micro_frame_size}
        overrides |= {key: value for key, value in micro.items() if value is not None}
    model = from_pretrained(path, name, dtype, **overrides)
    model.set_train(False)
    if name == "image_vae":
        model.micro_batch_size = section.micro_batch_size
    tiles = section.tiling.given()
    if section.enable_tile is True:
        model.enable_tiling(**tiles)
    return LatentCodec(model, Fitting(section.enable_tile, tiles, section.max_memory))
