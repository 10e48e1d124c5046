"""The layers in aclnn operators, which Ascend ships compiled: others (aclop) are compiled online, again for every
shape.

All convolutions use aclnn's 3-D one. CANN supports no Conv2D wider than 4,096, which flattened pixels exceed, and
`ops.Conv3D` no groups. `FOLDED` works on the small grid where the papers first double it by nearest neighbour: this
saves products but adds operators; which is faster has not been measured yet.
"""

import itertools

import mindspore as ms
from mindspore import mint, nn, ops
from mindspore.ops.auto_generate.gen_ops_prim import conv3d_ext_op, layer_norm_ext_op

from mg.models.layers import attention, conv, norm, resample
from mg.models.layers.forms.fewer import fold
from mg.models.layers.layout import ends, narrow, split, zeros_behind


def conv3d(x, weight, bias, stride, padding, groups):
    """The operator behind `mint.nn.functional.conv3d`, which runs outside the scope of the cell that calls it: gradient
    checkpointing would not reach it, and its output would be kept."""
    return conv3d_ext_op(x, weight, bias, stride, padding, (1, 1, 1), groups)


class Convolution(conv.Convolution):
    def construct(self, x, weight, bias):
        return conv3d(self.pad(x), weight, bias, self.stride, self.margins, self.groups)

    def pad(self, x):
        if not self.uneven:
            return x
        sides = ()
        for i in (4, 2, 0):  # width first
            before, behind = self.padding[i], self.padding[i + 1]
            sides += (0, 0) if before == behind else (before, behind)
        return mint.nn.functional.pad(x, sides)


class TemporalConv(conv.TemporalConv):
    """Padded by one operator: for views of the edges, gradient checkpointing would keep the tensors they point into."""

    def pad(self, x):
        return mint.nn.functional.pad(x, (0, 0, 0, 0, self.margin, self.margin), mode="replicate") if self.margin else x


class DoublingTemporalConv(resample.DoublingTemporalConv):
    pad = TemporalConv.pad


class CausalConv3d(conv.CausalConv3d):
    def pad(self, x):
        return repeat_edges(x, self.margin, self.before) if self.replicated and self.before else x


def repeat_edges(x, margin, before):
    """Repeat the edges: `margin` rows and columns on every side, and `before` frames in front."""
    return mint.nn.functional.pad(x, (margin, margin, margin, margin, before, 0), mode="replicate")


class DoublingCausalConv3d(resample.DoublingCausalConv3d):
    pad = CausalConv3d.pad


class LayerNorm(norm.LayerNorm):
    def construct(self, x):
        return layer_norm_ext_op(x.astype(ms.float32), self.ones.shape, self.ones, self.zeros, self.eps)[0]


class MultiHeadAttention(attention.MultiHeadAttention):
    """Flash attention in fp16 and bf16, if requested and worthwhile: with more tokens than sequences.

    `ops.flash_attention_score` needs heads with a multiple of 16 channels, at most 2048 sequences, and a mask for every
    query; zeros after a head's channels change neither the scores nor the channels that are kept.
    """

    def construct(self, q, k, v, hidden=None):
        q, k, v = self.cast(q), self.cast(k), self.cast(v)
        sequences, length, heads, channels = q.shape
        if not self.flash or q.dtype == ms.float32 or sequences >= length or sequences > 2048:
            return self.attend(q, k, v, hidden)
        if hidden is not None:
            hidden = ops.broadcast_to(hidden, (sequences, 1, length, k.shape[1]))
        lacking = -channels % 16
        q, k, v = zeros_behind(q, 3, lacking), zeros_behind(k, 3, lacking), zeros_behind(v, 3, lacking)
        y = ops.flash_attention_score(
            q, k, v, heads, attn_mask=hidden, scalar_value=channels**-0.5, input_layout="BSND"
        )  # (B, L, heads, C + lacking)
        return narrow(y, 3, 0, channels).reshape(sequences, length, heads * channels)


LAYERS: dict[type[nn.Cell], type[nn.Cell]] = {
    norm.LayerNorm: LayerNorm,
    attention.MultiHeadAttention: MultiHeadAttention,
    conv.Convolution: Convolution,
    conv.TemporalConv: TemporalConv,
    resample.DoublingTemporalConv: DoublingTemporalConv,
    conv.CausalConv3d: CausalConv3d,
    resample.DoublingCausalConv3d: DoublingCausalConv3d,
}


# On the small grid.


def on_small_grid(cast, x, weight, bias, doubled):
    """Nearest neighbour along those of (T, H, W) that are `doubled`, then a kernel with three taps along these.

    Args:
        cast: casts kernels computed from the weight to the layer's precision.
        x: (B, Cin, T, H, W), padded by one sample at both ends of a doubled axis, and fully along the others.
        weight: (Cout, Cin, 3 or 1, 3 or 1, 3 or 1).
    """
    kernels = (weight,)
    for axis in range(3):
        if doubled[axis]:
            kernels = tuple(itertools.chain(*[fold(kernel, 2 + axis, split) for kernel in kernels]))
    parts = ()
    for kernel, places in zip(kernels, itertools.product(*[range(2) if each else (0,) for each in doubled])):
        seen = x
        for axis in range(3):
            if doubled[axis]:  # the first of a pair sees the sample before it, the second the one after it
                first, *between, last = ends(seen, 2 + axis)
                seen = mint.cat((*between, last) if places[axis] else (first, *between), dim=2 + axis)
        parts += (conv3d(seen, cast(kernel), bias, (1, 1, 1), (0, 0, 0), 1),)
    return in_turn(parts, doubled)


def in_turn(parts, doubled):
    """Interleave parts along the `doubled` axes of (T, H, W); the last axis varies fastest."""
    for axis in (2, 1, 0):
        if doubled[axis]:
            pairs = ()
            for first, second in zip(parts[::2], parts[1::2]):
                shape = first.shape
                both = mint.cat((first.expand_dims(3 + axis), second.expand_dims(3 + axis)), dim=3 + axis)
                pairs += (both.reshape(shape[: 2 + axis] + (2 * shape[2 + axis],) + shape[3 + axis :]),)
            parts = pairs
    return parts[0]


class FoldedSpatialConv(resample.DoublingSpatialConv):
    def construct(self, x):
        x = mint.nn.functional.pad(self.cast(x), (1, 1, 1, 1))
        return self.cast(on_small_grid(self.cast, x, self.kernel(), self.cast(self.bias), (False, True, True)))


class FoldedTemporalConv(DoublingTemporalConv):
    def construct(self, x):
        x = self.cast(x)
        x = self.pad(x) if self.margin else mint.nn.functional.pad(x, (0, 0, 0, 0, 1, 1))
        return self.cast(on_small_grid(self.cast, x, self.kernel(), self.cast(self.bias), (True, False, False)))


class FoldedConv3d(resample.DoublingConv3d):
    def construct(self, x, frames):  # type: ignore[override]
        x = mint.nn.functional.pad(self.cast(x), (1, 1, 1, 1, 1, 1))
        doubled = (frames == 2, True, True)
        return self.cast(on_small_grid(self.cast, x, self.weight, self.cast(self.bias), doubled))


class FoldedCausalConv3d(resample.DoublingCausalConv3d):
    """In time the first frame isn't doubled: each pair is the previous frame's second and this frame's first."""

    def construct(self, x):
        time, space = self.factors[0] == 2, self.factors[1] == 2
        t = x.shape[2]
        # Each kernel sees a frame and the previous one if time is doubled, else three frames.
        x = repeat_edges(self.cast(x), 1, 1 if time else 2)
        if not time:
            return self.cast(on_small_grid(self.cast, x, self.weight, self.cast(self.bias), (False, space, space)))
        first, second = fold(self.weight, 2, split)
        pair = ()
        for kernel in (second, first):
            pair += (on_small_grid(self.cast, x, kernel, self.cast(self.bias), (False, space, space)),)
        return self.cast(narrow(in_turn(pair, (True, False, False)), 2, 1, 2 * t - 1))


FOLDED: dict[type[nn.Cell], type[nn.Cell]] = {
    resample.DoublingSpatialConv: FoldedSpatialConv,
    resample.DoublingTemporalConv: FoldedTemporalConv,
    resample.DoublingConv3d: FoldedConv3d,
    resample.DoublingCausalConv3d: FoldedCausalConv3d,
}
