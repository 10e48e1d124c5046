"""A training step makes the updates that its config describes, or none if a number is not finite."""

import functools
import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from tiers import GRAPH_IN_FULL

from mg import runtime
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model
from mg.models.layers.conv import SpatialConv
from mg.models.layers.precision import set_precision
from mg.training.optim import OptimConfig
from mg.training.schedules import learning_rates
from mg.training.step import TrainStep

TAE = dict(  # of one level: little to compile
    ch=32, ch_mult=[1], num_res_blocks=1, z_channels=4, temporal_downsample_level=[0], temporal_upsample_level=[0]
)
LOSS = LossConfig(perceptual_weight=0, kl_weight=1e-3)


class Affine(nn.Cell):
    """y = x * weight + bias per channel; its gradients under the L1 loss can be written down. Latents are the noise."""

    two_stages = False

    def __init__(self, half: bool = False):
        super().__init__()
        self.weight = Parameter(Tensor(np.full((1, 3, 1, 1, 1), 0.5, np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.zeros(3, np.float32)), name="bias")
        self.dtype = ms.float16 if half else ms.float32

    def latents(self, x, noise):
        y = x.astype(self.dtype) * self.weight.astype(self.dtype) + self.bias.reshape(1, 3, 1, 1, 1).astype(self.dtype)
        zeros = ops.zeros_like(noise)
        return {"code": y.astype(ms.float32), "z": noise, "mean": zeros, "logvar": zeros, "target": None}

    def reconstruct(self, code, shape):
        return code


class AffineByHand:
    """The same model, loss, AdamW, clipping and moving average in numpy."""

    def __init__(self, config: OptimConfig, total_steps: int):
        self.config, self.rates = config, learning_rates(config, total_steps)
        self.values = {"weight": np.full(3, 0.5), "bias": np.zeros(3)}
        self.averages = {name: value.copy() for name, value in self.values.items()}
        self.means = {name: np.zeros(3) for name in self.values}
        self.squares = {name: np.zeros(3) for name in self.values}
        self.step = 0

    def gradients(self, x: np.ndarray) -> dict:
        weight, bias = (v.reshape(1, 3, 1, 1, 1) for v in self.values.values())
        sign = np.sign(x * weight + bias - x) / (x.shape[0] * x.shape[2])
        return {"weight": (sign * x).sum((0, 2, 3, 4)), "bias": sign.sum((0, 2, 3, 4))}

    def update(self, batches: list) -> float:
        """Returns the gradient's norm."""
        config, rate = self.config, self.rates[self.step]
        self.step += 1
        each = [self.gradients(x) for x in batches]
        gradient = {name: np.mean([g[name] for g in each], axis=0) for name in self.values}
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        factor = min(1, config.clip_norm / norm) if config.clip_norm else 1
        for name, value in self.values.items():
            g = gradient[name] * factor
            self.means[name] = config.beta1 * self.means[name] + (1 - config.beta1) * g
            self.squares[name] = config.beta2 * self.squares[name] + (1 - config.beta2) * g**2
            mean = self.means[name] / (1 - config.beta1**self.step)
            square = self.squares[name] / (1 - config.beta2**self.step)
            decay = config.weight_decay * value if name == "weight" else 0
            self.values[name] = value - rate * (mean / (np.sqrt(square) + config.eps) + decay)
            kept = config.ema_decay
            self.averages[name] = kept * self.averages[name] + (1 - kept) * self.values[name]
        return norm


def batch(seed: int, size: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (size, 3, 2, 4, 4)).astype(np.float32)


def noise_for(x: np.ndarray) -> np.ndarray:
    return np.zeros((x.shape[0], 1, 1, 1, 1), np.float32)


def affine_step(total_steps: int = 10, half: bool = False, loss=None, **config):
    model = Affine(half)
    dtype = "fp16" if half else "fp32"
    return model, TrainStep(model, loss or AutoencoderLoss(LOSS), OptimConfig(**config), total_steps, dtype)


def run(step: TrainStep, *batches: np.ndarray):
    for x in batches:
        step.accumulate(x, noise_for(x))
    return step.update()


def snapshot(step: TrainStep) -> dict:
    """All that an update may change, apart from the loss scale."""
    values = step.state() | {p.name: p.asnumpy() for p in step.updater.parameters}
    return {name: value.copy() for name, value in values.items() if name not in ("scale_value", "counter")}


def assert_same(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


RECIPES = {
    "plain": dict(clip_norm=0),
    "clipped": dict(clip_norm=0.5),
    "decayed weights": dict(clip_norm=0, weight_decay=0.3),
    "warmed up and decayed": dict(warmup_steps=3, schedule="cosine_decay", min_lr=1e-3),
    "eps that counts": dict(clip_norm=0, eps=0.1),
    "averaged": dict(ema_decay=0.8),
    "accumulated": dict(accumulation=3),
    "all": dict(
        weight_decay=0.3, warmup_steps=2, schedule="linear_decay", ema_decay=0.8, accumulation=2, beta1=0.8, beta2=0.9
    ),
}


@pytest.mark.parametrize("mode, recipe", [("graph", "all"), *(("pynative", recipe) for recipe in RECIPES)])
def test_updates_are_those_computed_by_hand(mode, recipe):
    runtime.setup("cpu", mode, seed=0)
    config = OptimConfig(**{"lr": 0.02, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, **RECIPES[recipe]})
    model = Affine()
    step = TrainStep(model, AutoencoderLoss(LOSS), config, 6)
    by_hand = AffineByHand(config, 6)
    for update in range(6):
        batches = [batch(10 * update + k) for k in range(config.accumulation)]
        result = run(step, *batches)
        norm = by_hand.update(batches)
        assert result.updated
        assert result.lr == by_hand.rates[update]
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(model.weight.asnumpy().ravel(), by_hand.values["weight"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(model.bias.asnumpy(), by_hand.values["bias"], rtol=0, atol=2e-6)
    averages = {name: average.ravel() for name, average in step.updater.averaged().items()}
    assert set(averages) == (set(by_hand.averages) if config.ema_decay else set())
    for name, value in averages.items():
        np.testing.assert_allclose(value, by_hand.averages[name], rtol=0, atol=2e-6)
        assert np.abs(value - by_hand.values[name]).max() > 1e-3


def test_the_result_is_the_mean_over_the_batches_of_an_update():
    x, y = batch(0), batch(1)
    _, step = affine_step(accumulation=2)
    result = run(step, x, y)
    l1 = [np.abs(0.5 * v).mean() for v in (x, y)]
    assert result.terms["l1"] == pytest.approx(np.mean(l1), rel=1e-5)
    assert result.loss == pytest.approx(np.mean(l1) * 48, rel=1e-5)
    assert list(result.terms) == ["l1", "lpips", "kl", "outlier"]


def test_accumulated_batches_update_as_one_joint_batch():
    x = batch(0, size=4)
    model, step = affine_step(lr=0.1)
    run(step, x)
    split_model, split_step = affine_step(lr=0.1, accumulation=2)
    run(split_step, x[:2], x[2:])
    for name in ("weight", "bias"):
        joint, split = getattr(model, name).asnumpy(), getattr(split_model, name).asnumpy()
        np.testing.assert_allclose(split, joint, rtol=0, atol=1e-6)


def test_learning_rates_climb_and_fall_as_the_schedule_says():
    config = dict(lr=1.0, min_lr=0.2, warmup_steps=4)
    constant, linear, cosine = (
        learning_rates(OptimConfig(**config, schedule=schedule), 13)
        for schedule in ("constant", "linear_decay", "cosine_decay")
    )
    for rates in (constant, linear, cosine):
        assert len(rates) == 13
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert constant[4:] == [1.0] * 9
    assert linear[4:] == pytest.approx([1 - 0.8 * k / 10 for k in range(1, 10)])
    assert cosine[4:] == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * k / 10)) for k in range(1, 10)])
    assert learning_rates(OptimConfig(lr=1.0, warmup_steps=100), 4) == [0.25, 0.5, 0.75, 1.0]  # a short run


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("lr", 0.0, "above 0"),
        ("min_lr", 1.0, "from 0 to lr, 1e-05"),
        ("beta2", 1.0, "at least 0 and below 1"),
        ("ema_decay", 1.0, "at least 0 and below 1"),
        ("accumulation", 0, "at least 1"),
        ("max_skipped", 0, "at least 1"),
        ("clip_norm", -1.0, "at least 0"),
    ],
)
def test_a_setting_out_of_range_is_an_error(name, value, wanted):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be {wanted}$"):
        OptimConfig(**{name: value})


class BrokenLoss(AutoencoderLoss):
    """A loss that is not a number although its gradient is one."""

    def construct(self, x, *inputs, **named):
        loss, terms = super().construct(x, *inputs, **named)
        return loss + ops.stop_gradient(ops.log(x.min() * 0 - 1)), terms


@pytest.mark.parametrize(
    "mode, fault",
    [("graph", "nan pixel"), ("pynative", "nan pixel"), ("pynative", "inf pixel"), ("pynative", "loss alone")],
)
def test_a_step_that_is_not_finite_changes_nothing(mode, fault):
    runtime.setup("cpu", mode, seed=0)
    bad = batch(1)
    if fault != "loss alone":
        bad[0, 0, 0, 0, 0] = float(fault.split()[0])
    _, step = affine_step(lr=0.1, ema_decay=0.5, accumulation=2, warmup_steps=5)
    run(step, batch(0), batch(2))
    before = snapshot(step)
    good_loss = step._accumulate.loss
    if fault == "loss alone":
        step._accumulate.loss = BrokenLoss(LOSS)
        step._accumulate.compile_cache.clear()
    result = run(step, batch(3), bad)
    step._accumulate.loss = good_loss
    step._accumulate.compile_cache.clear()
    assert not result.updated
    assert not math.isfinite(result.loss) and math.isfinite(result.grad_norm) == (fault == "loss alone")
    assert_same(snapshot(step), before)
    assert result.lr == step.updater.optimizer.rates[1]

    after = run(step, batch(4), batch(5))
    _, other = affine_step(lr=0.1, ema_decay=0.5, accumulation=2, warmup_steps=5)
    run(other, batch(0), batch(2))
    assert run(other, batch(4), batch(5)) == after  # as if the bad one had never been
    assert after.lr == step.updater.optimizer.rates[1]
    assert_same(snapshot(step), snapshot(other))


def test_fp16_overflow_halves_the_scale_and_changes_nothing_and_the_scale_grows_again(mode):
    _, step = affine_step(half=True, lr=0.1, ema_decay=0.5, init_loss_scale=2.0**18)
    step.updater.scaler.scale_window = 3
    before = snapshot(step)
    scales, updated = [], []
    for seed in range(10):
        result = run(step, batch(seed))
        scales.append(math.log2(result.loss_scale))
        updated.append(result.updated)
        if not any(updated):
            assert_same(snapshot(step), before)
        if result.updated:
            norm = AffineByHand(OptimConfig(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8), 10).update([batch(seed)])
            assert result.grad_norm == pytest.approx(norm, rel=0.2)
    first = updated.index(True)
    assert first >= 2
    assert scales[: first + 1] == [18 - k for k in range(first + 1)]
    assert updated[first : first + 3] == [True] * 3
    assert scales[first : first + 4] == [scales[first]] * 3 + [scales[first] + 1]


def test_only_fp16_scales_its_loss_unless_told_otherwise():
    assert affine_step(half=True)[1].updater.scaler is not None
    assert affine_step()[1].updater.scaler is None
    assert affine_step(half=True, loss_scale="none")[1].updater.scaler is None
    assert affine_step(loss_scale="dynamic")[1].updater.scaler is not None


# The TAE itself, small.


def tae_step(mode: str, dtype: str = "fp32", recompute: bool = False, **config):
    runtime.setup("cpu", mode, seed=0)
    model = create_model("tae", dtype=dtype, **TAE)
    if recompute:
        model.recompute_activations()
    rng = np.random.default_rng(0)
    for parameter in model.trainable_params():  # branches that start at zero would hide their inner gradients
        if parameter.ndim > 1:
            noise = 0.05 * rng.standard_normal(parameter.shape)
            parameter.set_data(Tensor((parameter.asnumpy() + noise).astype(np.float32)))
    optim = OptimConfig(lr=1e-3, init_loss_scale=16.0, **config)
    return model, TrainStep(model, AutoencoderLoss(LOSS), optim, 100, dtype)


def clip(model, frames: int, seed: int = 0, size: int = 1):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (size, 3, frames, 16, 16)).astype(np.float32)
    return x, rng.standard_normal(model.latent_shape(x.shape), dtype=np.float32)


@functools.cache
def tae_gradients(mode: str, dtype: str = "fp32", recompute: bool = False):
    """Loss and gradients of one clip of 8 frames; without recompute also the losses of four updates, and the step."""
    model, step = tae_step(mode, dtype, recompute)
    step.accumulate(*clip(model, 8))
    loss, scale = float(step._reports[0][1].asnumpy()[0]), float(step.updater.loss_scale().asnumpy())
    gradients = {name: g / scale for name, g in step.updater.gathered().items()}
    if recompute:
        return loss, gradients, [], step
    losses = [step.update().loss]
    for update, frames in enumerate((1, 8, 1)):
        step.accumulate(*clip(model, frames, seed=1 + update))
        losses.append(step.update().loss)
    return loss, gradients, losses, step


@pytest.fixture(scope="module", autouse=True)
def forget_gradients():
    """Cells must not outlive MindSpore."""
    yield
    tae_gradients.cache_clear()


def assert_close(found, wanted, loss_tolerance: float, tolerance: float):
    """Loss relative to itself, gradients relative to their global norm."""
    assert found[0] == pytest.approx(wanted[0], rel=loss_tolerance)
    assert found[1].keys() == wanted[1].keys()
    scale = math.sqrt(sum(float((g**2).sum()) for g in wanted[1].values()))
    for name, gradient in wanted[1].items():
        assert np.abs(found[1][name] - gradient).max() <= tolerance * scale, name


def test_every_parameter_of_the_tae_gets_a_gradient():
    gradients = tae_gradients("pynative")[1]
    # A bias before a norm with one channel per group, or of a key in attention, would have none; here all have one.
    silent = [name for name, gradient in gradients.items() if not np.abs(gradient).max() > 0]
    assert silent == []


@pytest.mark.parametrize("mode", [pytest.param("graph", marks=pytest.mark.full), "pynative"])
def test_gradient_checkpointing_changes_no_gradient_of_the_tae(mode):
    assert_close(tae_gradients(mode, recompute=True), tae_gradients(mode), 1e-5, 5e-5)


def test_graph_and_pynative_train_alike_and_graph_compiles_once_per_shape():
    assert_close(tae_gradients("graph"), tae_gradients("pynative"), 1e-5, 5e-5)
    _, _, losses, step = tae_gradients("graph")
    parts = (step._accumulate, step.updater._reduce, step.updater._update)
    assert [len(part.compile_cache) for part in parts] == [2, 1, 1]  # for T = 8 and T = 1
    assert len(losses) == 4 and losses[2] < losses[0]
    assert losses == pytest.approx(tae_gradients("pynative")[2], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_has_nearly_the_gradients_of_fp32_and_trains(dtype):
    plain = tae_gradients("pynative")
    low = tae_gradients("pynative", dtype)
    assert_close(low, plain, 1e-2, 5e-2)
    assert low[0] != plain[0]
    _, _, losses, step = low
    assert losses[2] < losses[0]
    assert int(step.updater.optimizer.global_step.asnumpy().item()) == len(losses)  # none was left out
    assert all(p.dtype == ms.float32 for p in step.updater.parameters)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """To the nearest bf16, ties to even, in fp32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return ((bits >> 16) << 16).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("mode", GRAPH_IN_FULL, indirect=True)
def test_emulated_bf16_is_a_convolution_rounded_by_hand(mode):
    rng = np.random.default_rng(0)
    x, weight, bias, cotangent = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 3, 6, 7), (4, 5, 3, 3), 4, (2, 4, 3, 6, 7))
    )

    def convolve(x, weight, bias, cotangent, precision):
        conv = set_precision(SpatialConv(5, 4), precision)
        conv.weight.set_data(Tensor(weight))
        conv.bias.set_data(Tensor(bias))

        def pulled(v):
            return (conv(v) * Tensor(cotangent)).sum()

        dx, (dweight, dbias) = ms.grad(pulled, 0, [conv.weight, conv.bias])(Tensor(x))
        return [value.asnumpy() for value in (conv(Tensor(x)), dx, dweight, dbias)]

    emulated = convolve(x, weight, bias, cotangent, "bf16")
    exact = convolve(*map(round_to_bf16, (x, weight, bias, cotangent)), "fp32")
    for found, wanted in zip(emulated, exact):
        np.testing.assert_array_equal(found, round_to_bf16(wanted))
    plain = convolve(x, weight, bias, cotangent, "fp32")
    assert all(np.abs(found - other).max() > 1e-4 for found, other in zip(emulated, plain))
