"""The convolutional trunks that LPIPS uses: torchvision's VGG16 and AlexNet, up to the last ReLU used.

Layers keep their index in torchvision's `features`, so parameters have torchvision's names (`features.0.weight`, ...).
mindcv's VGG16 has no biases, so torchvision's weights would not fit it.
"""

from dataclasses import dataclass

from mindspore import Tensor, mint, nn

from mg import runtime


@dataclass(frozen=True)
class Conv:
    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Pool:
    kernel: int = 2


RELU = "relu"


@dataclass(frozen=True)
class Backbone:
    """A trunk: `layers` in order; its features are the outputs of the ReLUs at the indices `taps`."""

    layers: tuple[Conv | Pool | str, ...]
    taps: tuple[int, ...]
    tap_channels: tuple[int, ...]
    min_size: int  # smallest height and width that leaves a pixel at the last tap


def _vgg_stage(channels: int, depth: int) -> tuple:
    return (Conv(channels), RELU) * depth


BACKBONES = {
    "vgg": Backbone(
        layers=_vgg_stage(64, 2)
        + (Pool(),)
        + _vgg_stage(128, 2)
        + (Pool(),)
        + _vgg_stage(256, 3)
        + (Pool(),)
        + _vgg_stage(512, 3)
        + (Pool(),)
        + _vgg_stage(512, 3),
        taps=(3, 8, 15, 22, 29),
        tap_channels=(64, 128, 256, 512, 512),
        min_size=16,
    ),
    "alex": Backbone(
        layers=(
            Conv(64, kernel=11, stride=4, padding=2),
            RELU,
            Pool(3),
            Conv(192, kernel=5, padding=2),
            RELU,
            Pool(3),
            Conv(384),
            RELU,
            Conv(256),
            RELU,
            Conv(256),
            RELU,
        ),
        taps=(1, 4, 7, 9, 11),
        tap_channels=(64, 192, 384, 256, 256),
        min_size=31,
    ),
}


class BackboneFeatures(nn.Cell):
    """Runs a trunk on (N, 3, H, W) and returns the features of its taps, a tuple of (N, C_k, H_k, W_k)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.taps = backbone.taps
        self.features = nn.CellList(_build_layers(backbone.layers))

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        taps = ()
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                taps += (x,)
        return taps


def _build_layers(layers: tuple) -> list[nn.Cell]:
    cells, channels = [], 3
    for layer in layers:
        if isinstance(layer, Conv):
            cells.append(_conv(channels, layer))
            channels = layer.channels
        elif isinstance(layer, Pool):
            cells.append(_pool(layer))
        else:
            cells.append(nn.ReLU())
    return cells


# mint's layers only run on Ascend; nn's run everywhere, but with operators that CANN compiles for every clip shape.


def _conv(channels: int, layer: Conv) -> nn.Cell:
    shape = (channels, layer.channels, layer.kernel, layer.stride)
    if runtime.device() == "ascend":
        return mint.nn.Conv2d(*shape, padding=layer.padding)
    # Loaded weights overwrite the zeros; random initial values would only cost time.
    zeros = {"weight_init": "zeros", "bias_init": "zeros"}
    return nn.Conv2d(*shape, pad_mode="pad", padding=layer.padding, has_bias=True, **zeros)


def _pool(layer: Pool) -> nn.Cell:
    if runtime.device() == "ascend":
        return mint.nn.MaxPool2d(layer.kernel, stride=2)
    return nn.MaxPool2d(layer.kernel, stride=2, pad_mode="valid")
