"""`VideoAutoencoder`: the interface that all autoencoders share.

    model = create_model("tae", pretrained="tae.ckpt")
    z, mean, logvar = model.encode(x)      # x (B, 3, T, H, W) in [-1, 1]
    x = model.decode(z)                    # all frames that the latents represent
    y = model(x)                           # reconstruction, with x's length and size
    for piece in model.encode_stream(read, num_frames):    # a video of any length, in constant memory
        ...

These are for inference and carry no gradient: `mg.codec` pads, tiles, samples and crops on the host, and two networks,
each compiled once per shape in graph mode, run on the device. Inside a larger graph, such as a training step or your
own loss, use what `mg.models.trainable` has: everything is then one graph, without tiles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mg.checkpoints import StateDict
from mg.codec import Codec, Encoded, Streams
from mg.models.layers.precision import set_precision
from mg.models.registry import AUTOENCODERS, merge_config
from mg.models.stored import StoredModel
from mg.models.trainable import TrainableAutoencoder
from mg.tiling import TilingConfig


class VideoAutoencoder(Streams, TrainableAutoencoder, StoredModel):
    """Base class of all autoencoders: networks, and the codec that runs them.

    A model sets the class attributes, and in its constructor `geometry`, `encoder` and `decoder`, then calls `finish`.

    Attributes:
        scaling: how latents get about unit variance, in one line: the config keys, and who applies them.
        applies_scaling: `encode` applies the scaling and `decode` undoes it.
        default_tiling: what `enable_tiling` starts from.
        starts_linear: `start_linear` can fit an untrained model's straight path to clips.
    """

    scaling = "for the caller: z = (z - shift_factor) * scaling_factor after encode, undone before decode"
    applies_scaling = False
    default_tiling = TilingConfig()
    starts_linear = False

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

    def finish(self, dtype: str, use_recompute: bool, pretrained: "str | Path | StateDict | None") -> None:
        super().finish(dtype, use_recompute, pretrained)
        if dtype == "bf16":  # in bf16 the last convolution costs `assets/image_vae` 0.3 dB, and in fp32 one cast
            set_precision(self.last_conv, "fp32")

    # What a model whose `encode` scales, or scales by other keys, overrides.

    def unscaled(self, z):
        """Undo the scaling that `encode` applies, on arrays or tensors."""
        return z

    def scaling_for(self, mean: float, std: float, means: list[float], stds: list[float]) -> dict:
        """The config keys that scale latents with these statistics (of unscaled latents) to about unit variance.

        Args:
            mean, std: over all latents.
            means, stds: per channel.
        """
        return {"scaling_factor": 1 / std, "shift_factor": mean}

    # A start without gradient descent.

    def linear_start(self, state: Mapping[str, np.ndarray], clips: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters that change when a model that `starts_linear` is fitted to clips."""
        raise NotImplementedError

    def start_linear(self, clips: Sequence[np.ndarray]) -> None:
        """Fit the straight path of an untrained model that `starts_linear` to clips.

        Args:
            clips: (3, T, H, W) in [-1, 1], T, H and W multiples of the compression; a few dozen are enough,
                except for a DC-AE, which needs more than a hundred.

        Raises:
            ValueError: a config whose straight path is not supported, or clips too few or too uniform to fit.
        """
        parameters = dict(self.named_weights())
        state = {name: parameter.asnumpy() for name, parameter in parameters.items()}
        for name, value in self.linear_start(state, clips).items():
            parameters[name].set_data(Tensor(value.astype(np.float32)))

    # Encode and decode.

    @property
    def codec(self) -> Codec:
        """The model as a codec on numpy arrays, with the current tiling."""
        encoder, decoder = on_host(self.encode_moments), on_host(self.decode_latents)
        return Codec(self.geometry, encoder, decoder, self.tiling, self.default_tiling)

    def encode(self, x: Tensor) -> Encoded:
        """Videos to latents, for inference.

        Args:
            x: (B, 3, T, H, W) in [-1, 1], of any size; an image is T = 1.

        Returns:
            z, mean and logvar in fp32, each of the shape that `latent_shape` returns. z is a sample of the posterior,
            or its mean if the model was built with sample_deterministic. Without a posterior z is the mean and logvar
            is None.
        """
        x = _array(x)
        certain = not self.geometry.has_posterior or self.sample_deterministic or x.ndim != 5
        noise = None if certain else ops.standard_normal(self.latent_shape(x.shape)).asnumpy()
        return Encoded(*(part if part is None else Tensor(part) for part in self.codec.encode(x, noise)))

    def decode(self, z: Tensor, num_target_frames: int | None = None) -> Tensor:
        """Latents to videos, for inference.

        Args:
            z: (B, z, t, h, w).
            num_target_frames: keep only the first n frames; by default all that the latents represent. A model that
                `keeps_images` decodes t = 1 as an image unless more frames are requested.

        Returns:
            (B, 3, T, H, W) in fp32, about [-1, 1]: not clipped.
        """
        return Tensor(self.codec.decode(_array(z), num_target_frames))

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct x (B, 3, T, H, W) from the posterior's mean, at its own size; in tiles if tiling is enabled."""
        return Tensor(self.codec.reconstruct(_array(x)))

    def enable_tiling(self, **settings) -> None:
        """Make encode, decode and call work tile by tile, in time and, if requested, in space.

        Device memory then depends only on the tile size. Norms see a tile instead of the whole clip, so results differ
        slightly from untiled ones; overlapping tiles are blended linearly.

        Args:
            settings: fields of `mg.tiling.TilingConfig` that override `default_tiling`.

        Raises:
            ValueError: sizes that aren't multiples of the compression.
        """
        tiling = replace(self.default_tiling, **settings)
        tiling.encode_axes(self.temporal_compression, self.spatial_compression, self.geometry.lead)
        self.tiling = tiling

    def disable_tiling(self) -> None:
        """Encode and decode whole clips again."""
        self.tiling = None


def on_host(network: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """Wrap a network on tensors as a function of float32 arrays, for a `Codec`."""

    def run(x: np.ndarray, *settings, **named) -> np.ndarray:
        return network(Tensor(np.ascontiguousarray(x)), *settings, **named).astype(ms.float32).asnumpy()

    return run


def _array(x: Tensor) -> np.ndarray:
    """Also for bf16, which numpy does not have."""
    return x.astype(ms.float32).asnumpy() if x.dtype in (ms.float16, ms.bfloat16) else x.asnumpy()
