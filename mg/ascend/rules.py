"""Limits of kernels on Ascend that kernel selection does not check, since it only looks at types.

Each rule returns what is wrong with a kernel, or None, and documents where its limit comes from. CANN's documents are
those of its operator libraries (gitcode.com/cann: ops-nn, ops-math) for the Atlas A2 series, the 910B.
"""

import math
from collections.abc import Callable

from mg.ascend.kernels import Kernel, Tensor

# aclop kernels that are accepted, each with a reason: they do not fail a graph. CANN compiles an aclop kernel again for
# every new shape, which takes seconds each, so the first clip of every shape waits.
ACLOP_INFERENCE: dict[str, str] = {
    "StandardNormal": "noise for sampling, drawn once per clip",
}
ACLOP_TRAINING: dict[str, str] = ACLOP_INFERENCE | {
    "AddN": "sums of gradients of a value that is used twice: MindSpore adds two or three at once with it",
    "TensorMove": "copies that MindSpore inserts where a value is read and written",
    "Assign": "the discriminator's statistics, and optimizers other than AdamW; their shapes do not depend on the clip",
    "AssignAdd": "counts and moments of optimizers other than AdamW",
    "AssignSub": "moments of optimizers other than AdamW",
    "Gather": "lookups of an update's learning rate, and of each sample in the noise schedule's tables",
    "SGD": "the step of nn.SGD",
    "Adam": "the step of biases and norms under Muon; their shapes do not depend on the clip",
}

# The most kernels that an update may launch per parameter.
LAUNCHES_PER_PARAMETER = 3

Rule = Callable[[Kernel], str | None]

_FORWARD = ("Conv2D", "Conv2DExt", "Conv2DPadding", "Conv3D", "Conv3DExt", "Conv3DPadding", "Convolution")
_FORWARD += ("ConvolutionStr", "DepthwiseConv2dNative")
_UNGROUPED = ("Conv3D", "Conv3DBackpropInput", "Conv3DBackpropFilter")
_INT32 = 2**31 - 1


def convolution_width(kernel: Kernel) -> str | None:
    """At most 4096 wide and 100000 high. CANN's prototypes of Conv2D and Conv3D: "the W dimension of the input image
    supports cases exceeding 4096, but it may cause compilation errors"."""
    if _convolution(kernel) is None:
        return None
    widest = max(tensor.shape[-1] for tensor in (*kernel.inputs, *kernel.outputs) if len(tensor.shape) > 3)
    highest = max(tensor.shape[-2] for tensor in (*kernel.inputs, *kernel.outputs) if len(tensor.shape) > 3)
    if widest > 4096 or highest > 100000:
        return f"{highest} x {widest} pixels; at most 100000 x 4096"
    return None


def convolution_groups(kernel: Kernel) -> str | None:
    """Groups are 1, or as many as input and output channels. MindSpore's document of ops.Conv2D ("on Ascend only
    group convolution in depthwise convolution scenarios is supported"); CANN's Conv3DV2 allows 1 or all input channels,
    and ops.Conv3D only 1."""
    shapes = _convolution(kernel)
    if shapes is None:
        return None
    channels, out_channels, weight = shapes[0].shape[1], shapes[1].shape[0], shapes[1].shape[1]
    groups = channels // weight
    if groups == 1 or (groups == channels == out_channels and kernel.primitive not in _UNGROUPED):
        return None
    allowed = "1" if kernel.primitive in _UNGROUPED else "1, or one per channel"
    return f"{groups} groups of {channels} channels to {out_channels}; must be {allowed}"


def convolution_kernel(kernel: Kernel) -> str | None:
    """At most 255 pixels per side. CANN's prototype of Conv2D; aclnnConvolution allows 511."""
    shapes = _convolution(kernel)
    if shapes is None or max(shapes[1].shape[-2:]) <= 255:
        return None
    return f"a kernel of {shapes[1].shape[-2]} x {shapes[1].shape[-1]}; at most 255 x 255"


def convolution_values(kernel: Kernel) -> str | None:
    """Fewer than 2^31 values per tensor, and at most 1000000 along any axis. CANN's prototypes of Conv2D and Conv3D
    ("the correctness of the operator cannot be guaranteed"); its document of aclnnConvolution."""
    if _convolution(kernel) is None:
        return None
    for tensor in (*kernel.inputs, *kernel.outputs):
        if math.prod(tensor.shape) > _INT32 or max(tensor.shape, default=0) > 1_000_000:
            return f"a tensor of {tensor.shape}; at most 1000000 along an axis and {_INT32} values"
    return None


def pool_dtype(kernel: Kernel) -> str | None:
    """No maximum pooling in bf16. CANN's document of aclnnMaxPool: on A2 "no BFLOAT16"; MaxPoolWithMask supports it."""
    if kernel.primitive in ("MaxPool", "MaxPoolGrad") and kernel.inputs[0].dtype == "BFloat16":
        return "bf16; use fp16 or fp32"
    return None


def pieces(kernel: Kernel) -> str | None:
    """At most 63 inputs or outputs of a variadic aclop kernel. MindSpore's passes for GE split larger ones
    (AddnFission, ConcatFission, PackFission, SplitFission), but its passes for single kernels don't. aclnn's Cat and
    Stack split themselves."""
    most = max(len(kernel.inputs), len(kernel.outputs))
    if kernel.kind == "aclop" and most > 63:
        return f"{most} tensors; at most 63"
    return None


def rank(kernel: Kernel) -> str | None:
    """At most 8 axes. CANN's documents of aclnnPermute, aclnnSlice and nearly all others."""
    most = max((len(tensor.shape) for tensor in (*kernel.inputs, *kernel.outputs)), default=0)
    return f"{most} axes; at most 8" if most > 8 else None


def norm_groups(kernel: Kernel) -> str | None:
    """At most 8000 channels per group, and 240000 in total. CANN's document of aclnnGroupNormBackward."""
    if kernel.primitive != "GroupNormGrad":
        return None
    channels, groups = kernel.inputs[1].shape[1], kernel.inputs[2].shape[1]
    if channels > 240_000 or channels > 8000 * groups:
        return f"{channels} channels in {groups} groups; at most 8000 per group"
    return None


RULES: tuple[Rule, ...] = (
    convolution_width,
    convolution_groups,
    convolution_kernel,
    convolution_values,
    pool_dtype,
    pieces,
    rank,
    norm_groups,
)


def breaks(kernel: Kernel) -> list[str]:
    """The rules that a kernel breaks, one line each, starting with the rule's name."""
    said = ((rule.__name__, rule(kernel)) for rule in RULES)
    return [f"{name}: {kernel.primitive} with {text}" for name, text in said if text is not None]


def _convolution(kernel: Kernel) -> tuple[Tensor, Tensor] | None:
    """Image and weight of a convolution, (B, Cin, ..., H, W) and (Cout, Cin / groups, ..., kh, kw), or of one of its
    gradients."""
    inputs, outputs = kernel.inputs, kernel.outputs
    if kernel.primitive in _FORWARD:
        return inputs[0], inputs[1]
    if kernel.primitive in ("ConvolutionGrad", "ConvolutionStrGrad"):  # inputs: gradient, image, weight
        return inputs[1], inputs[2]
    if kernel.primitive == "Conv2DBackpropInput":  # gradient, weight -> image
        return outputs[0], inputs[1]
    if kernel.primitive == "Conv3DBackpropInput":  # weight, gradient -> image
        return outputs[0], inputs[0]
    if kernel.primitive == "Conv2DBackpropFilter":  # gradient, image -> weight
        return inputs[1], outputs[0]
    if kernel.primitive == "Conv3DBackpropFilter":  # image, gradient -> weight
        return inputs[0], outputs[0]
    return None
