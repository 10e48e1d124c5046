"""`VideoAutoencoder`: the one interface that every model here has.

    model = create_model("tae", pretrained="tae.ckpt")
    z, mean, logvar = model.encode(x)      # x (B, 3, T, H, W) in [-1, 1]
    x = model.decode(z)                    # all frames that the latents stand for
    y = model(x)                           # reconstruction, at x's own length and size

Called from Python, `encode` and `decode` run eager glue (padding, tiles, sampling) around two cells that graph mode
compiles once per shape. Inside a larger graph, a training step's, use `forward`: the same without tiles.
"""

import difflib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mg.checkpoints import CheckpointError, LoadReport, atomic_write, compare_names, read_state_dict, write_state_dict
from mg.models.layers.precision import set_precision
from mg.models.layers.resnet import ResnetBlock
from mg.models.tiling import TilingConfig, tiled_tensor

_logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """What `encode` returns, each (B, z, t, h, w); `logvar` is None for a model without a posterior."""

    z: Tensor
    mean: Tensor
    logvar: Tensor | None


class VideoAutoencoder(nn.Cell):
    """Base of all models. A model sets the class attributes and builds `encoder` and `decoder`, two cells.

    Attributes:
        config: every setting that the weights depend on.
        spatial_compression, temporal_compression: pixels per latent along H and W, frames per latent along T.
        latent_channels: z.
    """

    name: str
    default_config: dict
    spatial_compression: int
    temporal_compression: int
    latent_channels: int

    def __init__(self, config: dict, sample_deterministic: bool = False):
        super().__init__()
        self.config = merge_config(self.default_config, config, self.name)
        self.sample_deterministic = sample_deterministic
        self.tiling: TilingConfig | None = None

    def finish(self, dtype: str, use_recompute: bool, pretrained: str | Path | None) -> None:
        """The end of a model's constructor: precision, recompute and weights, once all cells are there."""
        set_precision(self, dtype)
        if use_recompute:
            for cell in (self.encoder, self.decoder):
                recompute_blocks(cell)
        if pretrained is not None:
            self.load_weights(pretrained)

    # What a model may override.

    def encode_moments(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), padded -> mean and log-variance along the channels, (B, 2 z, t, h, w)"""
        return self.encoder(x)

    def decode_latents(self, z: Tensor) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, t * temporal_compression, h * spatial_compression, w * spatial_compression)"""
        return self.decoder(z)

    @staticmethod
    def translate_config(config: dict) -> dict:
        """This model's config from the original's, as it stands beside weights; one that is already ours passes."""
        return config

    def translate_weights(self, state: dict) -> dict:
        """Rename the originals' parameters to this model's; names that are already ours pass."""
        return state

    # Weights.

    def load_weights(self, path: str | Path, strict: bool = True) -> LoadReport:
        """Take the weights of a file or folder in any format that `mg.checkpoints` reads, ours or the original's.

        Args:
            strict: fail unless every parameter is found with its shape; names left over never matter.

        Raises:
            CheckpointError: an unreadable file, or names and shapes that are not this model's.
        """
        state = self.translate_weights(read_state_dict(path))
        parameters = dict(self.named_weights())
        wanted = {name: tuple(p.shape) for name, p in parameters.items()}
        report = compare_names(wanted, {name: tuple(value.shape) for name, value in state.items()})
        if strict and not report.complete:
            raise CheckpointError(
                f"{path} does not fit this {self.name}: {report.summary()}; "
                "if its sizes differ, give its config (config.json, or a .json of the file's name beside it)",
                report,
            )
        for name in report.used:
            parameters[name].set_data(Tensor(state[name], parameters[name].dtype))
        _logger.info("%s: %s", path, report.summary())
        return report

    def save_pretrained(self, folder: str | Path, weights: dict | None = None) -> None:
        """Write config.json and model.safetensors; `weights` replace parameters of their name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder / "model.safetensors", folder / "config.json", weights)

    def save_weights(self, path: Path, config_path: Path | None = None, weights: dict | None = None) -> None:
        """Write the weights as one file, .ckpt or .safetensors, and the config beside it (by default X.json for X)."""
        arrays = {name: p.asnumpy() for name, p in self.named_weights()}
        write_state_dict(path, {**arrays, **(weights or {})})
        with atomic_write(config_path or path.with_suffix(".json")) as partial:
            partial.write_text(json.dumps({"model": self.name, **self.config}, indent=2) + "\n")

    def named_weights(self) -> Iterator[tuple[str, Parameter]]:
        return ((p.name, p) for p in self.get_parameters())

    # Pixels to latents and back.

    def encode(self, x: Tensor) -> Encoded:
        """Videos to latents.

        Args:
            x: (B, 3, T, H, W) in [-1, 1], of any size; an image is T = 1.

        Returns:
            z, mean and logvar, (B, z, ceil(T / temporal_compression), ceil(H / s), ceil(W / s)) each in fp32; z is a
            sample of the posterior, or its mean where the model was built with sample_deterministic.
        """
        check_video(x, self.config["in_channels"], "x")
        mean, logvar = self._posterior(x)
        if self.sample_deterministic:
            return Encoded(mean, mean, logvar)
        return Encoded(mean + ops.exp(0.5 * logvar) * ops.standard_normal(mean.shape), mean, logvar)

    def decode(self, z: Tensor, num_target_frames: int | None = None) -> Tensor:
        """Latents to videos.

        Args:
            z: (B, z, t, h, w).
            num_target_frames: keep so many frames from the first on, by default all that the latents stand for.

        Returns:
            (B, 3, T, H, W) in fp32, about [-1, 1]: not clipped.
        """
        check_video(z, self.latent_channels, "z")
        return self._decoded(z)[:, :, :num_target_frames]

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct x (B, 3, T, H, W) from the posterior's mean, at its own size; tiled where that is on."""
        check_video(x, self.config["in_channels"], "x")
        return self.construct(x)  # as Python, not compiled as one graph: encoder and decoder compile on their own

    def construct(self, x: Tensor) -> Tensor:
        """What a surrounding graph sees of a call; tiles cannot be on there."""
        _, _, t, h, w = x.shape
        return self._decoded(self._posterior(x)[0])[:, :, :t, :h, :w]

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pass of a training step, made to be compiled: no tiles, and the randomness comes from outside.

        Args:
            x: (B, 3, T, H, W) in [-1, 1].
            noise: standard normal, of the latents' shape; zeros give the posterior's mean.

        Returns:
            Reconstruction (x's shape, fp32), z, mean, logvar.
        """
        _, _, t, h, w = x.shape
        mean, logvar = self._posterior(x)
        z = mean + ops.exp(0.5 * logvar) * noise
        return self._decoded(z)[:, :, :t, :h, :w], z, mean, logvar

    def enable_tiling(self, **settings) -> None:
        """From now on encode, decode and call work tile by tile, in time and, if asked for, in space.

        Memory on the device then depends on the tile alone. Norms see a tile in place of the whole clip, so results
        differ a little from untiled ones; overlapping tiles are blended linearly.

        Args:
            settings: fields of `mg.models.tiling.TilingConfig`.

        Raises:
            ValueError: sizes that are no multiples of the compression.
        """
        tiling = TilingConfig(**settings)
        tiling.encode_axes(self.temporal_compression, self.spatial_compression)
        self.tiling = tiling

    def disable_tiling(self) -> None:
        """Encode and decode whole clips again."""
        self.tiling = None

    def _posterior(self, x):
        x = self._pad(x)
        if self.tiling is None:
            moments = self.encode_moments(x)
        else:
            axes = self.tiling.encode_axes(self.temporal_compression, self.spatial_compression)
            moments = tiled_tensor(self.encode_moments, x, axes)
        mean, logvar = ops.split(moments.astype(ms.float32), self.latent_channels, axis=1)
        return mean, ops.clamp(logvar, -30.0, 20.0)

    def _decoded(self, z):
        if self.tiling is None:
            return self.decode_latents(z).astype(ms.float32)
        axes = self.tiling.decode_axes(self.temporal_compression, self.spatial_compression)
        return tiled_tensor(self.decode_latents, z, axes).astype(ms.float32)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latents of a (B, C, T, H, W) video."""
        b, _, t, h, w = shape
        c, s = self.temporal_compression, self.spatial_compression
        return b, self.latent_channels, -(-t // c), -(-h // s), -(-w // s)

    def _pad(self, x):
        """Repeat the last row and column up to a multiple of the compression. Temporal layers take any length."""
        b, c, t, h, w = x.shape
        bottom, right = -h % self.spatial_compression, -w % self.spatial_compression
        if bottom:
            x = ops.cat((x,) + (x[:, :, :, -1:],) * bottom, axis=3)
        if right:
            x = ops.cat((x,) + (x[:, :, :, :, -1:],) * right, axis=4)
        return x


def check_video(x: Tensor, channels: int, name: str) -> None:
    """Raise ValueError unless x is (B, channels, T, H, W)."""
    if x.ndim != 5 or x.shape[1] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, {channels}, T, H, W)")


def recompute_blocks(network: nn.Cell) -> None:
    """Keep only the inputs of residual blocks for the backward pass, and compute the rest again there."""
    for _, cell in network.cells_and_names():
        if isinstance(cell, ResnetBlock):
            cell.recompute()


def merge_config(defaults: dict, given: dict, name: str) -> dict:
    """`defaults` with what is `given` laid over them; an unknown key is an error that names the nearest."""
    for key in given:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(defaults)}"
            raise ValueError(f"{name} has no config key {key!r}; {hint}")
    return {**defaults, **given}
