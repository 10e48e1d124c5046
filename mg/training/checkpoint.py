"""Checkpoints of a run: one folder each, written atomically; only the newest few are kept.

    step_000100/
      model.safetensors, config.json    what `from_pretrained` reads; the moving average if the run keeps one
      discriminator.safetensors         in adversarial training: what `discriminator.from_pretrained` reads
      state.safetensors, state.json     the rest of what an exact resume needs

A folder is filled under a hidden name and renamed once all of it is on disk; before deletion it is renamed too.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from mindspore import Parameter, Tensor

from mg.checkpoints import CheckpointError, atomic_write, read_config, read_state_dict, sync, write_state_dict
from mg.models.discriminator import DISCRIMINATOR_FILE
from mg.models.stored import StoredModel
from mg.training.step import Step

_logger = logging.getLogger(__name__)

_EMA = "ema."  # prefix of the moving averages' names in a step's state


def save_checkpoint(root: Path, model: StoredModel, train_step: Step, run: dict, keep: int) -> Path:
    """Write a checkpoint in `root` and delete all but the newest `keep` (0 keeps all).

    If workers shard the step's state, the others must call `train_step.state()` once meanwhile.

    Args:
        run: JSON values for `load_checkpoint` to return; its `step`, the updates done, names the folder.

    Raises:
        OSError: it cannot be written; the older checkpoints are still there.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    final = root / f"step_{run['step']:06d}"
    partial = final.with_name(f".{final.name}.partial")
    partial.mkdir()
    try:
        state = train_step.state()
        averages = {name[len(_EMA) :]: values for name, values in state.items() if name.startswith(_EMA)}
        model.save_pretrained(partial, averages)
        if train_step.discriminator is not None:
            weights = {p.name: p.asnumpy() for p in train_step.discriminator.get_parameters()}
            write_state_dict(partial / DISCRIMINATOR_FILE, weights)
        raw = {name: p.asnumpy() for name, p in _raw_parameters(train_step).items()}
        write_state_dict(partial / "state.safetensors", state | raw)
        with atomic_write(partial / "state.json") as file:
            file.write_text(json.dumps(run))
        sync(partial)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(root)
    for old in list_checkpoints(root)[: -keep or None] if keep else []:
        hidden = old.with_name(f".{old.name}.dropped")
        os.rename(old, hidden)
        shutil.rmtree(hidden)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest first."""
    found = ((path, re.fullmatch(r"step_(\d+)", path.name)) for path in root.glob("step_*"))
    steps = {path: int(match[1]) for path, match in found if match}
    return sorted(steps, key=steps.__getitem__)


def read_run(path: Path) -> dict:
    """The `run` that was saved with the checkpoint at `path`.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be resumed, its state.json is missing or broken ({error})") from error


def load_checkpoint(path: Path, model: StoredModel, train_step: Step) -> dict:
    """Restore the model and training state from `path`; returns the saved `run`.

    Raises:
        CheckpointError: the files are not from a run with these networks and settings.
    """
    run = read_run(path)
    ours = {"model": model.name, **model.config}
    for key, value in read_config(path / "config.json").items():
        if value != ours.get(key):
            raise CheckpointError(
                f"{path}: its model is not this run's ({key} is {value} there and {ours.get(key)} here); "
                "resume with the settings that it was trained with"
            )
    if (path / DISCRIMINATOR_FILE).exists() != (train_step.discriminator is not None):
        there, here = ("one", "none") if train_step.discriminator is None else ("none", "one")
        raise CheckpointError(
            f"{path}: its discriminator is not this run's ({there} there and {here} here); resume with the settings "
            "that it was trained with, or start a new stage from it: --model.from_pretrained, in another output_path"
        )
    model.load_weights(path / "model.safetensors")
    if train_step.discriminator is not None:
        train_step.discriminator.load_weights(path)
    raw = _raw_parameters(train_step)
    state, wanted = read_state_dict(path / "state.safetensors"), train_step.state() | raw
    if state.keys() != wanted.keys():
        odd = sorted(state.keys() ^ wanted.keys())
        raise CheckpointError(
            f"{path}: its optimizer, EMA or loss scale is not this run's ({len(odd)} names differ, e.g. {odd[0]}); "
            "resume with the settings that it was trained with"
        )
    for name, value in wanted.items():
        if tuple(state[name].shape) != tuple(value.shape):
            raise CheckpointError(f"{path}: {name} has shape {state[name].shape}, this run's has {value.shape}")
    for name, parameter in raw.items():
        parameter.set_data(Tensor(state[name], parameter.dtype))
    train_step.load_state(state)
    train_step.done = run["step"]
    return run


def _raw_parameters(train_step: Step) -> dict[str, Parameter]:
    """The model's own parameters, if model.safetensors holds the moving averages instead."""
    updater = train_step.updater
    return {f"parameters.{p.name}": p for p in updater.parameters} if updater.averages else {}


def _remove_leftovers(root: Path) -> None:
    for path in [*root.glob(".step_*.partial"), *root.glob(".step_*.dropped")]:
        _logger.info("removing %s, left by a killed run", path)
        shutil.rmtree(path)
