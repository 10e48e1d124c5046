"""A checkpoint is there whole or not at all, whenever the run is killed; a run resumes from it exactly, or says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_steps import make, save, update

from mg.checkpoints import CheckpointError, read_state_dict
from mg.models import from_pretrained
from mg.training.checkpoint import list_checkpoints, load_checkpoint


def names(root: Path) -> list[str]:
    return [path.name for path in list_checkpoints(root)]


@pytest.mark.parametrize("config", [{}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "loss_scale": "dynamic"}])
def test_a_loaded_checkpoint_continues_like_the_run_that_wrote_it(tmp_path, config):
    model, step = make(**config)
    for seed in range(3):
        update(model, step, seed)
    path = save(tmp_path, 3, model, step, skipped=1)
    other_model, other = make(seed=1, **config)
    assert load_checkpoint(path, other_model, other) == {"step": 3, "skipped": 1}
    for seed in range(3, 6):
        assert update(other_model, other, seed) == update(model, step, seed)
    for found, wanted in zip(other.updater.parameters, step.updater.parameters):
        np.testing.assert_array_equal(found.asnumpy(), wanted.asnumpy())
    found, wanted = other.state(), step.state()
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_a_checkpoint_holds_the_averages_for_use_and_the_raw_weights_for_training(tmp_path):
    model, step = make(ema_decay=0.9)
    for seed in range(3):
        update(model, step, seed)
    raw = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    averages = step.updater.averaged()
    assert all(np.abs(raw[name] - averages[name]).max() > 0 for name in raw)
    path = save(tmp_path, 3, model, step)
    stored = read_state_dict(path / "model.safetensors")
    assert stored.keys() == raw.keys() == averages.keys()
    used = from_pretrained(path)
    fresh_model, fresh = make(seed=1, ema_decay=0.9)
    load_checkpoint(path, fresh_model, fresh)
    for name in raw:
        np.testing.assert_array_equal(stored[name], averages[name])
    for found, wanted in ((used, averages), (fresh_model, raw)):
        for parameter in found.get_parameters():
            np.testing.assert_array_equal(parameter.asnumpy(), wanted[parameter.name])
    for name, average in fresh.updater.averaged().items():
        np.testing.assert_array_equal(average, averages[name])


def test_the_newest_few_are_kept_by_number_not_by_name(tmp_path):
    model, step = make()
    for number in (999_998, 999_999, 1_000_000):
        save(tmp_path, number, model, step, keep=2)
    (tmp_path / "step_notes").mkdir()
    assert names(tmp_path) == ["step_999999", "step_1000000"]
    save(tmp_path, 1_000_001, model, step, keep=0)
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors"])
def test_a_write_that_fails_leaves_the_older_checkpoints(tmp_path, monkeypatch, file):
    model, step = make()
    for number in (1, 2):
        save(tmp_path, number, model, step, keep=2)
    replace = os.replace

    def full_disk(source, target):
        if Path(target).name == file:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 3, model, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    for path in list_checkpoints(tmp_path):
        load_checkpoint(path, *make())


def test_what_a_killed_run_left_is_removed_with_the_next_checkpoint(tmp_path):
    model, step = make()
    for leftover in (".step_000001.partial", ".step_000000.dropped"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    assert names(tmp_path) == []
    save(tmp_path, 1, model, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(ema_decay=0.9), "its optimizer, EMA or loss scale is not this run's"),
        (dict(loss_scale="dynamic"), "its optimizer, EMA or loss scale is not this run's"),
        (dict(z_channels=3), "its model is not this run's (z_channels is 2 there and 3 here)"),
    ],
)
def test_other_settings_than_the_checkpoints_are_an_error(tmp_path, settings, message):
    path = save(tmp_path, 1, *make())
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, *make(**settings))
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("file", ["state.json", "config.json", "state.safetensors", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_checkpoint_is_named(tmp_path, file, damage):
    path = save(tmp_path, 1, *make())
    content = (path / file).read_bytes()
    (path / file).unlink()
    if damage == "cut short":
        (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, *make())
    assert str(path) in str(error.value)


# Every operation on the file system that a save makes is a moment at which the process may die. The child below forks
# a process for each of them, which saves and is killed there with SIGKILL.
KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from small_steps import make, save, update
import mindspore as ms

root, keep = Path(sys.argv[1]), 2
model, step = make(ema_decay=0.9)
for number in (1, 2):
    update(model, step, number)
    save(root / "base", number, model, step, keep)
update(model, step, 3)
# A forked process has none of MindSpore's threads, so what it is to save is read before: the first save does so.
known, read = {}, ms.Tensor.asnumpy
def read_once(tensor):
    if id(tensor) not in known:
        known[id(tensor)] = tensor, read(tensor)
    return known[id(tensor)][1]
ms.Tensor.asnumpy = read_once
save(root / "base_of_3", 3, model, step, keep)
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
for moment in range(1000):
    folder = root / f"{moment:04d}"
    os.system(f"cp -r {root / 'base'} {folder}")
    child = os.fork()
    if child == 0:
        left = moment

        def die(event, arguments):
            global left
            if event in EVENTS and str(folder) in str(arguments[0]):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(die)
        save(folder, 3, model, step, keep)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
"""


def test_no_moment_at_which_a_run_is_killed_leaves_half_a_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", KILLED_EVERYWHERE, str(tmp_path)], env=environment, check=True, timeout=300)
    moments = sorted(path for path in tmp_path.iterdir() if not path.name.startswith("base"))
    assert len(moments) > 20
    found = [names(folder) for folder in moments]
    one, two, three = "step_000001", "step_000002", "step_000003"
    assert found[0] == [one, two] and found[-1] == [two, three]
    assert all(kept in ([one, two], [one, two, three], [two, three]) for kept in found)
    model, step = make(ema_decay=0.9)
    contents = {}
    for folder in moments:
        for path in list_checkpoints(folder):
            files = {file.name: file.read_bytes() for file in path.iterdir()}
            assert contents.setdefault(path.name, files) == files
        load_checkpoint(path, model, step)
        save(folder, 4, model, step, keep=2)  # the next run's
        assert sorted(path.name for path in folder.iterdir()) == [found[moments.index(folder)][-1], "step_000004"]


def test_the_state_is_json_that_others_can_read(tmp_path):
    path = save(tmp_path, 7, *make(), skipped=2)
    assert json.loads((path / "state.json").read_text()) == {"step": 7, "skipped": 2}
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "state.json",
        "state.safetensors",
    ]
