"""The residual block, with norm, activation and convolution computed together, piece by piece."""

from mindspore import ops

from mg.models.layers import resnet
from mg.models.layers.forms.cpu.conv import FactorizedConv, SpatialConv
from mg.models.layers.forms.pieces import InPieces, along_time


class ResnetBlock(InPieces, resnet.ResnetBlock):
    def in_pieces(self, x):
        h = self.activated(self.norm1, self.conv1, x)
        h = self.activated(self.norm2, self.conv2, h)
        return (self.nin_shortcut(x) if self.widens else x) + h

    def activated(self, norm, convolution, x):
        """The convolution of silu(norm(x)), which only exists in pieces if the convolution is per frame."""
        normalised = norm.scaling(x)
        if isinstance(convolution, SpatialConv):
            spatial, temporal = convolution, None
        elif isinstance(convolution, FactorizedConv):
            spatial, temporal = convolution.conv_spat, convolution.conv_temp
        else:
            return convolution(along_time(lambda piece: ops.silu(normalised(piece)), x))
        y = along_time(lambda piece: spatial.construct(ops.silu(normalised(piece))), x, spatial.growth)
        return y if temporal is None else temporal(y)
