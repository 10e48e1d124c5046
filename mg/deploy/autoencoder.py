"""An exported model with the interface of `mg.models.autoencoder`, on numpy arrays, without MindSpore.

    vae = load("outputs/tae_onnx", engine="openvino")
    z, mean, logvar = vae.encode(x)                      # x (B, 3, T, H, W) in [-1, 1], of any length and size
    y = vae.decode(z, num_target_frames=x.shape[2])      # or vae(x)

Each network accepts one shape, that of a tile, so everything is cut into tiles, as the model does after
`enable_tiling` with the same settings. If tiles overlap, a last tile that would be too short is moved back. If they
don't, or if a clip is smaller than a tile or its length not a multiple of the temporal compression, the tile is padded
by repeating its last frame, row and column, and the result is cropped; norms see the padding, so there the results
aren't the model's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mg.codec import Codec, Decoder, Encoded, Encoder, Geometry, Streams, TwoStageCodec, fill
from mg.deploy.engines import Run, opener
from mg.tiling import TilingConfig

SETTINGS_FILE = "deploy.json"
FORMAT = 1


@dataclass
class Network:
    """One loaded graph, and the shapes of its input and output."""

    run: Run
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def on_tile(self, tile: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Run a tile, padded if it is smaller than the network's, clip by clip; crop the results to `shape`."""
        tile = fill(tile, [full - size for full, size in zip(self.input_shape[2:], tile.shape[2:])])
        _, _, t, h, w = shape
        return np.concatenate([self.run(np.ascontiguousarray(clip[None]))[:, :, :t, :h, :w] for clip in tile])


def load(
    folder: str | Path,
    engine: str = "onnxruntime",
    precision: str = "fp32",
    device: str = "auto",
    threads: int | None = None,
    compile: bool | None = None,
) -> "DeployedAutoencoder":
    """Open a folder that `mg-export` wrote.

    Args:
        folder: holds deploy.json and the networks.
        engine: onnxruntime | openvino | torch.
        precision: fp32 | tf32, on CUDA | fp16, with torch, or with onnxruntime on CUDA | bf16, with torch, or with
            OpenVINO on a CPU that has it.
        device: auto | cpu | cuda, the last with onnxruntime and torch; auto uses CUDA if the engine finds it.
        threads: CPU threads; by default the engine chooses.
        compile: whether torch compiles networks at their first run; by default on CUDA.

    Raises:
        ValueError, OSError: the folder is not an export, or the engine is not installed or lacks support for an option.
            Tiles that do not fit into a GPU's memory raise MemoryError when they run.
    """
    folder = Path(folder)
    described = _read_settings(folder)
    open_network = opener(engine, precision, device, threads, compile)
    try:
        networks = {
            name: Network(open_network(folder / made["file"]), tuple(made["input"]), tuple(made["output"]))
            for name, made in described["networks"].items()
        }
        return DeployedAutoencoder(described, networks)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / SETTINGS_FILE}: does not describe an exported model ({error!r})") from error


def _read_settings(folder: Path) -> dict:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not an exported model, there is no {SETTINGS_FILE}; mg-export writes one")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    version = described.get("version") if isinstance(described, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path}: its version is {version}; only {FORMAT} can be read. Export the model again")
    if described.get("format") != "onnx":
        raise ValueError(f"{path}: the networks are {described.get('format')}; export the model with --format onnx")
    return described


class DeployedAutoencoder(Streams):
    """An exported model.

    Attributes:
        name, config: of the model.
        frames: how many the networks see at once.
        networks: by name: encoder and decoder; with two stages spatial_encoder, temporal_encoder and so on.
        sha256: of the checkpoint.
    """

    def __init__(self, described: dict, networks: dict[str, Network]):
        self.name: str = described["model"]
        self.config: dict = described["config"]
        self.sha256: str = described["sha256"]
        self.frames: int = described["frames"]
        self.networks = networks
        two_stages = "spatial_encoder" in networks
        self.geometry = Geometry(
            self.config["in_channels"],
            described["latent_channels"],
            described["spatial_compression"],
            described["temporal_compression"],
            described["lead"],
            keeps_images=described["keeps_images"],
            has_posterior=described["has_posterior"],
            chunk=self.config["micro_frame_size"] if two_stages else None,
            images_only=self.frames == 1 and described["temporal_compression"] > 1,
        )
        tiling = TilingConfig(**described["tiling"])
        self._codec = self._two_stages(tiling) if two_stages else self._one_stage(tiling)

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def tiling(self) -> TilingConfig | None:
        """How clips are cut into tiles."""
        return self.codec.tiling

    def encode(self, x: np.ndarray, seed: int | Sequence[int] | None = None) -> Encoded:
        """Videos to latents.

        Args:
            x: (B, 3, T, H, W) in [-1, 1], of any size; an image is T = 1.
            seed: sample z from the posterior, with noise that depends only on this and a latent's position; None uses
                the mean, as does a model without a posterior.

        Raises:
            ValueError: another shape, values that aren't floating-point, or more than one frame although the networks
                were exported for images.
        """
        return self.codec.encode(x, seed=seed)

    def decode(self, z: np.ndarray, num_target_frames: int | None = None) -> np.ndarray:
        """Latents to videos; see `mg.codec.Codec.decode`."""
        return self.codec.decode(z, num_target_frames)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Reconstruct x (B, 3, T, H, W) from the posterior's mean, at its own size."""
        return self.codec.reconstruct(x)

    def _one_stage(self, tiling: TilingConfig) -> Codec:
        return Codec(self.geometry, *self._functions("", self.geometry), tiling)

    def _two_stages(self, tiling: TilingConfig) -> TwoStageCodec:
        whole, between = self.geometry, self.networks["spatial_decoder"].input_shape[1]
        frames = replace(whole, latent_channels=between, temporal=1, has_posterior=False, chunk=None)
        at_once = self.networks["spatial_encoder"].input_shape[2]
        spatial = Codec(
            frames,
            *self._functions("spatial_", frames),
            replace(tiling, encode_tile=at_once, decode_tile=at_once),
        )
        encoder, decoder = self._functions("temporal_", replace(whole, in_channels=between, spatial=1, chunk=None))
        shift, scale = self.config["shift"], self.config["scale"]
        return TwoStageCodec(whole, spatial, encoder, lambda z: decoder(z, False), tiling, shift, scale)

    def _functions(self, prefix: str, geometry: Geometry) -> tuple[Encoder, Decoder]:
        """Encoder and decoder of a tile: the networks with this prefix, and their geometry."""
        encoder, decoder = self.networks[f"{prefix}encoder"], self.networks[f"{prefix}decoder"]
        return (
            lambda x: encoder.on_tile(x, geometry.latent_shape(x.shape)),
            lambda z, still: decoder.on_tile(z, geometry.video_shape(z.shape, still)),
        )
