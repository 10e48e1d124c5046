"""Every schedule has the learning rates of its formula; mindcv is imported only for its own schedules."""

import itertools
import math
import subprocess
import sys

import pytest

from mg.training.optim import SCHEDULES, OptimizerConfig
from mg.training.schedules import learning_rates

GIVEN = {
    "exponential_decay": dict(decay_steps=4, decay_rate=0.5),
    "step_decay": dict(decay_steps=4, decay_rate=0.5),
    "multi_step_decay": dict(milestones=[5, 8], decay_rate=0.5),
}


def cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


# Of 12 updates, k = 0 to 9 are those after a warm-up of two; schedules that climb themselves have none.
FORMULAS = {
    "constant": ({}, lambda k: 1.0),
    "linear_decay": ({}, lambda k: 0.1 + 0.9 * (10 - k) / 11),
    "cosine_decay": ({}, lambda k: cosine(1.0, 0.1, (k + 1) / 11)),
    "polynomial_decay": (dict(power=2.0), lambda k: 0.1 + 0.9 * ((10 - k) / 11) ** 2),
    "exponential_decay": (dict(decay_steps=4, decay_rate=0.5), lambda k: max(0.1, 0.5 ** (k / 4))),
    "step_decay": (dict(decay_steps=3, decay_rate=0.4), lambda k: [1.0, 0.4, 0.16, 0.1][k // 3]),
    "multi_step_decay": (dict(milestones=[5, 8], decay_rate=0.5), lambda k: [1.0, 0.5, 0.25][(k >= 3) + (k >= 6)]),
    "cosine_restarts": (
        dict(num_cycles=2, cycle_decay=0.5),
        lambda k: cosine([1.0, 0.5][k // 5], 0.1, k % 5 / 5),
    ),
}


@pytest.mark.parametrize("schedule", FORMULAS)
def test_rates_are_those_of_the_formula_after_the_warm_up(schedule):
    options, formula = FORMULAS[schedule]
    rates = learning_rates(OptimizerConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=2, **options), 12)
    assert rates == pytest.approx([0.5, 1.0, *map(formula, range(10))], rel=1e-12)


def test_one_cycle_climbs_from_a_25th_and_ends_at_the_lowest_rate():
    climb = [cosine(0.04, 1.0, k / 3) for k in range(4)]  # 0.4 of ten updates
    for lowest in (0.01, 0.0):
        config = OptimizerConfig(lr=1.0, min_lr=lowest, schedule="one_cycle", pct_start=0.4)
        fall = [cosine(1.0, lowest, k / 6) for k in range(1, 7)]
        assert learning_rates(config, 10) == pytest.approx([max(rate, lowest) for rate in climb + fall], abs=1e-15)


def test_cycles_are_triangles_from_the_lowest_rate_whose_height_decays():
    config = OptimizerConfig(lr=1.0, min_lr=0.2, schedule="cyclic", num_cycles=2, cycle_decay=0.5)
    wanted = [0.2, 0.6, 1.0, 0.6, 0.2, 0.4, 0.6, 0.4]
    assert learning_rates(config, 8) == pytest.approx(wanted, rel=1e-12)


def test_a_polynomial_decay_of_power_one_is_linear():
    polynomial, linear = (
        learning_rates(OptimizerConfig(lr=3e-4, min_lr=1e-5, schedule=schedule, warmup_steps=3), 17)
        for schedule in ("polynomial_decay", "linear_decay")
    )
    assert polynomial == linear


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_there_is_a_rate_between_the_lowest_and_the_highest_for_every_update_of_any_run(schedule):
    climbs = schedule in ("one_cycle", "cyclic")
    for total, warmup in itertools.product((1, 2, 3, 4, 7, 10, 101), (0,) if climbs else (0, 1, 3, 10, 200)):
        config = OptimizerConfig(lr=0.3, min_lr=0.1, schedule=schedule, warmup_steps=warmup, **GIVEN.get(schedule, {}))
        rates = learning_rates(config, total)
        assert len(rates) == total
        assert all(0 < rate <= 0.3 + 1e-12 for rate in rates)
        assert all(rate >= 0.1 for rate in rates[warmup:])


def test_a_rise_of_one_update_starts_at_the_highest_rate():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, schedule="one_cycle", pct_start=0.25)
    assert learning_rates(config, 4) == pytest.approx([cosine(1.0, 0.1, k / 4) for k in range(1, 5)])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(schedule="cosine"), "schedule is cosine; it must be one of constant, cosine_decay, linear_decay"),
        (dict(schedule="step_decay"), "decay_steps is None; it must be given with schedule step_decay"),
        (dict(schedule="multi_step_decay"), "milestones is None; it must be given with schedule multi_step_decay"),
        (dict(schedule="constant", power=2.0), "power is 2.0; it must be null with schedule constant"),
        (dict(schedule="cyclic", warmup_steps=3), "warmup_steps is 3; it must be 0 with schedule cyclic"),
        (dict(schedule="one_cycle", pct_start=1.0), "pct_start is 1.0; it must be at least 0 and below 1"),
        (dict(schedule="cyclic", num_cycles=0), "num_cycles is 0; it must be at least 1"),
        (dict(schedule="polynomial_decay", power=0.0), "power is 0.0; it must be above 0"),
        (dict(schedule="step_decay", decay_steps=9, decay_rate=1.5), "decay_rate is 1.5; it must be above 0, and 1 at"),
        (dict(schedule="multi_step_decay", milestones=[]), "milestones is []; it must be numbers of updates, each"),
        (dict(schedule="multi_step_decay", milestones=[5, 5]), "milestones is [5, 5]; it must be numbers of updates"),
    ],
)
def test_options_that_do_not_fit_the_schedule_are_named(options, message):
    with pytest.raises(ValueError) as error:
        OptimizerConfig(**options)
    assert str(error.value).startswith(message)


def test_without_mindcv_its_schedules_name_it_and_the_others_work(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mindcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mindcv", None)
    assert len(learning_rates(OptimizerConfig(schedule="polynomial_decay"), 5)) == 5
    with pytest.raises(ValueError, match=r"^schedule one_cycle is mindcv's, which is not installed \(.*mindcv==0.3.0"):
        learning_rates(OptimizerConfig(schedule="one_cycle"), 5)


def test_mindcv_is_imported_when_it_is_asked_for_and_changes_nothing():
    script = """
import sys
import mg.training.trainer
import mindspore as ms
from mg.training.optim import OptimizerConfig
from mg.training.schedules import learning_rates
ms.set_context(mode=ms.GRAPH_MODE)
before = ms.get_context("mode"), ms.get_context("device_target")
learning_rates(OptimizerConfig(schedule="cosine_decay"), 5)
assert "mindcv" not in sys.modules
learning_rates(OptimizerConfig(schedule="one_cycle"), 5)
assert "mindcv" in sys.modules
assert (ms.get_context("mode"), ms.get_context("device_target")) == before
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
