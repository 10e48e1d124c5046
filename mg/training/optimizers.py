"""The optimizers that `optim.name` selects.

AdamW runs one device kernel per parameter, Lion is mindcv's, SGD is MindSpore's own, as in mindcv. Where mindcv's
differs from the paper or does not run on a CPU, the update is written here in plain operators. All expect unscaled,
clipped gradients, and decay weights but not biases and norms.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops.auto_generate import AdamW as AdamWKernel

from mg import runtime
from mg.training.optim import OptimizerConfig, import_mindcv


def create_optimizer(parameters: Sequence[Parameter], config: OptimizerConfig, rates: Sequence[float]) -> "Optimizer":
    """Create the optimizer that a config names.

    Args:
        rates: the learning rate of every update.

    Raises:
        ValueError: it needs mindcv, which is not installed.
    """
    adamw = AscendAdamW if runtime.device() == "ascend" else AdamW
    others = {"lion": Lion, "adan": Adan, "nadam": NAdam, "sgd": SGD, "momentum": SGD, "lamb": LAMB, "muon": Muon}
    return {"adamw": adamw, **others}[config.name](parameters, config, rates)


class Optimizer(nn.Cell):
    """Base of the optimizers: `next_update` returns the numbers that the next update is called with.

    Args:
        rates: the learning rate of every update.

    Attributes:
        options: of this optimizer, with defaults filled in.
        weights: the parameters that decay.
        each_decay: weight decay of every parameter.
        global_step: updates made so far, (1,).
    """

    def __init__(self, parameters: Sequence[Parameter], config: OptimizerConfig, rates: Sequence[float]):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.rates, self.weight_decay, self.options = rates, config.weight_decay, config.optimizer_options()
        self.parameters = ParameterTuple(parameters)
        self.each_decay = tuple(config.weight_decay if p.ndim >= 2 else 0.0 for p in parameters)
        self.weights = ParameterTuple([p for p in parameters if p.ndim >= 2])  # biases and norms do not decay
        self.decays = config.weight_decay > 0 and len(self.weights) > 0
        self.global_step = Parameter(Tensor([0], ms.int32), name="global_step")
        self.map = ops.HyperMap()

    def next_update(self) -> tuple[float, tuple[Tensor, ...]]:
        """The next update's learning rate, and its inputs other than the gradients."""
        updates = int(self.global_step.asnumpy().item())
        lr = self.rates[updates]
        return lr, self.inputs(self.numbers(lr, updates + 1))

    def numbers(self, lr: float, step: int) -> tuple[float, ...]:
        """The inputs of update `step`, counted from 1; in 64 bits, because 1 - beta2 has few digits in 32."""
        raise NotImplementedError

    def inputs(self, numbers: Sequence[float]) -> tuple:
        """Numbers in a form that the compiled update accepts without being recompiled."""
        return tuple(Tensor(number, ms.float32) for number in numbers)

    def count(self) -> None:
        """Count an update."""
        self.global_step.set_data(Tensor(self.global_step.asnumpy() + 1))

    def state(self) -> list[Parameter]:
        """Every parameter that an exact resume needs."""
        raise NotImplementedError

    def construct(self, gradients, *numbers):
        raise NotImplementedError

    def zeros(self, prefix: str) -> ParameterTuple:
        """Parameters for the optimizer's state, with its prefix in their names."""
        return self.parameters.clone(prefix=prefix, init="zeros")


_shrink = ops.MultitypeFuncGraph("shrink_weight")


@_shrink.register("Tensor", "Tensor")
def _shrink_weight(kept, weight):
    return ops.assign(weight, weight * kept)


_adam = ops.MultitypeFuncGraph("adam")
_fused_adam = ops.Adam()


@_adam.register(*["Tensor"] * 8)
def _adam_kernel(rate, beta1, beta2, eps, parameter, moment1, moment2, gradient):
    # The kernel corrects its rate by powers of the betas, but not eps; with zeros as powers it corrects neither.
    return _fused_adam(parameter, moment1, moment2, 0.0, 0.0, rate, beta1, beta2, eps, gradient)


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), one kernel per parameter; in plain operators it used 17 times
    the parameters' memory on a CPU.

    Attributes:
        moments1, moments2: running means of the gradients and of their squares.
    """

    def __init__(self, parameters, config, rates):
        super().__init__(parameters, config, rates)
        self.moments1, self.moments2 = self.zeros("adam_m"), self.zeros("adam_v")
        self.beta1, self.beta2 = (Tensor(self.options[name], ms.float32) for name in ("beta1", "beta2"))

    def state(self):
        return [*self.moments1, *self.moments2, self.global_step]

    def numbers(self, lr, step):
        """The rate and eps, both corrected for moments that start at zero, and the factor that decays weights."""
        beta1, beta2, eps = self.options.values()
        root = math.sqrt(1 - beta2**step)
        return lr * root / (1 - beta1**step), eps * root, 1 - lr * self.weight_decay

    def construct(self, gradients, rate, eps, kept):
        if self.decays:
            self.map(ops.partial(_shrink, kept), self.weights)
        adam = ops.partial(_adam, rate, self.beta1, self.beta2, eps)
        self.map(adam, self.parameters, self.moments1, self.moments2, gradients)


_ascend_adam = ops.MultitypeFuncGraph("ascend_adam")
_fused_adamw = AdamWKernel()


@_ascend_adam.register("Tuple", "Tensor", "Number", "Number", *["Tensor"] * 4)
def _ascend_adam_kernel(constants, step, rate, decay, parameter, moment1, moment2, gradient):
    beta1, beta2, eps = constants
    # The largest square so far is only used with AMSGrad; any tensor of the right shape will do.
    return _fused_adamw(
        parameter, moment1, moment2, moment2, gradient, step, rate, beta1, beta2, decay, eps, False, False
    )


class AscendAdamW(AdamW):
    """AdamW in Ascend's kernel, which itself decays weights and corrects both moments and eps. It has no CPU version,
    and Adam's kernel on Ascend is compiled for every new shape."""

    def numbers(self, lr, step):
        return lr, step - 1  # the kernel counts from 0

    def inputs(self, numbers):
        lr, step = numbers
        return ms.mutable(float(lr)), Tensor([step], ms.float32)

    def construct(self, gradients, *numbers):
        rate, step = numbers
        adam = ops.partial(_ascend_adam, tuple(self.options.values()), step, rate)
        self.map(adam, self.each_decay, self.parameters, self.moments1, self.moments2, gradients)


class _Borrowed(Optimizer):
    """Base of the optimizers from MindSpore and mindcv: they hold the rates and count the updates themselves.

    Attributes:
        inner: the optimizer.
    """

    def __init__(self, parameters, config, rates):
        super().__init__(parameters, config, rates)
        others = [p for p in self.parameters if p.ndim < 2]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((list(self.weights), config.weight_decay), (others, 0.0))
            if group
        ]
        self.inner = self.make([*groups, {"order_params": list(self.parameters)}], list(rates))
        self.global_step = self.inner.global_step

    def make(self, groups: list[dict], rates: list[float]) -> nn.Optimizer:
        """The optimizer over groups of parameters that decay and that do not."""
        raise NotImplementedError

    def numbers(self, lr, step):
        return ()

    def count(self):
        pass

    def construct(self, gradients):
        self.inner(gradients)


class Lion(_Borrowed):
    """Lion (Chen et al., arXiv:2302.06675): steps by the sign of a mean of the gradients; weight decay is decoupled."""

    def make(self, groups, rates):
        return import_mindcv("optim.lion", "optimizer lion").Lion(groups, rates, **self.options)

    def state(self):
        return [*self.inner.moments1, self.global_step]


class SGD(_Borrowed):
    """Stochastic gradient descent, with or without momentum; the decay is part of the gradient.

    Both of mindcv's names map to nn.SGD: on a CPU, the Nesterov momentum of nn.Momentum is not the documented one.
    """

    def make(self, groups, rates):
        return nn.SGD(groups, rates, **self.options)

    def state(self):
        return [*self.inner.accum, *self.inner.stat, self.global_step]


_adan = ops.MultitypeFuncGraph("adan")


@_adan.register("Tuple", *["Tensor"] * 6)
def _adan_update(numbers, parameter, mean, change, square, last, gradient):
    gain1, gain2, gain3, beta2, changed, of_mean, of_change, of_root, eps = numbers
    difference = changed * (gradient - last)
    new_mean = mean + gain1 * (gradient - mean)
    new_change = change + gain2 * (difference - change)
    new_square = square + gain3 * (ops.square(gradient + beta2 * difference) - square)
    ops.assign_sub(parameter, (of_mean * new_mean + of_change * new_change) / (of_root * ops.sqrt(new_square) + eps))
    ops.assign(mean, new_mean)
    ops.assign(change, new_change)
    ops.assign(square, new_square)
    return ops.assign(last, gradient)


class Adan(Optimizer):
    """Adan (Xie et al., arXiv:2208.06677) as in its authors' code: means start at zero and are bias-corrected.

    mindcv's swaps betas with their complements in places, corrects nothing, and decays every parameter.

    Attributes:
        means, changes, squares: running means of the gradients, of their changes, and of squares of both.
        gradients: the last update's.
    """

    def __init__(self, parameters, config, rates):
        super().__init__(parameters, config, rates)
        self.means, self.changes, self.squares = (self.zeros(f"adan_{name}") for name in "mvn")
        self.gradients = self.zeros("adan_g")

    def state(self):
        return [*self.means, *self.changes, *self.squares, *self.gradients, self.global_step]

    def numbers(self, lr, step):
        beta1, beta2, beta3, eps = self.options.values()
        return (
            1 / (1 + lr * self.weight_decay),
            *(1 - beta1, 1 - beta2, 1 - beta3, beta2),
            float(step > 1),  # there is no change at the first gradient
            lr / (1 - beta1**step),
            lr * beta2 / (1 - beta2**step),
            1 / math.sqrt(1 - beta3**step),
            eps,
        )

    def construct(self, gradients, kept, *numbers):
        adan = ops.partial(_adan, numbers)
        self.map(adan, self.parameters, self.means, self.changes, self.squares, self.gradients, gradients)
        if self.decays:
            self.map(ops.partial(_shrink, kept), self.weights)


_nadam = ops.MultitypeFuncGraph("nadam")


@_nadam.register("Tuple", "Number", *["Tensor"] * 4)
def _nadam_update(numbers, decay, parameter, mean, square, gradient):
    gain1, gain2, of_mean, of_gradient, of_root, eps = numbers
    if decay > 0:
        gradient = gradient + decay * parameter
    new_mean = mean + gain1 * (gradient - mean)
    new_square = square + gain2 * (ops.square(gradient) - square)
    ops.assign_sub(parameter, (of_mean * new_mean + of_gradient * gradient) / (of_root * ops.sqrt(new_square) + eps))
    ops.assign(mean, new_mean)
    return ops.assign(square, new_square)


class _Moments(Optimizer):
    """Base of the optimizers with two moments and a weight decay per parameter.

    Attributes:
        means, squares: running means of the gradients and of their squares.
    """

    prefix: str

    def __init__(self, parameters, config, rates):
        super().__init__(parameters, config, rates)
        self.means, self.squares = self.zeros(f"{self.prefix}_m"), self.zeros(f"{self.prefix}_v")

    def state(self):
        return [*self.means, *self.squares, self.global_step]


class NAdam(_Moments):
    """NAdam (Dozat, 2016): Adam with a Nesterov momentum that climbs to beta1; the decay is part of the gradient.

    mindcv's uses every update's momentum as the next one's.
    """

    prefix = "nadam"

    def __init__(self, parameters, config, rates):
        super().__init__(parameters, config, rates)
        self.momenta = [self.options["beta1"] * (1 - 0.5 * 0.96 ** (0.004 * step)) for step in range(1, len(rates) + 2)]
        self.products = list(accumulate(self.momenta, mul))

    def numbers(self, lr, step):
        beta1, beta2, eps = self.options.values()
        now, ahead = self.momenta[step - 1 : step + 1]
        product, product_ahead = self.products[step - 1 : step + 1]
        of_mean, of_gradient = lr * ahead / (1 - product_ahead), lr * (1 - now) / (1 - product)
        return 1 - beta1, 1 - beta2, of_mean, of_gradient, 1 / math.sqrt(1 - beta2**step), eps

    def construct(self, gradients, *numbers):
        nadam = ops.partial(_nadam, numbers)
        self.map(nadam, self.each_decay, self.parameters, self.means, self.squares, gradients)


_lamb = ops.MultitypeFuncGraph("lamb")


@_lamb.register("Tuple", "Number", *["Tensor"] * 4)
def _lamb_update(numbers, decay, parameter, mean, square, gradient):
    gain1, gain2, of_mean, of_root, eps, lr = numbers
    new_mean = mean + gain1 * (gradient - mean)
    new_square = square + gain2 * (ops.square(gradient) - square)
    direction = of_mean * new_mean / (of_root * ops.sqrt(new_square) + eps)
    if decay > 0:
        direction = direction + decay * parameter
    length, step = ops.sqrt(ops.square(parameter).sum()), ops.sqrt(ops.square(direction).sum())
    trust = ops.where(ops.logical_and(length > 0, step > 0), length / step, ops.ones_like(length))
    ops.assign_sub(parameter, lr * trust * direction)
    ops.assign(mean, new_mean)
    return ops.assign(square, new_square)


class LAMB(_Moments):
    """LAMB (You et al., arXiv:1904.00962): Adam with steps scaled to the parameter's norm, times the rate.

    A parameter that is all zeros gets Adam's step. mindcv's is nn.Lamb, which has no CPU kernel and is deprecated.
    """

    prefix = "lamb"

    def numbers(self, lr, step):
        beta1, beta2, eps = self.options.values()
        return 1 - beta1, 1 - beta2, 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps, lr

    def construct(self, gradients, *numbers):
        self.map(ops.partial(_lamb, numbers), self.each_decay, self.parameters, self.means, self.squares, gradients)


_muon = ops.MultitypeFuncGraph("muon")


@_muon.register("Tuple", *["Tensor"] * 3)
def _muon_update(numbers, parameter, direction, gradient):
    lr, kept, momentum = numbers
    new_direction = momentum * direction + gradient
    rows, columns = parameter.shape[0], parameter.size // parameter.shape[0]
    step = _orthogonal((gradient + momentum * new_direction).reshape(rows, columns)).reshape(parameter.shape)
    ops.assign(parameter, parameter * kept - lr * max(1.0, rows / columns) ** 0.5 * step)
    return ops.assign(direction, new_direction)


def _orthogonal(x: Tensor) -> Tensor:
    """Approximately the matrix with x's singular vectors and singular values of 1. (R, C) -> (R, C)

    Five of the paper's Newton-Schulz iterations, which bring every singular value between 0.7 and 1.2.
    """
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x * ops.rsqrt(ops.square(x).sum() + 1e-14)
    for _ in range(5):
        square = ops.matmul(x, x.T)
        x = 3.4445 * x + ops.matmul(-4.7750 * square + 2.0315 * ops.matmul(square, square), x)
    return x.T if tall else x


class Muon(Optimizer):
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): momentum with orthogonalized steps.

    A weight is a matrix here, (out, in * taps); a step changes its effect in all directions by the rate, so layers of
    every width learn at the same pace. Biases and norms get Adam's steps.

    Attributes:
        directions: decaying sums of the weights' gradients.
        means, squares: running means of the others' gradients and of their squares.
    """

    def __init__(self, parameters, config, rates):
        super().__init__(parameters, config, rates)
        self.places = [[i for i, p in enumerate(parameters) if (p.ndim >= 2) == matrix] for matrix in (True, False)]
        self.vectors = ParameterTuple([p for p in parameters if p.ndim < 2])
        self.directions = self.weights.clone(prefix="muon", init="zeros")
        self.means, self.squares = (self.vectors.clone(prefix=f"muon_{name}", init="zeros") for name in "mv")
        self.beta1, self.beta2 = (Tensor(self.options[name], ms.float32) for name in ("beta1", "beta2"))

    def state(self):
        return [*self.directions, *self.means, *self.squares, self.global_step]

    def numbers(self, lr, step):
        """The weights' rate and decay factor; Adam's rate and eps, as in AdamW."""
        root = math.sqrt(1 - self.options["beta2"] ** step)
        adams = lr * root / (1 - self.options["beta1"] ** step), self.options["eps"] * root
        return lr, 1 - lr * self.weight_decay, *adams

    def construct(self, gradients, lr, kept, rate, eps):
        matrices, vectors = self.places
        if len(matrices) > 0:
            muon = ops.partial(_muon, (lr, kept, self.options["momentum"]))
            self.map(muon, self.weights, self.directions, tuple([gradients[i] for i in matrices]))
        if len(vectors) > 0:
            adam = ops.partial(_adam, rate, self.beta1, self.beta2, eps)
            self.map(adam, self.vectors, self.means, self.squares, tuple([gradients[i] for i in vectors]))
