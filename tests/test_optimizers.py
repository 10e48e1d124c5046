"""Every optimizer makes the updates of its paper, or none where a gradient is not finite, and resumes to the bit."""

import itertools
import sys

import numpy as np
import pytest
from mindspore import Parameter, Tensor
from training_runs import assert_same_weights, read_records, short_run, stopped_at, write_data

from mg import runtime
from mg.checkpoints import read_state_dict
from mg.training import flat, optimizers
from mg.training.optim import OPTIMIZERS, OptimConfig, OptimizerConfig
from mg.training.schedules import learning_rates
from mg.training.updater import Updater

TOTAL, EMA = 6, 0.8
RECIPE = dict(lr=0.1, min_lr=0.01, schedule="cosine_decay", warmup_steps=2, weight_decay=0.3, clip_norm=2.0)
CASES = {name: dict(name=name) for name in OPTIMIZERS} | {
    "in two buffers": dict(),
    "nesterov": dict(name="momentum", nesterov=True),
    "lion with its betas turned": dict(name="lion", beta1=0.5, beta2=0.7),
    "adan with an eps that counts": dict(name="adan", beta1=0.9, beta2=0.8, beta3=0.7, eps=0.1),
    "nadam with an eps that counts": dict(name="nadam", beta1=0.8, beta2=0.9, eps=0.1),
    "lamb with an eps that counts": dict(name="lamb", beta1=0.8, beta2=0.9, eps=0.1),
    "muon with an eps that counts": dict(name="muon", momentum=0.7, beta1=0.8, beta2=0.9, eps=0.1),
}


# By hand: the parameter after update t, in 64 bits. `kept` is what the rule keeps of one parameter, {} at first.


def adamw(p, g, decay, lr, t, kept, beta1=0.9, beta2=0.999, eps=1e-8):
    m = kept["m"] = beta1 * kept.get("m", 0) + (1 - beta1) * g
    v = kept["v"] = beta2 * kept.get("v", 0) + (1 - beta2) * g**2
    return p - lr * (m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * p)


def lion(p, g, decay, lr, t, kept, beta1=0.9, beta2=0.99):
    m = kept.get("m", 0)
    kept["m"] = beta2 * m + (1 - beta2) * g
    return p - lr * (np.sign(beta1 * m + (1 - beta1) * g) + decay * p)


def adan(p, g, decay, lr, t, kept, beta1=0.98, beta2=0.92, beta3=0.99, eps=1e-8):
    change, kept["g"] = g - kept.get("g", g), g
    m = kept["m"] = beta1 * kept.get("m", 0) + (1 - beta1) * g
    v = kept["v"] = beta2 * kept.get("v", 0) + (1 - beta2) * change
    n = kept["n"] = beta3 * kept.get("n", 0) + (1 - beta3) * (g + beta2 * change) ** 2
    step = m / (1 - beta1**t) + beta2 * v / (1 - beta2**t)
    return (p - lr * step / (np.sqrt(n / (1 - beta3**t)) + eps)) / (1 + lr * decay)


def nadam(p, g, decay, lr, t, kept, beta1=0.9, beta2=0.999, eps=1e-8):
    g = g + decay * p
    now, ahead = (beta1 * (1 - 0.5 * 0.96 ** (0.004 * step)) for step in (t, t + 1))
    product = kept["product"] = kept.get("product", 1) * now
    m = kept["m"] = beta1 * kept.get("m", 0) + (1 - beta1) * g
    v = kept["v"] = beta2 * kept.get("v", 0) + (1 - beta2) * g**2
    step = ahead * m / (1 - product * ahead) + (1 - now) * g / (1 - product)
    return p - lr * step / (np.sqrt(v / (1 - beta2**t)) + eps)


def sgd(p, g, decay, lr, t, kept, momentum=0.0, nesterov=False):
    g = g + decay * p
    v = kept["v"] = momentum * kept.get("v", 0) + g
    return p - lr * (g + momentum * v if nesterov else v)


def momentum(*update, momentum=0.9, **options):
    return sgd(*update, momentum=momentum, **options)


def lamb(p, g, decay, lr, t, kept, beta1=0.9, beta2=0.999, eps=1e-6):
    m = kept["m"] = beta1 * kept.get("m", 0) + (1 - beta1) * g
    v = kept["v"] = beta2 * kept.get("v", 0) + (1 - beta2) * g**2
    step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * p
    length = np.linalg.norm(p)
    return p - lr * step * (length / np.linalg.norm(step) if length else 1)


def muon(p, g, decay, lr, t, kept, momentum=0.95, beta1=0.9, beta2=0.99, eps=1e-8):
    if p.ndim < 2:
        return adamw(p, g, decay, lr, t, kept, beta1, beta2, eps)
    v = kept["v"] = momentum * kept.get("v", 0) + g
    left, values, right = np.linalg.svd(g + momentum * v, full_matrices=False)
    values /= np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return p - lr * (max(1, len(p) / p[0].size) ** 0.5 * (left * values) @ right + decay * p)


RULES = dict(adamw=adamw, lion=lion, adan=adan, nadam=nadam, sgd=sgd, momentum=momentum, lamb=lamb, muon=muon)


def start() -> list[np.ndarray]:
    """A weight, and a bias, which is zero at first and does not decay."""
    return [np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32), np.zeros(3, np.float32)]


def make(options: dict) -> Updater:
    parameters = [Parameter(Tensor(value), name=name) for value, name in zip(start(), ("weight", "bias"))]
    return Updater(parameters, OptimizerConfig(**RECIPE, **options), TOTAL, "fp32", 1, EMA)


def gradients(seed: int) -> list[np.ndarray]:
    """Some are longer than clip_norm, others are not."""
    rng = np.random.default_rng(seed)
    return [(0.2 * (1 + 3 * seed) * rng.standard_normal(shape)).astype(np.float32) for shape in ((3, 2), 3)]


def update(updater: Updater, values: list[np.ndarray]):
    updater.gather(dict(zip(("weight", "bias"), values)))
    return updater.update()


def snapshot(updater: Updater) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in updater.parameters} | copied(updater.state())


def copied(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in values.items()}


def broken(values: list[np.ndarray]) -> list[np.ndarray]:
    values[0][1, 1] = np.inf
    return values


def numpy_adamw(parameter, m, v, _, gradient, step, lr, beta1, beta2, decay, eps, amsgrad, maximize):
    """Ascend's kernel as its document has it."""
    assert step.shape == (1,) and not amsgrad and not maximize
    t, g = float(step.asnumpy()[0]) + 1, gradient.asnumpy()
    m.set_data(Tensor(beta1 * m.asnumpy() + (1 - beta1) * g))
    v.set_data(Tensor(beta2 * v.asnumpy() + (1 - beta2) * g**2))
    moved = lr * m.asnumpy() / (1 - beta1**t) / (np.sqrt(v.asnumpy() / (1 - beta2**t)) + eps)
    parameter.set_data(Tensor((parameter.asnumpy() * (1 - lr * decay) - moved).astype(np.float32)))


@pytest.mark.parametrize("options", [{}, dict(beta1=0.8, beta2=0.9, eps=0.1)])
def test_ascends_adamw_makes_the_same_updates(monkeypatch, options):
    runtime.setup("cpu", "pynative")
    monkeypatch.setattr(runtime, "device", lambda: "ascend")
    ascend = make(options)
    monkeypatch.undo()
    monkeypatch.setattr(optimizers, "_fused_adamw", numpy_adamw)
    cpu = make(options)
    for seed in range(TOTAL):
        assert update(ascend, gradients(seed)) == update(cpu, gradients(seed))
        found, wanted = snapshot(ascend), snapshot(cpu)
        assert found.keys() == wanted.keys()  # a run can move from one device to the other
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=3e-6, err_msg=name)


COMPILED = ("adamw", "in two buffers")


@pytest.mark.parametrize(
    "mode, case",
    [
        pytest.param(mode, case, marks=[pytest.mark.full] * (mode == "graph" and case not in COMPILED))
        for mode in ("graph", "pynative")
        for case in CASES
    ],
    indirect=["mode"],
)
def test_updates_are_those_computed_by_hand(mode, case, monkeypatch):
    if case == "in two buffers":
        monkeypatch.setattr(flat, "LARGEST", 6)
    options = dict(CASES[case])
    updater = make(options)
    assert len(updater.gradients) == (2 if case == "in two buffers" else 1)
    rule, rates = RULES[options.pop("name", "adamw")], learning_rates(updater.config, TOTAL)
    wanted, kept = [value.astype(np.float64) for value in start()], ({}, {})
    averages = [value.copy() for value in wanted]
    clipped = []
    for number, rate in enumerate(rates):
        if number == 3:  # left out, as if it had never been
            before = snapshot(updater)
            assert not update(updater, broken(gradients(9))).updated
            assert_same_weights(snapshot(updater), before)
        values = gradients(number)
        norm = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in values))
        clipped.append(norm > 2)
        result = update(updater, values)
        assert result.updated and result.lr == rate
        for place, decay in enumerate((0.3, 0.0)):
            g = values[place].astype(np.float64) * min(1, 2 / (norm + 1e-6))
            wanted[place] = rule(wanted[place], g, decay, rate, number + 1, kept[place], **options)
            averages[place] = EMA * averages[place] + (1 - EMA) * wanted[place]
        found = [p.asnumpy() for p in updater.parameters] + list(updater.averaged().values())
        for value, by_hand in zip(found, [*wanted, *averages], strict=True):
            np.testing.assert_allclose(value, by_hand, rtol=0, atol=3e-6)
    assert len(set(clipped)) == 2
    assert int(updater.optimizer.global_step.asnumpy().item()) == TOTAL


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_updater_with_the_state_of_another_continues_to_the_bit(name):
    whole, resumed = make(dict(name=name)), make(dict(name=name))
    for seed in range(3):
        update(whole, gradients(seed))
    saved = snapshot(whole)
    for parameter in resumed.parameters:
        parameter.set_data(Tensor(saved[parameter.name]))
    resumed.load_state(saved)
    assert_same_weights(snapshot(resumed), saved)
    for seed in range(3, TOTAL):
        assert update(resumed, gradients(seed)) == update(whole, gradients(seed))
    assert_same_weights(snapshot(resumed), snapshot(whole))


def test_no_two_optimizers_take_each_others_state():
    states = {name: frozenset(make(dict(name=name)).state()) for name in OPTIMIZERS if name != "momentum"}
    for one, other in itertools.combinations(states, 2):
        assert states[one] != states[other], (one, other)


def test_an_option_that_is_not_given_is_the_papers():
    lion_options = OptimizerConfig(name="lion", beta1=0.8).optimizer_options()
    assert lion_options == {"beta1": 0.8, "beta2": 0.99}
    assert OptimConfig().optimizer_options() == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    assert OptimizerConfig(name="sgd", beta2=0.999, eps=1e-8).optimizer_options() == {
        "momentum": 0.0,
        "nesterov": False,
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="adam"), "name is adam; it must be one of adamw, lion, adan, nadam, sgd, momentum, lamb, muon"),
        (dict(name="adamw", momentum=0.9), "momentum is 0.9; it must be null with name adamw"),
        (dict(name="lion", beta3=0.9), "beta3 is 0.9; it must be null with name lion"),
        (dict(name="lamb", nesterov=True), "nesterov is True; it must be false with name lamb"),
        (dict(name="sgd", nesterov=True), "nesterov is True; it must be false if momentum is 0"),
        (dict(name="momentum", momentum=1.0), "momentum is 1.0; it must be at least 0 and below 1"),
        (dict(name="adan", eps=0.0), "eps is 0.0; it must be above 0"),
    ],
)
def test_options_that_do_not_fit_the_optimizer_are_named(options, message):
    with pytest.raises(ValueError) as error:
        OptimizerConfig(**options)
    assert str(error.value) == message


def test_without_mindcv_lion_names_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mindcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mindcv", None)
    with pytest.raises(ValueError, match=r"^optimizer lion is mindcv's, which is not installed \(.*mindcv==0.3.0"):
        make(dict(name="lion"))


@pytest.mark.full
def test_a_run_of_two_other_optimizers_and_schedules_resumes_to_the_bit(tmp_path):
    """Lion against a discriminator of Adan's, with EMA, accumulation, a frozen encoder and mindcv's schedules."""
    options = write_data(tmp_path)
    options += "--mode=pynative --data.crop_size=64 --data.image_size=64 --model.freeze=[encoder]".split()
    options += "--discriminator.ndf=4 --discriminator.n_layers=1 --max_steps=4 --ckpt_save_steps=1".split()
    options += "--optim.name=lion --optim.lr=1e-3 --optim.accumulation=2 --optim.ema_decay=0.5".split()
    options += "--optim.schedule=multi_step_decay --optim.milestones 1 3 --optim.decay_rate=0.5".split()
    options += "--optim_discriminator.name=adan --optim_discriminator.schedule=one_cycle".split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    records = short_run(whole, *options)
    assert [record["lr"] for record in records] == [1e-3, 5e-4, 5e-4, 2.5e-4]
    assert [record["skipped"] + record["disc_skipped"] for record in records] == [0] * 4
    state = read_state_dict(whole / "checkpoints" / "step_000004" / "state.safetensors")
    assert {"lion_m.decoder.last_conv.weight", "discriminator.global_step"} < state.keys()
    assert any(name.startswith("discriminator.adan_g.") for name in state)
    with stopped_at(3):
        short_run(parts, *options)
    with pytest.raises(ValueError, match="its optimizer, EMA or loss scale is not this run's"):
        short_run(parts, *options, "--resume", "--optim.name=nadam")
    assert short_run(parts, *options, "--resume") == records == read_records(whole)
    assert_same_weights(read_state_dict(parts / "two_convs.ckpt"), read_state_dict(whole / "two_convs.ckpt"))
