"""The layers for other engines: standard operators, which an engine can optimise in its own way.

Convolutions are Conv2D where possible, over frames or, in time, over (T, H*W), and Conv3D otherwise. Doubling stays as
the papers write it: mg/deploy/upsampling.py moves it to the small grid.
"""

import mindspore as ms
from mindspore import nn, ops

from mg.models.layers import attention, conv, norm, resample, shortcuts
from mg.models.layers.forms.edges import repeat_edges
from mg.models.layers.forms.fewer import product_of_pointwise, tap_of_a_frame
from mg.models.layers.layout import swap_frames


class SpatialConv(conv.SpatialConv):
    def prepare(self):
        c_out, _, size, _ = self.weight.shape
        self.conv2d = ops.Conv2D(c_out, size, pad_mode="pad", pad=tuple(self.padding), stride=self.stride)

    def construct(self, x):
        return self.on_frames(self.cast(x))

    def on_frames(self, x):
        b, c, t, h, w = x.shape
        y = self.conv2d(swap_frames(x).reshape(b * t, c, h, w), self.cast(self.weight))
        y = self.cast(ops.bias_add(y, self.cast(self.bias)))  # (B*T, Cout, H', W')
        _, c, h, w = y.shape
        return swap_frames(y.reshape(b, t, c, h, w))


class TemporalConv(conv.TemporalConv):
    def prepare(self):
        zeros = 0 if self.margin else self.kernel_size // 2
        self.conv2d = ops.Conv2D(
            self.weight.shape[0],
            (self.kernel_size, 1),
            pad_mode="pad",
            pad=(zeros, zeros, 0, 0),
            stride=(self.stride, 1),
        )
        self.conv_frame = ops.Conv2D(self.weight.shape[0], 1)

    def construct(self, x):
        return self.on_rows(self.cast(x))

    def on_rows(self, x):
        b, c, t, h, w = x.shape
        x = x.reshape(b, c, t, h * w)
        if t == 1:
            weight = tap_of_a_frame(self.kernel(), self.margin > 0, self.kernel_size // 2)
            x = self.conv_frame(x, self.cast(weight))
        else:
            x = repeat_edges(x, 2, self.margin, self.margin) if self.margin else x
            x = self.conv2d(x, self.cast(self.weight.swapaxes(2, 3)))  # (B, C, T', H*W)
        return self.cast(ops.bias_add(x, self.cast(self.bias))).reshape(b, c, -1, h, w)


class FactorizedConv(conv.FactorizedConv):
    def prepare(self):
        self.conv2d = ops.Conv2D(self.conv_temp.weight.shape[0], 1)

    def construct(self, x):
        if not self.pointwise:
            return self.conv_temp(self.conv_spat(x))
        b, c, t, h, w = x.shape
        weight, bias = product_of_pointwise(self.conv_spat, self.conv_temp)
        y = self.conv2d(self.cast(x).reshape(b, c, t, h * w), self.cast(weight))  # (B, Cout, T, H*W)
        return self.cast(ops.bias_add(y, self.cast(bias))).reshape(b, -1, t, h, w)


class Conv3d(conv.Conv3d):
    def prepare(self):
        c_out, margin = self.weight.shape[0], self.kernel_size // 2
        common = {"kernel_size": self.kernel_size, "pad_mode": "pad", "group": c_out if self.depthwise else 1}
        self.conv3d = ops.Conv3D(c_out, pad=(margin,) * 6, stride=self.stride, **common)
        self.conv_frame = ops.Conv2D(c_out, pad=(margin,) * 4, stride=self.stride[1:], **common)
        self.conv_flat = ops.Conv2D(c_out, 1)
        self.before, self.repeated, self.flat = margin, False, self.kernel_size == 1

    def construct(self, x):
        return self.volume(self.cast(x))

    def volume(self, x):
        b, c, t, h, w = x.shape
        if self.flat:
            weight = self.cast(self.weight).reshape(-1, c, 1, 1)
            y = self.conv_flat(x.reshape(b, c, t, h * w), weight).reshape(b, -1, t, h, w)
        elif t == 1:
            y = self.conv_frame(self.pad_frame(x), self.cast(tap_of_a_frame(self.weight, self.repeated, self.before)))
            y = y.expand_dims(2)
        else:
            y = self.conv3d(self.pad_frames(x), self.cast(self.weight))
        return self.cast(y if self.bias is None else y + self.cast(self.bias).reshape(1, -1, 1, 1, 1))

    def pad_frame(self, x):
        return x[:, :, 0]

    def pad_frames(self, x):
        return x


class CausalConv3d(conv.CausalConv3d):
    def prepare(self):
        c_out, margin = self.weight.shape[0], 0 if self.replicated else self.kernel_size // 2
        common = {"kernel_size": self.kernel_size, "pad_mode": "pad"}
        self.conv3d = ops.Conv3D(c_out, pad=(0, 0) + (margin,) * 4, stride=self.stride, **common)
        self.conv_frame = ops.Conv2D(c_out, pad=(margin,) * 4, stride=self.stride[1:], **common)
        self.repeated, self.flat = self.replicated, False

    construct, volume = Conv3d.construct, Conv3d.volume

    def pad_frame(self, x):
        return self.pad_sides(x)[:, :, 0]

    def pad_frames(self, x):
        x = self.pad_sides(x)
        if not self.before:
            return x
        if self.replicated:
            return repeat_edges(x, 2, self.before, 0)
        b, c, _, h, w = x.shape  # not the operator's own padding, which devices need to be equal on both sides
        return ops.cat((ops.zeros((b, c, self.before, h, w), x.dtype), x), axis=2)

    def pad_sides(self, x):
        if not self.replicated or not self.margin:
            return x
        return repeat_edges(repeat_edges(x, 3, self.margin, self.margin), 4, self.margin, self.margin)


class RMSNorm(norm.RMSNorm):
    def construct(self, x):
        b, c, t, h, w = x.shape
        x = x.astype(ms.float32).reshape(b, c, t * h * w)
        x = x * ops.rsqrt(x.square().mean(axis=1, keep_dims=True) + self.eps) * self.gamma.reshape(1, c, 1)
        return self.cast(x.reshape(b, c, t, h, w) + self.beta.reshape(1, c, 1, 1, 1))


class CausalAttention(attention.CausalAttention):
    def construct(self, x):
        y = self.tokens(self.norm(x))
        q, k, v = self.q(y), self.k(y), self.v(y)
        pixels = x.shape[3] * x.shape[4]
        frames = ()
        for stop in range(pixels, q.shape[1] + 1, pixels):
            frames += (self.attention(q[:, stop - pixels : stop], k[:, :stop], v[:, :stop]),)
        y = self.proj_out(ops.cat(frames, axis=1) if len(frames) > 1 else frames[0])
        return x + self.clips(y, x.shape)


class LinearAttention(attention.LinearAttention):
    def construct(self, first, second):
        b, c, t, h, w = first.shape
        x = ops.cat((first, second), axis=1).reshape(b, -1, 3 * self.head, t * h * w)
        q, k, v = ops.split(x, self.head, axis=2)
        return self.attend(q, k, v).reshape(b, 2 * c // 3, t, h, w)

    def attend(self, q, k, v):
        q, k, v = self.cast(ops.relu(q)), self.cast(ops.relu(k)), self.cast(v)
        keys = self.cast(k.astype(ms.float32).sum(axis=3, keepdims=True))  # (B, heads, head, 1)
        values = self.cast(ops.matmul(v, k.transpose(0, 1, 3, 2)))  # (B, heads, head, head)
        out = self.cast(ops.matmul(values, q)).astype(ms.float32)
        total = self.cast(ops.matmul(keys.transpose(0, 1, 3, 2), q)).astype(ms.float32)  # (B, heads, 1, tokens)
        return out * (1.0 / (total + 1e-15))


class DoublingSpatialConv(resample.DoublingSpatialConv):
    prepare, on_frames = SpatialConv.prepare, SpatialConv.on_frames

    def construct(self, x):
        return self.on_frames(double_pixels(self.cast(x)))


class DoublingTemporalConv(resample.DoublingTemporalConv):
    """With repeated edges a single frame stays one frame, since both of its pair would be the same."""

    prepare, on_rows = TemporalConv.prepare, TemporalConv.on_rows

    def construct(self, x):
        return self.on_rows(self.cast(x) if x.shape[2] == 1 and self.margin else double_frames(self.cast(x)))


class DoublingConv3d(resample.DoublingConv3d):
    prepare, volume, pad_frame, pad_frames = Conv3d.prepare, Conv3d.volume, Conv3d.pad_frame, Conv3d.pad_frames

    def construct(self, x, frames):  # type: ignore[override]
        x = double_pixels(self.cast(x))
        return self.volume(double_frames(x) if frames == 2 else x)


class DoublingCausalConv3d(resample.DoublingCausalConv3d):
    prepare, volume = CausalConv3d.prepare, CausalConv3d.volume
    pad_frame, pad_frames, pad_sides = CausalConv3d.pad_frame, CausalConv3d.pad_frames, CausalConv3d.pad_sides

    def construct(self, x):
        time, space = self.factors
        x = double_pixels(self.cast(x)) if space == 2 else self.cast(x)
        return self.volume(double_frames(x)[:, :, 1:] if time == 2 else x)


class ChannelsToFrames(resample.ChannelsToFrames):
    def construct(self, x):
        b, c, t, h, w = x.shape
        x = x.reshape(b, c // 2, 2, t, h, w)
        return ops.stack((x[:, :, 0], x[:, :, 1]), axis=3).reshape(b, c // 2, 2 * t, h, w)


class AverageChannels(shortcuts.AverageChannels):
    def construct(self, x):
        b, c, t, h, w = x.shape
        return x.reshape(b, self.channels, c // self.channels, t, h, w).mean(axis=2)


class Gate(shortcuts.Gate):
    def construct(self, x):
        y, gate = ops.split(x, x.shape[1] // 2, axis=1)
        return y * ops.silu(gate)


def double_pixels(x):
    """Repeat every pixel along H and W."""
    b, c, t, h, w = x.shape
    x = ops.stack((x, x), axis=-1).reshape(b, c, t, h, 2 * w)
    return ops.stack((x, x), axis=4).reshape(b, c, t, 2 * h, 2 * w)


def double_frames(x):
    """Repeat every frame."""
    b, c, t, h, w = x.shape
    return ops.stack((x, x), axis=3).reshape(b, c, 2 * t, h, w)


LAYERS: dict[type[nn.Cell], type[nn.Cell]] = {
    conv.SpatialConv: SpatialConv,
    conv.TemporalConv: TemporalConv,
    conv.FactorizedConv: FactorizedConv,
    conv.Conv3d: Conv3d,
    conv.CausalConv3d: CausalConv3d,
    norm.RMSNorm: RMSNorm,
    attention.CausalAttention: CausalAttention,
    attention.LinearAttention: LinearAttention,
    resample.DoublingSpatialConv: DoublingSpatialConv,
    resample.DoublingTemporalConv: DoublingTemporalConv,
    resample.DoublingConv3d: DoublingConv3d,
    resample.DoublingCausalConv3d: DoublingCausalConv3d,
    resample.ChannelsToFrames: ChannelsToFrames,
    shortcuts.AverageChannels: AverageChannels,
    shortcuts.Gate: Gate,
}
