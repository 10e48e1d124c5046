"""An exported model behind the interface of `mg.models.autoencoder`, on numpy arrays, without MindSpore.

    vae = load("outputs/tae_onnx", engine="openvino")
    z, mean, logvar = vae.encode(x)                      # x (B, 3, T, H, W) in [-1, 1], of any length and size
    y = vae.decode(z, num_target_frames=x.shape[2])      # or vae(x)

Its networks take one shape each, a tile's, so everything is cut into tiles, as the model cuts it after `enable_tiling`
with the same settings. A tile that would be cut short moves back where tiles overlap. Where they do not, or where a
clip is smaller than a tile, the tile is filled by repeating its last frame, row and column, and the result is cropped;
norms see what it was filled with, so there results differ a little from the model's.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mg.deploy.engines import Run, opener
from mg.sampling import noise_at
from mg.tiling import Axis, TilingConfig, chunk_bounds, tiled

SETTINGS_FILE = "deploy.json"
FORMAT = 1


class Encoded(NamedTuple):
    """What `encode` returns, each (B, z, t, h, w), float32; `logvar` is None for a model without a posterior."""

    z: np.ndarray
    mean: np.ndarray
    logvar: np.ndarray | None


@dataclass
class Network:
    """One graph, open for running, and the shapes of its input and output."""

    run: Run
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def load(
    folder: str | Path,
    engine: str = "onnxruntime",
    precision: str = "fp32",
    device: str = "auto",
    threads: int | None = None,
) -> "DeployedAutoencoder":
    """Open a folder that `mg-export` wrote.

    Args:
        folder: it holds deploy.json and the networks.
        engine: onnxruntime | openvino.
        precision: fp32 | tf32, with onnxruntime on CUDA | bf16, with OpenVINO on a CPU that has it.
        device: auto | cpu | cuda, the last with onnxruntime; auto takes CUDA where onnxruntime finds it.
        threads: of the CPU; by default as the engine chooses.

    Raises:
        ValueError, OSError: a folder that is no such export, an engine that is not there, or what it cannot do here.
            Tiles that a GPU's memory does not hold are a MemoryError when they run.
    """
    folder = Path(folder)
    described = _read_settings(folder)
    open_network = opener(engine, precision, device, threads)
    try:
        networks = {
            name: Network(open_network(folder / made["file"]), tuple(made["input"]), tuple(made["output"]))
            for name, made in described["networks"].items()
        }
        two_stages = "spatial_encoder" in networks
        return (TwoStageAutoencoder if two_stages else DeployedAutoencoder)(described, networks)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / SETTINGS_FILE}: does not describe an exported model ({error!r})") from error


def _read_settings(folder: Path) -> dict:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no exported model, there is no {SETTINGS_FILE}; mg-export writes one")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    version = described.get("version") if isinstance(described, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path}: its version is {version}; {FORMAT} can be read. Export the model again")
    if described.get("format") != "onnx":
        raise ValueError(f"{path}: the networks are {described.get('format')}; export the model with --format onnx")
    return described


class DeployedAutoencoder:
    """A model of one stage.

    Attributes:
        name, config: of the model.
        spatial_compression, temporal_compression: pixels per latent along H and W, frames per latent along T.
        latent_channels: z.
        tiling: where tiles lie.
        frames: that the networks see at once.
        networks: by name: encoder and decoder; of two stages spatial_encoder, temporal_encoder and so on.
        sha256: of the checkpoint.
    """

    def __init__(self, described: dict, networks: dict[str, Network]):
        self.name: str = described["model"]
        self.config: dict = described["config"]
        self.sha256: str = described["sha256"]
        self.spatial_compression: int = described["spatial_compression"]
        self.temporal_compression: int = described["temporal_compression"]
        self.latent_channels: int = described["latent_channels"]
        self.frames: int = described["frames"]
        self.tiling = TilingConfig(**described["tiling"])
        self._has_posterior: bool = described["has_posterior"]
        self._keeps_images: bool = described["keeps_images"]
        self._lead: int = described["lead"]
        self._images_alone = self.frames == 1 and self.temporal_compression > 1
        self.networks = networks

    def encode(self, x: np.ndarray, seed: int | Sequence[int] | None = None) -> Encoded:
        """Videos to latents.

        Args:
            x: (B, 3, T, H, W) in [-1, 1], of any size; an image is T = 1.
            seed: take z as a sample of the posterior, by noise that depends on this and a latent's place alone; None
                takes the mean, as does a model without a posterior.

        Raises:
            ValueError: another shape, values that are no floating-point numbers, or more than one frame where the
                networks were exported for images.
        """
        x = _checked(x, self.config["in_channels"], "x")
        if self._images_alone and x.shape[2] != 1:
            raise ValueError(f"x has {x.shape[2]} frames, but this export is for images (--frames 1): one frame each")
        mean, logvar = self._posterior(x)
        z = mean
        if logvar is not None and seed is not None:
            z = mean + np.exp(0.5 * logvar) * noise_at(seed, 0, mean.shape)
        return self._scaled(z, mean, logvar)

    def decode(self, z: np.ndarray, num_target_frames: int | None = None) -> np.ndarray:
        """Latents to videos.

        Args:
            z: (B, z, t, h, w).
            num_target_frames: keep so many frames from the first on, by default all that the latents stand for. A
                model that keeps images takes t = 1 for an image unless more frames are asked for.

        Returns:
            (B, 3, T, H, W), float32, about [-1, 1]: not clipped.
        """
        z = _checked(z, self.latent_channels, "z")
        if self._images_alone and z.shape[2] != 1:
            raise ValueError(f"z has {z.shape[2]} frames, but this export is for images (--frames 1): one frame each")
        if self._keeps_images and z.shape[2] == 1 and num_target_frames is None:
            num_target_frames = 1
        return self._pixels(z, num_target_frames)[:, :, :num_target_frames]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Reconstruct x (B, 3, T, H, W) from the posterior's mean, at its own size."""
        _, _, t, h, w = x.shape
        return self.decode(self.encode(x).mean, t)[:, :, :, :h, :w]

    # What differs in a model of two stages.

    @property
    def frames_at_once(self) -> int | None:
        """How many frames know nothing of those around them; None where all go together."""
        return None

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latents of a (B, C, T, H, W) video."""
        b, _, t, h, w = shape
        c, s = self.temporal_compression, self.spatial_compression
        return b, self.latent_channels, self._lead - (self._lead - t) // c, -(-h // s), -(-w // s)

    def _posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        c, s = self.temporal_compression, self.spatial_compression
        behind = 0 if self._images_alone else (self._lead - x.shape[2]) % c
        x = _filled(x, (behind, -x.shape[3] % s, -x.shape[4] % s))
        return self._split(self._tiled("encoder", x, self.tiling.encode_axes(c, s, self._lead)))

    def _pixels(self, z: np.ndarray, frames: int | None) -> np.ndarray:
        axes = self.tiling.decode_axes(self.temporal_compression, self.spatial_compression, self._lead)
        return self._tiled("decoder", z, axes)

    def _scaled(self, z: np.ndarray, mean: np.ndarray, logvar: np.ndarray | None) -> Encoded:
        return Encoded(z, mean, logvar)

    # What does not.

    def _split(self, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 2 z, t, h, w) -> mean and clamped log-variance; without a posterior, the latents and None."""
        if not self._has_posterior:
            return moments, None
        mean, logvar = np.split(moments, 2, axis=1)
        return mean, np.clip(logvar, -30.0, 20.0)

    def _tiled(self, name: str, x: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
        """One network over all tiles of all clips of x (B, C, T, H, W)"""
        run = _on_tiles(self.networks[name], axes)
        return np.concatenate([tiled(run, clip[None], axes) for clip in x])


class TwoStageAutoencoder(DeployedAutoencoder):
    """The Open-Sora 1.2 VAE: a spatial half and, in chunks of time, a temporal one; see `mg.models.temporal_vae`."""

    def __init__(self, described: dict, networks: dict[str, Network]):
        super().__init__(described, networks)
        self._shift, self._scale = (np.float32(self.config[key]).reshape(1, -1, 1, 1, 1) for key in ("shift", "scale"))
        self._chunk: int = self.config["micro_frame_size"]

    @property
    def frames_at_once(self):
        return self._chunk

    def latent_shape(self, shape):
        b, _, t, h, w = shape
        chunks, s = chunk_bounds(t, self._chunk), self.spatial_compression
        frames = sum(-(-(stop - start) // self.temporal_compression) for start, stop in chunks)
        return b, self.latent_channels, frames, -(-h // s), -(-w // s)

    def decode(self, z, num_target_frames=None):
        z = _checked(z, self.latent_channels, "z")
        return super().decode(z * self._scale + self._shift, num_target_frames)

    def _scaled(self, z, mean, logvar):
        z, mean = ((value - self._shift) / self._scale for value in (z, mean))
        return Encoded(z, mean, logvar - 2 * np.log(self._scale))

    def _posterior(self, x):
        c, s = self.temporal_compression, self.spatial_compression
        x = _filled(x, (0, -x.shape[3] % s, -x.shape[4] % s))
        x_z = self._tiled("spatial_encoder", x, self._axes("spatial_encoder", 1, s))  # (B, 4, T, h, w)
        moments = []
        for start, stop in chunk_bounds(x_z.shape[2], self._chunk):
            chunk = np.pad(x_z[:, :, start:stop], ((0, 0), (0, 0), (-(stop - start) % c, 0), (0, 0), (0, 0)))
            moments.append(self._tiled("temporal_encoder", chunk, self._axes("temporal_encoder", c, 1)))
        return self._split(np.concatenate(moments, axis=2))

    def _pixels(self, z, frames):
        c, s = self.temporal_compression, self.spatial_compression
        decoded = []
        for i, (start, stop) in enumerate(chunk_bounds(z.shape[2], -(-self._chunk // c))):
            chunk = self._tiled("temporal_decoder", z[:, :, start:stop], self._axes("temporal_decoder", c, 1, up=True))
            kept = most = min(chunk.shape[2], self._chunk)
            if frames is not None and chunk.shape[2] - c < frames - i * self._chunk <= most:
                kept = frames - i * self._chunk
            decoded.append(chunk[:, :, chunk.shape[2] - kept :])
        x_z = np.concatenate(decoded, axis=2)
        return self._tiled("spatial_decoder", x_z, self._axes("spatial_decoder", 1, s, up=True))

    def _axes(self, name: str, temporal: int, spatial: int, up: bool = False) -> list[Axis]:
        """The axes of a network that changes time and space by these factors. Along time its tiles share nothing."""
        frames = self.networks[name].input_shape[2]
        tiling = self.tiling
        if spatial == 1:  # it sees latents of the spatial half
            axes = [
                replace(axis, up=1) for axis in tiling.decode_axes(self.temporal_compression, self.spatial_compression)
            ]
        elif up:
            axes = tiling.decode_axes(temporal, spatial)
        else:
            axes = tiling.encode_axes(temporal, spatial)
        time = Axis(2, frames, up=temporal) if up else Axis(2, frames, down=temporal)
        return [time, *axes]


def _checked(x: np.ndarray, channels: int, name: str) -> np.ndarray:
    """x as float32.

    Raises:
        ValueError: it is not (B, channels, T, H, W), each at least 1, or no floating-point numbers.
    """
    if x.ndim != 5 or x.shape[1] != channels or not x.size:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, {channels}, T, H, W)")
    if x.dtype.kind != "f":
        raise ValueError(f"{name} has dtype {x.dtype}; it must be floating-point numbers")
    return x.astype(np.float32, copy=False)


def _filled(x: np.ndarray, missing: Sequence[int]) -> np.ndarray:
    """Repeat the last frame, row and column so many times. (B, C, T, H, W)"""
    return np.pad(x, [(0, 0), (0, 0), *((0, n) for n in missing)], mode="edge") if any(missing) else x


def _on_tiles(network: Network, axes: Sequence[Axis]) -> Callable[[np.ndarray], np.ndarray]:
    """A network as a function of tiles that may be smaller than its own."""

    def run(tile: np.ndarray) -> np.ndarray:
        full = _filled(tile, [n - m for n, m in zip(network.input_shape[2:], tile.shape[2:])])
        result = network.run(np.ascontiguousarray(full))
        for axis in axes:
            length = axis.scaled(tile.shape[axis.dim] - axis.lead) + axis.lead
            result = result[(slice(None),) * axis.dim + (slice(length),)]
        return result

    return run
