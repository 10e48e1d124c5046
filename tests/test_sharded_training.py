"""Workers that share out what an update takes make the updates of workers that do not; all on the CPU, by msrun."""

from pathlib import Path

import numpy as np
import pytest
import sharded_updates
from mindspore import Parameter, Tensor
from sharded_updates import MIDDLE, OPTIMIZERS, SHAPES, UPDATES
from workers import run

from mg.collectives import Group
from mg.runtime import Runtime
from mg.training.autoencoder import TrainConfig
from mg.training.optim import OptimizerConfig
from mg.training.shards import Shards

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """What two workers of sharded_updates.py have left, by "<mode>/<optimizer>/<way>/<name>"."""
    folder = tmp_path_factory.mktemp("group")
    run(folder, FOLDER / "sharded_updates.py", 600)
    ranks = []
    for rank in (0, 1):
        with np.load(folder / f"rank_{rank}.npz") as stored:
            ranks.append(dict(stored))
    assert ranks[0].keys() == ranks[1].keys()
    for name, value in ranks[0].items():
        np.testing.assert_array_equal(ranks[1][name], value, err_msg=name)
    return ranks[0]


def of(group: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    names = [name for name in group if name.startswith(prefix) and "/" not in name[len(prefix) :]]
    return {name[len(prefix) :]: group[name] for name in names if not name.endswith("/held")}


def assert_close(found: dict, wanted: dict):
    assert found.keys() == wanted.keys() and len(wanted) > 2 * len(SHAPES)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


EVERY = [(mode, optimizer) for mode, optimizers in OPTIMIZERS.items() for optimizer in optimizers]


@pytest.mark.full
@pytest.mark.parametrize("mode, optimizer", EVERY)
def test_updates_are_those_of_whole_states(group, mode, optimizer):
    """Clipped gradients of several batches, decay of weights only, averages, and a skipped update."""
    found, wanted = (of(group, f"{mode}/{optimizer}/{way}/") for way in ("zero2", "whole"))
    assert_close(found, wanted)
    assert np.isfinite(wanted["norms"]).tolist() == [True, False, True, True] and wanted["norms"][0] > 3
    assert wanted["global_step"] == UPDATES - 1 and wanted["scale_value"] == 512
    for name in SHAPES:
        assert np.isfinite(wanted[name]).all() and not np.allclose(wanted[name], wanted[f"ema.{name}"])


@pytest.mark.full
@pytest.mark.parametrize("optimizer", OPTIMIZERS["pynative"])
def test_shards_continue_to_the_bit_and_so_do_whole_states_in_shards(group, optimizer):
    ways = ("zero2", "zero2_taken_over", "whole", "whole_taken_over")
    zero2, taken_over, whole, from_whole = (of(group, f"pynative/{optimizer}/{way}/") for way in ways)
    assert taken_over.keys() == zero2.keys()
    for name, value in zero2.items():
        np.testing.assert_array_equal(taken_over[name], value, err_msg=name)
    assert_close(from_whole, whole)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", OPTIMIZERS["pynative"])
def test_one_worker_continues_where_two_had_shards(group, optimizer):
    middle, wanted = (of(group, f"pynative/{optimizer}/zero2/{when}") for when in ("middle/", ""))
    updater = sharded_updates.take_over(sharded_updates.make(optimizer), middle, middle)
    norms = sharded_updates.updates(updater, MIDDLE, UPDATES, range(2))
    found = sharded_updates.values(updater, "", [*wanted["norms"][:MIDDLE], *norms])
    assert_close({name[1:]: value for name, value in found.items() if name != "/held"}, wanted)


@pytest.mark.full
@pytest.mark.parametrize("optimizer, kept", [("adamw", 2), ("adan", 4), ("momentum", 2)])
def test_a_worker_of_two_holds_half_and_its_shards(group, optimizer, kept):
    """Of each parameter a gradient, an average and what the optimizer keeps; a flat tensor ends in some zeros."""
    whole, shards = (int(group[f"pynative/{optimizer}/{way}/held"]) for way in ("whole", "zero2"))
    values = sum(int(np.prod(shape)) for shape in SHAPES.values())
    zeros = 4 * sharded_updates.flat.ROW * 2 * len(SHAPES)
    assert 0 <= whole - 4 * values * (2 + kept) < zeros
    assert abs(shards - 4 * values / 2 * (2 + kept + 1)) < zeros < whole / 5


# In one process.


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_shards_are_equal_parts_that_make_up_the_whole(monkeypatch, workers):
    """Also where a parameter has fewer values than there are workers."""
    for name in ("AllGather", "ReduceScatter"):
        monkeypatch.setattr(f"mg.training.shards.{name}", lambda group: None)
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    parameters = [Parameter(Tensor(value), name=name) for name, value in values.items()]
    each = [Shards(parameters, Group.of(Runtime("cpu", rank, workers))) for rank in range(workers)]
    for index, (name, value) in enumerate(values.items()):
        parts = [shards.own[index].asnumpy() for shards in each]
        assert all(part.shape == parts[0].shape and (part.ndim > 1) == (value.ndim > 1) for part in parts)
        whole = np.concatenate([part.reshape(-1) for part in parts])
        np.testing.assert_array_equal(whole[: value.size], value.reshape(-1), err_msg=name)
        assert not whole[value.size :].any() and len(whole) - value.size < workers
    parameters[0].set_data(Tensor(2 * values["conv.weight"]))
    each[-1].take()
    state = each[-1].split({"adam_m.conv.weight": 2 * values["conv.weight"], "global_step": np.array([3])})
    assert state.keys() == {"adam_m.conv.weight.shard", "global_step"} and state["global_step"] == 3
    np.testing.assert_array_equal(each[-1].own[0].asnumpy(), state["adam_m.conv.weight.shard"])


@pytest.mark.parametrize("section", ["optim", "optim_discriminator"])
@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_optimizers_that_need_whole_parameters_are_refused(section, name):
    message = f"name is {name}; it must be none of lamb, muon with plugin zero2: their steps need whole parameters"
    with pytest.raises(ValueError, match=message):
        TrainConfig(csv_path="train.csv", plugin="zero2", **{section: OptimizerConfig(name=name)})
