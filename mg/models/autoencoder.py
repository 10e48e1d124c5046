"""`VideoAutoencoder`: the one interface that every model here has.

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

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mg import runtime
from mg.checkpoints import (
    CheckpointError,
    LoadReport,
    StateDict,
    atomic_write,
    check_finite,
    compare_names,
    open_state_dict,
    write_state_dict,
)
from mg.models import naming
from mg.models.layers.forms import set_form
from mg.models.layers.layout import Enter, Leave, narrow, repeat_edges, split
from mg.models.layers.precision import set_precision
from mg.models.registry import merge_config, stored_config
from mg.models.streaming import Encoded, Streaming
from mg.models.tiling import tiled_tensor
from mg.tiling import TilingConfig

_logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """Names in which a model's weights are written for others.

    Attributes:
        reader: who reads them.
        file: the weights' file in their folders.
        weights: our weights and config -> theirs.
        config: our config -> what stands beside them.
        exact: names of tensors that are settings, and stay fp32 where the weights are rounded.
    """

    reader: str
    file: str
    weights: Callable[[Mapping, dict], dict]
    config: Callable[[dict], dict]
    exact: tuple[str, ...] = ()


def described_here(name: str) -> Callable[[dict], dict]:
    """What stands beside weights in a format that has no config of its own: ours, so that they are read here."""
    return lambda config: {"model": name, **config}


class VideoAutoencoder(Streaming, nn.Cell):
    """Base of all models. A model sets the class attributes and builds `encoder` and `decoder`, two cells.

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
        formats: what the weights can be written as for others, by name; the first is the original's.
        originals: the classes that the originals' configs name.
        parts: models that can be taken out of this one's weights, by name, each with what makes its config of this
            one's.
    """

    name: str
    default_config: dict
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
    formats: dict[str, Format] = {}
    originals: tuple[str, ...] = ()
    parts: dict[str, Callable[[dict], dict]] = {}

    def __init__(
        self,
        config: dict | None = None,
        sample_deterministic: bool = False,
        pretrained: "str | Path | StateDict | None" = None,
    ):
        super().__init__()
        stored = {} if pretrained is None else stored_config(pretrained, type(self))
        self.config = merge_config(self.default_config, {**stored, **(config or {})}, self.name)
        self.sample_deterministic = sample_deterministic
        self.tiling: TilingConfig | None = None
        self.enter, self.leave = Enter(), Leave()  # of the networks, which may have a layout of their own

    def finish(self, dtype: str, use_recompute: bool, pretrained: str | Path | StateDict | None) -> None:
        """The end of a model's constructor: its layers' form, precision, recompute and weights, once all are there."""
        runtime.block_on_cpu()
        set_form(self)
        set_precision(self, dtype)
        if use_recompute:
            self.recompute_activations()
        if pretrained is not None:
            self.load_weights(pretrained)

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

    # What files of the original hold. All are functions of a config: nothing is built for a conversion.

    @staticmethod
    def is_original_config(config: dict) -> bool:
        """Whether a config without our `model` key is what the original writes for this model."""
        return False

    @staticmethod
    def translate_config(config: dict) -> dict:
        """This model's config from the original's, as it stands beside weights; one that is already ours passes."""
        return config

    @staticmethod
    def config_in_weights(state: Mapping) -> dict:
        """The keys of this model's config that the original keeps among its weights."""
        return {}

    @staticmethod
    def translate_weights(state: Mapping, config: dict) -> dict:
        """Rename the originals' parameters to this model's; names that are already ours, and others, pass."""
        return dict(state)

    @staticmethod
    def own_part(state: Mapping) -> dict:
        """What of a file may be this model's: without what lies beside it there."""
        return dict(state)

    @staticmethod
    def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter of a model of this config."""
        raise NotImplementedError

    @classmethod
    def original_config(cls, config: dict) -> dict:
        """The config that the original reads, from ours; ours, where the original has no file for it."""
        return next(iter(cls.formats.values())).config(config) if cls.formats else {"model": cls.name, **config}

    @classmethod
    def original_weights(cls, state: Mapping, config: dict) -> dict:
        """This model's parameters under the original's names, in the original's shapes."""
        return next(iter(cls.formats.values())).weights(state, config) if cls.formats else dict(state)

    @classmethod
    def recognises(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file with tensors of these names and shapes holds this model, of whatever size: it has all parts of
        the model (encoder, decoder, ...), and in them nothing but what is also in a model of the default config, under
        our names, the original's or those of another format. A model without `weight_shapes` is never recognised."""
        try:
            parts, known = _kinds(cls)  # type: ignore[arg-type]  # the __hash__ that mypy sees is an instance's
        except NotImplementedError:
            return False
        own = cls.own_part(naming.own_part(shapes, parts))
        found = {name: shape for name, shape in own.items() if _part(name) in parts}
        return _parts(found) == parts and all(naming.kind(*entry) in known for entry in found.items())

    # Weights.

    @classmethod
    def fit(cls, state: Mapping, config: dict, wanted: Mapping[str, tuple[int, ...]]) -> tuple[dict, LoadReport]:
        """The weights of a file in our names, and which of those that a model wants are there.

        Args:
            state: a file's, in our names, the original's or another format's, with whatever prefix.
            wanted: our name of every parameter -> its shape.

        Returns:
            Those that are wanted and found, of whatever shape; the report, what is left over being in the file's names.
        """
        own = naming.own_part(state, _parts(wanted))
        found = cls.translate_weights(own, config)
        report = compare_names(wanted, {name: tuple(value.shape) for name, value in found.items()})
        report.unexpected = [own.sources.get(name, name) for name in report.unexpected]
        inside = set(own.sources.values())
        report.unexpected += [name for name in state if name not in inside]
        return {name: found[name] for name in wanted if name in found}, report

    def load_weights(self, path: str | Path | StateDict, strict: bool = True) -> LoadReport:
        """Take the weights of a file or folder in any format that `mg.checkpoints` reads, ours or the original's.

        Args:
            strict: fail unless every parameter is found with its shape; names left over never matter.

        Raises:
            CheckpointError: an unreadable file, or names and shapes that are not this model's.
        """
        parameters = dict(self.named_weights())
        with open_state_dict(path) as state:
            wanted = {name: tuple(p.shape) for name, p in parameters.items()}
            found, report = self.fit(state, self.config, wanted)
        if strict and not report.complete:
            raise CheckpointError(
                f"{path} does not fit this {self.name}: {report.summary()}; "
                "if its sizes differ, give its config (config.json, or a .json of the file's name beside it)",
                report,
            )
        check_finite(str(path), {name: found[name] for name in report.used})
        for name in report.used:
            parameters[name].set_data(Tensor(found[name], parameters[name].dtype))
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
        """Every parameter, by its name within this model."""
        return self.parameters_and_names()

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


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    return name.partition(".")[0]


def _parts(names: Iterable[str]) -> set[str]:
    return {_part(name) for name in names}


@functools.cache
def _kinds(model: type[VideoAutoencoder]) -> tuple[set[str], set]:
    """The parts of a model, and the kinds of its parameters in our names and in those of each format."""
    ours = model.weight_shapes(model.default_config)
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in ours.items()}  # takes no memory
    writers = [model.original_weights, *(format.weights for format in model.formats.values())]
    states = [empty, *(weights(empty, model.default_config) for weights in writers)]
    known = {
        naming.kind(name, array.shape)
        for state in states
        for name, array in naming.own_part(state, _parts(ours)).items()
    }
    return _parts(ours), known


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
