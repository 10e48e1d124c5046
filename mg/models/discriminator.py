"""The discriminator for adversarial training: the 3-D PatchGAN of Open-Sora 2.0, with the original's parameter names.

Strided 3x3x3 convolutions, the first two strided in time as well, output one logit per patch of a clip (PatchGAN: arXiv
1611.07004). What would be hidden state in a compiled step is an input or output instead: dropout masks are passed in,
and the batch statistics, which update the running ones, are returned.

With several workers, batch statistics span the global batch, as if one worker had all of it; the original uses each
worker's own (a plain BatchNorm3d on every GPU), so its training depends on how a batch is divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import Normal, initializer

from mg.checkpoints import CheckpointError, check_finite, compare_names, read_state_dict
from mg.config import require
from mg.models.layers.conv import Conv3d
from mg.models.layers.forms import set_form
from mg.models.layers.portable import LeakyReLU, root
from mg.models.layers.precision import set_precision
from mg.runtime import WorkerMean

DISCRIMINATOR_FILE = "discriminator.safetensors"


@dataclass
class DiscriminatorConfig:
    """The discriminator of stage 2.

    Args:
        ndf: channels of the first layer; the others have up to eight times as many.
        n_layers: number of strided layers; each halves height and width, the first two halve time as well.
        dropout: fraction of values set to 0 after each norm.
        from_pretrained: weights to start from, a file or the checkpoint folder of a stage 2 run; null starts from
            random ones.
    """

    ndf: int = 64
    n_layers: int = 5
    dropout: float = 0.3
    from_pretrained: str | None = None

    def __post_init__(self):
        for name in ("ndf", "n_layers"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(0 <= self.dropout < 1, self, "dropout", "at least 0 and below 1")


class BatchNorm(nn.Cell):
    """Batch norm over (B, T, H, W) of all workers, in fp32: `construct` uses the running statistics, `batch` those of
    its input."""

    def __init__(self, channels: int, world_size: int = 1, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.world_size, self.eps, self.momentum = world_size, eps, momentum
        self.over_workers = WorkerMean(world_size)
        self.weight = Parameter(initializer(Normal(0.02, 1.0), (channels,)), name="weight")
        self.bias = Parameter(initializer("zeros", (channels,)), name="bias")
        self.running_mean = Parameter(initializer("zeros", (channels,)), name="running_mean", requires_grad=False)
        self.running_var = Parameter(initializer("ones", (channels,)), name="running_var", requires_grad=False)

    def construct(self, x):
        return self._scaled(x.astype(ms.float32) - _column(self.running_mean), _column(self.running_var))

    def batch(self, x):
        """(B, C, T, H, W) -> the same, normalised; mean (C,); unbiased variance (C,)"""
        b, c, t, h, w = x.shape
        x = x.astype(ms.float32)
        mean = self.over_workers(mint.mean(x, (0, 2, 3, 4), True))  # (1, C, 1, 1, 1)
        centred = x - mean
        variance = self.over_workers(mint.mean(centred.square(), (0, 2, 3, 4), True))
        count = b * t * h * w * self.world_size
        unbiased = ops.stop_gradient(variance) * (count / max(count - 1, 1))
        return self._scaled(centred, variance), ops.stop_gradient(mean).reshape(c), unbiased.reshape(c)

    def track(self, mean, variance):
        """Update the running statistics with those of a batch."""
        kept = 1.0 - self.momentum
        ops.assign(self.running_mean, kept * self.running_mean + self.momentum * mean)
        return ops.assign(self.running_var, kept * self.running_var + self.momentum * variance)

    def _scaled(self, centred, variance):
        return centred * (_column(self.weight) / root(variance + self.eps)) + _column(self.bias)


class NLayerDiscriminator3D(nn.Cell):
    """Real/fake logits per patch: (B, 3, T, H, W) -> (B, 1, T', H', W') in fp32; an image is T = 1.

    Args:
        dtype: fp32 | fp16 | bf16, the precision of the convolutions.
        world_size: number of workers whose batches are normalised as one.

    Raises:
        CheckpointError: `config.from_pretrained` cannot be read or does not fit.
    """

    def __init__(self, config: DiscriminatorConfig, dtype: str = "fp32", world_size: int = 1):
        super().__init__()
        self.dropout = config.dropout
        strides = [(2, 2, 2)] * min(config.n_layers, 2) + [(1, 2, 2)] * (config.n_layers - 2) + [(1, 1, 1)]
        widths = [config.ndf * min(2**layer, 8) for layer in range(config.n_layers + 1)]
        activation = LeakyReLU(0.2)
        layers = [Conv3d(3, widths[0], stride=strides[0]), activation]
        for before, width, stride in zip(widths, widths[1:], strides[1:]):
            norm = BatchNorm(width, world_size)
            layers += [Conv3d(before, width, stride=stride, bias=False), norm, activation, nn.Identity()]
        self.main = nn.CellList([*layers, Conv3d(widths[-1], 1)])  # nn.Identity: the original's dropout
        self.normed = tuple(range(2, len(layers), 4))  # convolutions followed by a norm, an activation and dropout
        self._masked = list(zip(widths, strides))
        set_form(self, standard_layout=True)
        set_precision(self, dtype)
        if config.from_pretrained is not None:
            self.load_weights(config.from_pretrained)

    def construct(self, x: Tensor) -> Tensor:
        """Evaluation: no dropout, running statistics."""
        x = self.main[1](self.main[0](x))
        for at in self.normed:
            x = self.main[at + 2](self.main[at + 1](self.main[at](x)))
        return self.main[-1](x).astype(ms.float32)

    def forward(self, x: Tensor, masks: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The forward pass of a training step, which can be compiled.

        Args:
            masks: from `draw_masks`; without any there is no dropout.

        Returns:
            Logits, and each norm's mean and unbiased variance in this batch, for `track`.
        """
        statistics = ()
        x = self.main[1](self.main[0](x))
        for index, at in enumerate(self.normed):
            x, mean, variance = self.main[at + 1].batch(self.main[at](x))
            statistics += (mean, variance)
            x = self.main[at + 2](x)
            if len(masks) > 0:
                x = x * (masks[index].astype(ms.float32) / (1.0 - self.dropout))
        return self.main[-1](x).astype(ms.float32), statistics

    def track(self, *statistics: Tensor) -> Tensor:
        """Update every norm's running statistics with those that `forward` returned."""
        moved = statistics[0]
        for index, at in enumerate(self.normed):
            moved = self.main[at + 1].track(statistics[2 * index], statistics[2 * index + 1])
        return moved

    def mask_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of the dropout masks for videos of `shape`, (B, 3, T, H, W)."""
        if not self.dropout:
            return []
        batch, _, *size = shape
        shapes = []
        for width, strides in self._masked:
            size = [-(-length // stride) for length, stride in zip(size, strides)]
            shapes.append((batch, width, *size))
        return shapes[1:]

    def draw_masks(self, shape: Sequence[int], generators: Sequence[np.random.Generator]) -> tuple[np.ndarray, ...]:
        """Dropout masks for videos of `shape`, from one generator per video: uint8, 0 where a value is dropped."""
        threshold = round(self.dropout * 2**16)
        masks = []
        for _, *drawn in self.mask_shapes(shape):
            values = np.stack([generator.integers(0, 2**16, drawn, dtype=np.uint16) for generator in generators])
            masks.append((values >= threshold).view(np.uint8))
        return tuple(masks)

    def load_weights(self, path: str | Path) -> None:
        """Load weights from a file, ours or the original's, or from a checkpoint folder.

        Raises:
            CheckpointError: an unreadable file, or names and shapes that are not this discriminator's.
        """
        path = Path(path) / DISCRIMINATOR_FILE if Path(path).is_dir() else Path(path)
        state = read_state_dict(path)
        parameters = {p.name: p for p in self.get_parameters()}
        wanted = {name: tuple(p.shape) for name, p in parameters.items()}
        report = compare_names(wanted, {name: tuple(value.shape) for name, value in state.items()})
        if not report.complete:
            raise CheckpointError(
                f"{path} does not fit this discriminator: {report.summary()}; "
                "its size is set by discriminator.ndf and discriminator.n_layers",
                report,
            )
        check_finite(path, {name: state[name] for name in parameters})
        for name, parameter in parameters.items():
            parameter.set_data(Tensor(state[name], parameter.dtype))


def _column(values):
    """(C,) -> (1, C, 1, 1, 1)"""
    return values.reshape(1, -1, 1, 1, 1)
