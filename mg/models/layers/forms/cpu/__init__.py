"""The layers for CPUs: frames first, (B, T, C, H, W), so that every frame is a picture and all convolutions are Conv2D.

Until the process ends, MindSpore 2.10 keeps about two tensors for every transpose in a compiled graph, and four for
every operator that broadcasts implicitly. So nothing here transposes or broadcasts large tensors: taps in time are
convolutions whose results are shifted and added, channel gains and offsets are a batch norm's or a bias's, and pixels
are interleaved by stacking.

A reshape copies too, and a graph runs first what depends on parameters alone. So a weight is rearranged when its input
is there, and the copy lives no longer than the convolution.
"""

from mindspore import nn

from mg.models import layers
from mg.models.layers.forms.cpu import attention, conv, doubling, linear, norm, resnet, shortcuts

LAYERS: dict[type[nn.Cell], type[nn.Cell]] = {
    layers.layout.Enter: shortcuts.Enter,
    layers.layout.Leave: shortcuts.Leave,
    layers.conv.SpatialConv: conv.SpatialConv,
    layers.conv.TemporalConv: conv.TemporalConv,
    layers.conv.FactorizedConv: conv.FactorizedConv,
    layers.conv.Conv3d: conv.Conv3d,
    layers.conv.CausalConv3d: conv.CausalConv3d,
    layers.conv.GroupedPointwiseConv: conv.GroupedPointwiseConv,
    layers.norm.GroupNorm: norm.GroupNorm,
    layers.resnet.ResnetBlock: resnet.ResnetBlock,
    layers.norm.RMSNorm: norm.RMSNorm,
    layers.linear.Linear: linear.Linear,
    layers.attention.SpatialAttention: attention.SpatialAttention,
    layers.attention.TemporalAttention: attention.TemporalAttention,
    layers.attention.CausalAttention: attention.CausalAttention,
    layers.attention.LinearAttention: attention.LinearAttention,
    layers.resample.DoublingSpatialConv: doubling.DoublingSpatialConv,
    layers.resample.DoublingTemporalConv: doubling.DoublingTemporalConv,
    layers.resample.DoublingConv3d: doubling.DoublingConv3d,
    layers.resample.DoublingCausalConv3d: doubling.DoublingCausalConv3d,
    layers.resample.ChannelsToFrames: doubling.ChannelsToFrames,
    layers.shortcuts.AverageChannels: shortcuts.AverageChannels,
    layers.shortcuts.RepeatChannels: shortcuts.RepeatChannels,
    layers.shortcuts.PixelsToChannels: shortcuts.PixelsToChannels,
    layers.shortcuts.ChannelsToPixels: shortcuts.ChannelsToPixels,
    layers.shortcuts.Gate: shortcuts.Gate,
}
