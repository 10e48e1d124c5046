"""The layers as a CPU does them best: frames first, (B, T, C, H, W), so that every frame is a picture and all
convolutions are Conv2D.

MindSpore 2.10 keeps, until the process ends, about two tensors for every transpose of a compiled graph, and four for
every operator that broadcasts by itself. Nothing here transposes or broadcasts what is large: taps in time are
convolutions whose results are shifted and added, gains and offsets of channels are a batch norm's and a bias's, and
pixels are interleaved by stacking.
"""

import mindspore as ms
from mindspore import nn, ops

from mg.models.layers import attention, conv, layout, norm, resample, resnet, shortcuts
from mg.models.layers.forms.edges import repeat_edges
from mg.models.layers.forms.fewer import fold, product_of_pointwise, quarters, tap_of_a_frame
from mg.models.layers.forms.pieces import InPieces, along_time, each

_LARGE = 2**16  # values


class Enter(layout.Enter):
    def construct(self, x):
        return layout.swap_frames(x)


class Leave(layout.Leave):
    def construct(self, x):
        return layout.swap_frames(x)


# Frames and time.


def pictures(x):
    """(B, T, C, H, W) -> (B*T, C, H, W)"""
    b, t, c, h, w = x.shape
    return x.reshape(b * t, c, h, w)


def clips(x, frames: int):
    """(B*T, C, H, W) -> (B, T, C, H, W)"""
    n, c, h, w = x.shape
    return x.reshape(n // frames, frames, c, h, w)


def shifted(x, offset: int, repeated: bool):
    """As many frames as x has, from `offset` on; outside of x its edges, or zeros."""
    b, t, c, h, w = x.shape
    if offset == 0:
        return x
    missing = min(abs(offset), t)
    inner = ops.narrow(x, 1, max(offset, 0), t - missing) if missing < t else None
    if repeated:
        outer = (ops.narrow(x, 1, 0 if offset < 0 else t - 1, 1),) * missing
    else:
        outer = (ops.zeros((b, missing, c, h, w), x.dtype),)
    if inner is None:
        return ops.cat(outer, 1) if len(outer) > 1 else outer[0]
    return ops.cat(outer + (inner,) if offset < 0 else (inner,) + outer, 1)


def sum_of_taps(taps, before: int, repeated: bool):
    """The sum over i of what tap i gives `before` - i frames earlier; `taps`, each (B, T, C, H, W)."""
    y = shifted(taps[0], -before, repeated)
    for i in range(1, len(taps)):
        y = y + shifted(taps[i], i - before, repeated)
    return y


def convolve_within(conv2d, x, weights):
    """A convolution in time, one of `weights` a tap, of the frames that have all under their kernel: tap by tap.

    (B, t + k - 1, Cin, H, W) -> (B*t, Cout, H', W'), t
    """
    t = x.shape[1] - len(weights) + 1
    total = conv2d(pictures(ops.narrow(x, 1, 0, t)), weights[0])
    for i, weight in enumerate(weights[1:], start=1):
        total = total + conv2d(pictures(ops.narrow(x, 1, i, t)), weight)
    return total, t


def under_kernel(x, frames: int, size: int, stride: int):
    """The frames under a kernel of `size` frames as channels of one. (B, T, C, H, W) -> (B*frames, C*size, H, W)"""
    b, t, c, h, w = x.shape
    missing = size - 1 + frames * stride - t
    if missing > 0:  # for the reshape below; no kernel sees them
        x = ops.cat((x, ops.zeros((b, missing, c, h, w), x.dtype)), 1)
    seen = ()
    for i in range(size):
        frames_seen = ops.narrow(x, 1, i, frames * stride)
        if stride > 1:  # not a slice with a step: on CPUs MindSpore 2.10 has no gradient for one in a batch
            frames_seen = ops.narrow(frames_seen.reshape(b, frames, stride, c, h, w), 2, 0, 1)
        seen += (frames_seen.reshape(b, frames, c, h, w),)
    return ops.stack(seen, axis=3).reshape(b * frames, c * size, h, w)


def join_taps(weight):
    """A kernel for what `under_kernel` gives. (Cout, Cin, k, kh, kw) -> (Cout, Cin*k, kh, kw)"""
    c_out, c_in, size, height, width = weight.shape
    return weight.reshape(c_out, c_in * size, height, width)


def add_bias(x, bias):
    """(N, C, H, W) + (C,) or None"""
    return x if bias is None else ops.bias_add(x, bias.astype(x.dtype))


# Convolutions.


class Conv(InPieces):
    """What the convolutions share."""

    def finish(self, y, frames):
        """The bias, and the precision. (B*frames, C, H, W) -> (B, frames, C, H, W)"""
        bias = None if self.bias is None else self.cast(self.bias)
        return clips(self.cast(add_bias(y, bias)), frames)


class ConvInTime(Conv):
    """Of those that see several frames: `within` makes what `construct` does of the frames that have all of theirs
    under their kernel, `before` each in front; outside of the clip its edges are, if `repeated`, or zeros."""

    def in_pieces(self, x):
        behind = self.kernel_size - 1 - self.before
        return along_time(self.within, self.cast(x), self.growth, self.before, behind, self.repeated)


class SpatialConv(Conv, conv.SpatialConv):
    def prepare(self):
        c_out, c_in, size, _ = self.weight.shape
        self.conv2d = ops.Conv2D(c_out, size, pad_mode="pad", pad=tuple(self.padding), stride=self.stride)
        self.growth = max(1.0, c_out / c_in / self.stride**2)

    def construct(self, x):
        y = self.conv2d(pictures(self.cast(x)), self.cast(self.weight))
        return self.finish(y, x.shape[1])


class TemporalConv(ConvInTime, conv.TemporalConv):
    def prepare(self):
        self.conv2d = ops.Conv2D(self.weight.shape[0], 1)
        self.before, self.repeated = self.kernel_size // 2, self.margin > 0
        self.growth = 1.0 if self.stride == 1 else 0.0

    def construct(self, x):
        x, c, t = self.cast(x), x.shape[2], x.shape[1]
        if t == 1:
            y = self.conv2d(pictures(x), self.cast(tap_of_a_frame(self.kernel(), self.repeated, self.before)))
        elif self.stride > 1:
            t = -(-t // self.stride)
            y = self.conv2d(self.strided(x, t), self.cast(self.weight.reshape(c, -1, 1, 1)))
        else:
            y = pictures(sum_of_taps(self.taps(x), self.before, self.repeated))
        return self.finish(y, t)

    def within(self, x):
        """Of the frames that have all under their kernel. (B, t + k - 1, C, H, W) -> (B, t, C, H, W)"""
        return self.finish(*convolve_within(self.conv2d, x, self.weights()))

    def taps(self, x):
        """What each tap makes of x"""
        made = ()
        for weight in self.weights():
            made += (clips(self.conv2d(pictures(x), weight), x.shape[1]),)
        return made

    def weights(self):
        """Of each tap, (C, C, 1, 1)"""
        found = ()
        for weight in ops.unstack(self.cast(self.weight), axis=3):
            found += (weight.expand_dims(3),)
        return found

    def strided(self, x, frames):
        b, _, c, h, w = x.shape
        if self.margin:
            x = repeat_edges(x, 1, self.before, self.before)
        else:
            x = ops.cat((ops.zeros((b, self.before, c, h, w), x.dtype), x), 1)
        return under_kernel(x, frames, self.kernel_size, self.stride)


class FactorizedConv(conv.FactorizedConv):
    def prepare(self):
        self.conv2d = ops.Conv2D(self.conv_temp.weight.shape[0], 1)

    def construct(self, x):
        if not self.pointwise:
            return self.conv_temp(self.conv_spat(x))
        weight, bias = product_of_pointwise(self.conv_spat, self.conv_temp)
        y = self.conv2d(pictures(self.cast(x)), self.cast(weight))
        return clips(self.cast(ops.bias_add(y, self.cast(bias))), x.shape[1])


class Conv3d(ConvInTime, conv.Conv3d):
    """A dense kernel's taps in time are output channels of one Conv2D, and so are a depthwise one's."""

    repeated = False

    def prepare(self):
        margin, c_out = self.kernel_size // 2, self.weight.shape[0]
        self.before = self.behind = margin
        self._prepare(margin, c_out if self.depthwise else 1)

    def _prepare(self, margin, groups):
        c_out = self.weight.shape[0]
        common = {"kernel_size": self.kernel_size, "pad_mode": "pad", "pad": (margin,) * 4, "group": groups}
        self.conv2d = ops.Conv2D(c_out, stride=self.stride[1:], **common)
        self.conv_taps = ops.Conv2D(c_out * self.kernel_size, stride=self.stride[1:], **common)
        self.grouped = groups > 1
        values = 1.0 if self.grouped else max(1.0, c_out / self.weight.shape[1] / self.stride[1] ** 2)
        self.growth = values if self.stride[0] == 1 else 0.0

    def construct(self, x):
        return self.convolve(self.pad_pictures(self.cast(x)))

    def pad_pictures(self, x):
        return x

    def convolve(self, x):
        weight, t = self.weight, x.shape[1]
        if t == 1:
            y = self.conv2d(pictures(x), self.cast(tap_of_a_frame(weight, self.repeated, self.before)))
        elif self.kernel_size == 1:
            y = self.conv2d(pictures(x), self.cast(weight[:, :, 0]))
        elif self.stride[0] == 1:
            y = pictures(sum_of_taps(self.taps(x), self.before, self.repeated))
        else:
            x = self.pad_frames(x)
            t = (x.shape[1] - self.kernel_size) // self.stride[0] + 1
            y = self.conv2d(under_kernel(x, t, self.kernel_size, self.stride[0]), self.cast(join_taps(weight)))
        return self.finish(y, t)

    def within(self, x):
        """Of the frames that have all under their kernel. (B, t + k - 1, Cin, H, W) -> (B, t, Cout, H', W')"""
        taps = ops.unstack(self.cast(self.weight), axis=2)
        return self.finish(*convolve_within(self.conv2d, self.pad_pictures(x), taps))

    def taps(self, x):
        """What each tap in time makes of x"""
        b, t, *_ = x.shape
        size, c = self.kernel_size, self.weight.shape[0]
        if self.grouped:
            y = self.conv_taps(pictures(x), self.cast(self.weight.reshape(c * size, 1, size, size)))
            return ops.unstack(y.reshape(b, t, c, size, y.shape[2], y.shape[3]), axis=3)
        y = self.conv_taps(pictures(x), ops.cat(ops.unstack(self.cast(self.weight), axis=2), 0))
        return ops.unstack(y.reshape(b, t, size, c, y.shape[2], y.shape[3]), axis=2)

    def pad_frames(self, x):
        b, _, c, h, w = x.shape
        before, behind = (ops.zeros((b, n, c, h, w), x.dtype) for n in (self.before, self.behind))
        return ops.cat((before, x, behind), 1)


class CausalConv3d(ConvInTime, conv.CausalConv3d):
    def prepare(self):
        self.repeated = self.replicated
        Conv3d._prepare(self, 0 if self.repeated else self.kernel_size // 2, 1)

    construct, convolve = Conv3d.construct, Conv3d.convolve
    within, taps = Conv3d.within, Conv3d.taps

    def pad_pictures(self, x):
        if not self.repeated or not self.margin:
            return x
        return repeat_edges(repeat_edges(x, 3, self.margin, self.margin), 4, self.margin, self.margin)

    def pad_frames(self, x):
        if self.repeated:
            return repeat_edges(x, 1, self.before, 0)
        b, _, c, h, w = x.shape
        return ops.cat((ops.zeros((b, self.before, c, h, w), x.dtype), x), 1) if self.before else x


class GroupedPointwiseConv(conv.GroupedPointwiseConv):
    def construct(self, x):
        b, t, c, h, w = x.shape
        weight = self.cast(self.weight).reshape(1, self.groups, c // self.groups, c // self.groups)
        y = ops.matmul(weight, self.cast(x).reshape(b * t, self.groups, c // self.groups, h * w))
        return self.cast(y).reshape(b, t, c, h, w)


# Norms.


class GroupNorm(InPieces, norm.GroupNorm):
    """In parts, which take half the operator's time. In training they gain nothing, and compile for twice as long."""

    def prepare(self):
        self.affine = ops.BatchNorm(is_training=False, epsilon=1e-12)

    def in_parts(self, x):
        return not self.training and x.size >= _LARGE

    def construct(self, x):
        y = x.astype(ms.float32)
        return self.cast(self.composed(y) if self.in_parts(x) else self.whole(y))

    def whole(self, x):
        b, t, c, h, w = x.shape
        y = self.exchange(x).reshape(b, c, t, h * w)
        y = ops.group_norm(y, self.groups, self.gamma, self.beta, self.eps)
        return self.exchange(y.reshape(b, c, t, h, w))

    def exchange(self, x):
        """`swap_frames`, of which nothing is kept"""
        b, first, second, h, w = x.shape
        if first == 1 or second == 1:
            return x.reshape(b, second, first, h, w)
        if first < second:  # whichever makes fewer pieces
            return ops.stack(ops.unstack(x, axis=1), axis=2)
        return ops.stack(ops.unstack(x, axis=2), axis=1)

    def composed(self, x):
        mean = self.of_groups(self.sums(x), x)
        variance = self.of_groups(self.sums(add_to_channels(x, -mean).square()), x)
        return self.scaled(x, mean, self.factors(variance))

    def in_pieces(self, x):
        return along_time(self.scaling(x), x)

    def scaling(self, x):
        """A function that normalises pieces of x by the statistics of the whole."""
        mean = self.of_groups(ops.cat([self.sums(piece) for piece in each(x)], 1), x)
        squares = [self.sums(add_to_channels(piece, -mean).square()) for piece in each(x)]
        factors = self.factors(self.of_groups(ops.cat(squares, 1), x))
        return lambda piece: self.cast(self.scaled(piece, mean, factors))

    def sums(self, x):
        """Over the pixels of each frame alone: a CPU's sum of millions of values in a row is off by 5e-4.

        (B, T, C, H, W) -> (B, T, C)
        """
        b, t, c, h, w = x.shape
        return x.astype(ms.float32).reshape(b * t * c, h * w).sum(axis=1).reshape(b, t, c)

    def of_groups(self, sums, x):
        """The mean of each group of channels, all frames and pixels of x, for each of its channels, (B, C)."""
        b, t, c, h, w = x.shape
        means = sums.sum(axis=1).reshape(b, self.groups, c // self.groups).sum(axis=2, keepdims=True)
        means = means * (self.groups / (t * c * h * w))
        return ops.broadcast_to(means, (b, self.groups, c // self.groups)).reshape(b, c)

    def factors(self, variance):
        return ops.rsqrt(variance + self.eps) * self.gamma.reshape(1, -1)

    def scaled(self, x, mean, factors):
        """(x - mean) * factors + beta; x (B, T, C, H, W), mean and factors (B, C)"""
        b, t, c, h, w = x.shape
        mean, factors = over_frames(mean, t), over_frames(factors, t)
        beta = over_frames(ops.broadcast_to(self.beta.reshape(1, c), (b, c)), t)
        x = x.astype(ms.float32).reshape(1, b * t * c, h, w)
        return affine(self.affine, x, factors, beta, mean).reshape(b, t, c, h, w)


def over_frames(values, frames: int):
    """(B, C) -> (B * frames * C,)"""
    b, c = values.shape
    return ops.broadcast_to(values.reshape(b, 1, c), (b, frames, c)).reshape(-1)


def add_to_channels(x, offsets):
    """x (B, T, C, H, W) + offsets (B, C), in fp32"""
    b, t, c, h, w = x.shape
    y = x.astype(ms.float32).reshape(1, b * t * c, h * w)
    return ops.bias_add(y, over_frames(offsets, t)).reshape(x.shape)


def affine(batch_norm, x, factors, offsets, means=None):
    """(x (N, C, H, W) - means (C,)) * factors (C,) + offsets (C,), of which nothing is kept but x: a norm by constant
    statistics."""
    means = ops.zeros(factors.shape, ms.float32) if means is None else means
    return batch_norm(x, factors, offsets, means, ops.ones(factors.shape, ms.float32))[0]


class RMSNorm(InPieces, norm.RMSNorm):
    def prepare(self):
        self.affine = ops.BatchNorm(is_training=False, epsilon=1e-12)

    def construct(self, x):
        b, t, c, h, w = x.shape
        x = x.astype(ms.float32).reshape(b * t, c, h * w)
        squares = x.square()
        mean = ops.matmul(ops.ones((1, c), ms.float32), squares) * (1 / c)  # (B*T, 1, H*W); sums of rows are slow
        x = x * ops.broadcast_to(ops.rsqrt(mean + self.eps), x.shape)
        return self.cast(affine(self.affine, x.reshape(b * t, c, h, w), self.gamma, self.beta)).reshape(b, t, c, h, w)


class ResnetBlock(InPieces, resnet.ResnetBlock):
    def in_pieces(self, x):
        h = self.activated(self.norm1, self.conv1, x)
        h = self.activated(self.norm2, self.conv2, h)
        return (self.nin_shortcut(x) if self.widens else x) + h

    def activated(self, norm, convolution, x):
        """The convolution of silu(norm(x)), which exists in pieces alone where the convolution is of single frames."""
        normalised = norm.scaling(x)
        if isinstance(convolution, SpatialConv):
            spatial, temporal = convolution, None
        elif isinstance(convolution, FactorizedConv):
            spatial, temporal = convolution.conv_spat, convolution.conv_temp
        else:
            return convolution(along_time(lambda piece: ops.silu(normalised(piece)), x))
        y = along_time(lambda piece: spatial.construct(ops.silu(normalised(piece))), x, spatial.growth)
        return y if temporal is None else temporal(y)


# Attention.


class SpatialAttention(attention.SpatialAttention):
    def images(self, x):
        b, t, c, h, w = x.shape
        return x.reshape(b * t, c, h * w)

    def clips(self, y, shape):
        return y.reshape(shape)


class TemporalAttention(attention.TemporalAttention):
    def tokens(self, x):
        b, t, c, h, w = x.shape
        return x.reshape(b, t, c, h * w).transpose(0, 3, 1, 2).reshape(b * h * w, t, c)

    def clips(self, y, shape):
        b, t, c, h, w = shape
        return y.reshape(b, h * w, t, c).transpose(0, 2, 3, 1).reshape(shape)


class CausalAttention(attention.CausalAttention):
    def tokens(self, x):
        b, t, c, h, w = x.shape
        return x.reshape(b, t, c, h * w).transpose(0, 1, 3, 2).reshape(b, t * h * w, c)

    def clips(self, y, shape):
        b, t, c, h, w = shape
        return y.reshape(b, t, h * w, c).transpose(0, 1, 3, 2).reshape(shape)


class LinearAttention(attention.LinearAttention):
    """Frame by frame, with the sums over tokens added up over frames: tokens need not lie side by side."""

    def construct(self, first, second):
        b, t, c, h, w = first.shape
        x = ops.cat((first, second), 2).reshape(b * t, -1, 3 * self.head, h * w)
        q, k, v = ops.split(x, self.head, 2)  # (B*T, heads, head, H*W)
        q, k, v = self.cast(ops.relu(q)), self.cast(ops.relu(k)), self.cast(v)
        keys = self.over_frames(k.astype(ms.float32).sum(axis=3, keepdims=True), t)
        values = self.over_frames(self.across(v, k).astype(ms.float32), t)
        out = self.cast(ops.bmm(values, q)).astype(ms.float32)
        total = self.cast(self.sums(keys, q)).astype(ms.float32)  # (B*T, heads, 1, H*W)
        out = out * ops.broadcast_to(1.0 / (total + 1e-15), out.shape)
        return out.reshape(b, t, 2 * c // 3, h, w)

    def over_frames(self, x, frames):
        """(B*T, ...) -> the sums over T, for every frame again"""
        n, heads, rows, columns = x.shape
        total = x.reshape(n // frames, frames, heads, rows, columns).sum(axis=1, keepdims=True)
        total = ops.broadcast_to(self.cast(total), (n // frames, frames, heads, rows, columns))
        return total.reshape(x.shape)


# Doubling.


class Doubling(nn.Cell):
    """Nearest neighbour and a 3x3 kernel, on the small grid, without a bias.

    x (N, Cin, H, W), `quarters` of a weight (Cout, Cin, 3, 3) -> (N, Cout, 2H, 2W)

    Args:
        repeated: the edges are, in place of zeros.
    """

    def __init__(self, out_channels: int, repeated: bool = False):
        super().__init__()
        self.repeated = repeated
        # Of each block of 2x2 the pixel at the top left sees its own small pixel and those above and to the left.
        top, bottom, left, right = ((0, 0) if repeated else pads for pads in ((1, 0), (0, 1), (1, 0), (0, 1)))
        self.top_left = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=top + left)
        self.top_right = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=top + right)
        self.bottom_left = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=bottom + left)
        self.bottom_right = ops.Conv2D(out_channels, 2, pad_mode="pad", pad=bottom + right)

    def construct(self, x, top_left, top_right, bottom_left, bottom_right):
        n, _, h, w = x.shape
        above, below = (repeat_edges(x, 2, 1, 0), repeat_edges(x, 2, 0, 1)) if self.repeated else (x, x)
        top = self.side_by_side(
            self.top_left(self.beside(above, 1, 0), top_left), self.top_right(self.beside(above, 0, 1), top_right)
        )
        bottom = self.side_by_side(
            self.bottom_left(self.beside(below, 1, 0), bottom_left),
            self.bottom_right(self.beside(below, 0, 1), bottom_right),
        )
        return ops.stack((top, bottom), axis=3).reshape(n, -1, 2 * h, 2 * w)

    def beside(self, x, left, right):
        return repeat_edges(x, 3, left, right) if self.repeated else x

    def side_by_side(self, left, right):
        """The pixels of two pictures in turn. (N, C, H, W) twice -> (N, C, H, 2W)"""
        n, c, h, w = left.shape
        return ops.stack((left, right), axis=4).reshape(n, c, h, 2 * w)


class DoublingSpatialConv(Conv, resample.DoublingSpatialConv):
    growth = 4.0

    def prepare(self):
        self.double = Doubling(self.weight.shape[0])

    def construct(self, x):
        return self.finish(self.doubled(pictures(self.cast(x)), self.weight), x.shape[1])

    def doubled(self, x, weight):
        """`Doubling` by a kernel (Cout, Cin, 3, 3) in fp32"""
        top_left, top_right, bottom_left, bottom_right = quarters(weight)
        kernels = self.cast(top_left), self.cast(top_right), self.cast(bottom_left), self.cast(bottom_right)
        return self.double(x, *kernels)


class DoublingTemporalConv(Conv, resample.DoublingTemporalConv):
    """A single frame comes back as one where edges are repeated: then both of the pair are the same."""

    growth = 4.0

    def prepare(self):
        self.conv2d = ops.Conv2D(self.weight.shape[0], 1)

    def construct(self, x):
        t = x.shape[1]
        x, repeated = pictures(self.cast(x)), self.margin > 0
        if t == 1 and repeated:
            return self.finish(self.conv2d(x, self.cast(tap_of_a_frame(self.kernel(), True, 0))), 1)
        w0, w1, w2 = ops.unstack(self.weight, axis=3)  # (C, C, 1)
        first = shifted(self.tap(x, w0, t), -1, repeated) + self.tap(x, w1 + w2, t)
        second = self.tap(x, w0 + w1, t) + shifted(self.tap(x, w2, t), 1, repeated)
        return self.in_turn(first, second)

    def in_pieces(self, x):
        return along_time(self.within, self.cast(x), self.growth, 1, 1, self.margin > 0)

    def within(self, x):
        """The frames between the first and the last, with these beside them. (B, t + 2, C, H, W) -> (B, 2t, C, H, W)"""
        t = x.shape[1] - 2
        before, own, behind = (pictures(ops.narrow(x, 1, start, t)) for start in range(3))
        w0, w1, w2 = ops.unstack(self.weight, axis=3)  # (C, C, 1)
        first = self.tap(before, w0, t) + self.tap(own, w1 + w2, t)
        second = self.tap(own, w0 + w1, t) + self.tap(behind, w2, t)
        return self.in_turn(first, second)

    def in_turn(self, first, second):
        """(B, T, C, H, W) twice -> (B, 2T, C, H, W)"""
        b, t, c, h, w = first.shape
        return self.finish(ops.stack((first, second), axis=2).reshape(b * 2 * t, c, h, w), 2 * t)

    def tap(self, x, weight, frames):
        return clips(self.conv2d(x, self.cast(weight.expand_dims(3))), frames)


class DoublingConv3d(Conv, resample.DoublingConv3d):
    doubled = DoublingSpatialConv.doubled

    def prepare(self):
        self.double = Doubling(self.weight.shape[0])
        self.growth = max(1.0, 8 * self.weight.shape[0] / self.weight.shape[1])

    def construct(self, x, frames):  # type: ignore[override]
        b, t, c, h, w = x.shape
        x = self.cast(x)
        if t == 1 and frames == 1:
            y = self.doubled(pictures(x), self.weight[:, :, 1])
            return self.finish(y, 1)
        zeros = ops.zeros((b, 1, c, h, w), x.dtype)
        x = ops.cat((zeros, x, zeros), 1)  # (B, T + 2, Cin, H, W)
        return self.pairs_within(x) if frames == 2 else self.within(x)

    def in_pieces(self, x, frames):
        within = self.pairs_within if frames == 2 else self.within
        return along_time(within, self.cast(x), self.growth, 1, 1, repeated=False)

    def within(self, x):
        """Of the frames that have one on each side. (B, t + 2, Cin, H, W) -> (B, t, Cout, 2H, 2W)"""
        t = x.shape[1] - 2
        y = self.doubled(under_kernel(x, t, 3, 1), join_taps(self.weight))
        return self.finish(y, t)

    def pairs_within(self, x):
        """The same, and each of them becomes two. (B, t + 2, Cin, H, W) -> (B, 2t, Cout, 2H, 2W)"""
        b, t, _, h, w = x.shape
        t = t - 2
        first, second = fold(self.weight, 2)
        y = ops.stack((self.seen(x, 0, t, first), self.seen(x, 1, t, second)), axis=1)  # (B*t, 2, Cout, 2H, 2W)
        y = y.reshape(b * 2 * t, -1, 2 * h, 2 * w)
        return self.finish(y, 2 * t)

    def seen(self, x, start, frames, weight):
        """The frames of a pair's first, or second: each of them under a kernel of two, from `start` on."""
        return self.doubled(under_kernel(ops.narrow(x, 1, start, frames + 1), frames, 2, 1), join_taps(weight))


class DoublingCausalConv3d(Conv, resample.DoublingCausalConv3d):
    doubled = DoublingSpatialConv.doubled

    def prepare(self):
        self.double = Doubling(self.weight.shape[0], repeated=True)
        self.conv2d = ops.Conv2D(self.weight.shape[0], 3)
        time, space = self.factors
        self.growth, self.earlier = float(time * space**2), 1 if time == 2 else 2

    def construct(self, x):
        x = self.cast(x)
        if x.shape[1] == 1:
            y = self.in_space(pictures(x), self.weight.sum(axis=2))
            return self.finish(y, 1)
        return self.without_first(self.within(repeat_edges(x, 1, self.earlier, 0)))

    def in_pieces(self, x):
        return self.without_first(along_time(self.within, self.cast(x), self.growth, self.earlier))

    def without_first(self, y):
        """The first frame has no pair: of each the second of the earlier frame comes first."""
        return ops.narrow(y, 1, 1, y.shape[1] - 1) if self.factors[0] == 2 else y

    def within(self, x):
        """Of the frames that have all under their kernel. (B, t + 1, Cin, H, W) -> (B, 2t, C, H', W'), or where time
        is not doubled (B, t + 2, Cin, H, W) -> (B, t, C, H', W')"""
        b, t, c, h, w = x.shape
        time, space = self.factors
        if time == 2:
            t = t - 1
            x = under_kernel(x, t, 2, 1)  # (B*t, 2C, H, W): each behind the one before it
            first, second = fold(self.weight, 2)
            pairs = self.in_space(x, join_taps(second)), self.in_space(x, join_taps(first))
            y = ops.stack(pairs, axis=1).reshape(b * 2 * t, c, space * h, space * w)
        else:
            t = t - 2
            y = self.in_space(under_kernel(x, t, 3, 1), join_taps(self.weight))
        return self.finish(y, time * t)

    def in_space(self, x, weight):
        """(N, Cin, H, W) -> (N, C, H or 2H, W or 2W)"""
        if self.factors[1] == 2:
            return self.doubled(x, weight)
        return self.conv2d(repeat_edges(repeat_edges(x, 2, 1, 1), 3, 1, 1), self.cast(weight))


class ChannelsToFrames(resample.ChannelsToFrames):
    def construct(self, x):
        b, t, c, h, w = x.shape
        pairs = ops.unstack(x.reshape(b, t, c // 2, 2, h, w), axis=3)
        return ops.stack(pairs, axis=2).reshape(b, 2 * t, c // 2, h, w)


# Shortcuts.


class AverageChannels(shortcuts.AverageChannels):
    def construct(self, x):
        b, t, c, h, w = x.shape
        size = c // self.channels
        total = x.reshape(b * t, self.channels, size, h * w).sum(axis=2)
        return (total * (1 / size)).reshape(b, t, self.channels, h, w)


class RepeatChannels(shortcuts.RepeatChannels):
    def construct(self, x):
        b, t, c, h, w = x.shape
        x = ops.broadcast_to(x.reshape(b * t, c, 1, h, w), (b * t, c, self.channels // c, h, w))
        return x.reshape(b, t, self.channels, h, w)


class PixelsToChannels(shortcuts.PixelsToChannels):
    def construct(self, x):
        b, t, c, h, w = x.shape
        frames = 2 if self.temporal and t > 1 else 1
        pixels = ()
        for frame in ops.unstack(x.reshape(b, t // frames, frames, c, h, w), axis=2):
            even, odd = ops.unstack(frame.reshape(b, t // frames, c, h, w // 2, 2), axis=5)
            even = ops.unstack(even.reshape(b, t // frames, c, h // 2, 2, w // 2), axis=4)
            odd = ops.unstack(odd.reshape(b, t // frames, c, h // 2, 2, w // 2), axis=4)
            pixels += (even[0], odd[0], even[1], odd[1])
        x = ops.stack(pixels, axis=3)  # (B, T / frames, C, frames * 2 * 2, H / 2, W / 2)
        return self.average(x.reshape(b, t // frames, c * frames * 4, h // 2, w // 2))


class ChannelsToPixels(shortcuts.ChannelsToPixels):
    def construct(self, x, frames):
        b, t, c, h, w = x.shape
        copies = self.channels * frames * 4 // c
        x = ops.broadcast_to(x.reshape(b * t, c, 1, h, w), (b * t, c, copies, h, w))
        places = ops.unstack(x.reshape(b, t, self.channels, frames * 4, h, w), axis=3)
        filled = ()
        for i in range(frames):
            top = ops.stack((places[4 * i], places[4 * i + 1]), axis=5).reshape(b, t, self.channels, h, 2 * w)
            bottom = ops.stack((places[4 * i + 2], places[4 * i + 3]), axis=5).reshape(b, t, self.channels, h, 2 * w)
            filled += (ops.stack((top, bottom), axis=4).reshape(b, t, self.channels, 2 * h, 2 * w),)
        x = ops.stack(filled, axis=2) if frames > 1 else filled[0]
        return x.reshape(b, t * frames, self.channels, 2 * h, 2 * w)


class Gate(InPieces, shortcuts.Gate):
    def construct(self, x):
        y, gate = ops.split(x, x.shape[2] // 2, 2)
        return y * ops.silu(gate)


LAYERS: dict[type[nn.Cell], type[nn.Cell]] = {
    layout.Enter: Enter,
    layout.Leave: Leave,
    conv.SpatialConv: SpatialConv,
    conv.TemporalConv: TemporalConv,
    conv.FactorizedConv: FactorizedConv,
    conv.Conv3d: Conv3d,
    conv.CausalConv3d: CausalConv3d,
    conv.GroupedPointwiseConv: GroupedPointwiseConv,
    norm.GroupNorm: GroupNorm,
    resnet.ResnetBlock: ResnetBlock,
    norm.RMSNorm: RMSNorm,
    attention.SpatialAttention: SpatialAttention,
    attention.TemporalAttention: TemporalAttention,
    attention.CausalAttention: CausalAttention,
    attention.LinearAttention: LinearAttention,
    resample.DoublingSpatialConv: DoublingSpatialConv,
    resample.DoublingTemporalConv: DoublingTemporalConv,
    resample.DoublingConv3d: DoublingConv3d,
    resample.DoublingCausalConv3d: DoublingCausalConv3d,
    resample.ChannelsToFrames: ChannelsToFrames,
    shortcuts.AverageChannels: AverageChannels,
    shortcuts.RepeatChannels: RepeatChannels,
    shortcuts.PixelsToChannels: PixelsToChannels,
    shortcuts.ChannelsToPixels: ChannelsToPixels,
    shortcuts.Gate: Gate,
}
