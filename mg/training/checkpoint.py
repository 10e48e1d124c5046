"""Checkpoints of a run: a folder each, there whole or not at all, the newest few kept.

    step_000100/
      model.safetensors, config.json    what `from_pretrained` reads; the moving average where the run keeps one
      state.safetensors, state.json     what an exact resume needs besides

A folder is filled under a hidden name and renamed when all of it is on disk; one that is dropped is renamed first.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from mindspore import Parameter, Tensor

from mg.checkpoints import CheckpointError, read_state_dict, write_state_dict
from mg.models.autoencoder import VideoAutoencoder
from mg.training.step import TrainStep

_logger = logging.getLogger(__name__)


def save_checkpoint(root: Path, step: int, model: VideoAutoencoder, train_step: TrainStep, run: dict, keep: int) -> Path:
    """Write the checkpoint of `step` below `root` and drop all but the newest `keep` (0 keeps all).

    Args:
        run: JSON values that the loop wants back.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    final, partial = root / f"step_{step:06d}", root / f".step_{step:06d}.partial"
    partial.mkdir()
    state = _arrays(train_step.state().values())
    weights = {}
    if train_step.averages:
        weights = {p.name: a.asnumpy() for p, a in zip(train_step.parameters, train_step.averages)}
        state |= {f"parameters.{p.name}": p.asnumpy() for p in train_step.parameters}
    model.save_pretrained(partial, weights)
    write_state_dict(partial / "state.safetensors", state)
    (partial / "state.json").write_text(json.dumps({"step": step, **run}))
    _sync(partial / "state.json")
    _sync(partial)
    if final.exists():
        _drop(final)
    os.rename(partial, final)
    _sync(root)
    for old in list_checkpoints(root)[: -keep or None] if keep else []:
        _drop(old)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints below `root`, the oldest first."""
    return sorted(path for path in root.glob("step_*") if path.is_dir())


def load_checkpoint(path: Path, model: VideoAutoencoder, train_step: TrainStep) -> dict:
    """Put model and training back where they were at `path`; returns what `run` held, and `step`.

    Raises:
        CheckpointError: the files are not those of a run with this model and these settings.
    """
    try:
        run = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be resumed, its state.json is missing or broken ({error})") from error
    state = read_state_dict(path / "state.safetensors")
    model.load_weights(path / "model.safetensors")
    wanted = dict(train_step.state())
    if train_step.averages:
        wanted |= {f"parameters.{p.name}": p for p in train_step.parameters}
    if state.keys() != wanted.keys():
        odd = sorted(state.keys() ^ wanted.keys())
        raise CheckpointError(
            f"{path}: its optimizer, EMA or loss scale is not this run's ({len(odd)} names differ, e.g. {odd[0]}); "
            "resume with the settings that it was trained with"
        )
    for name, parameter in wanted.items():
        if tuple(state[name].shape) != tuple(parameter.shape):
            raise CheckpointError(f"{path}: {name} has shape {state[name].shape}, this run's has {parameter.shape}")
        parameter.set_data(Tensor(state[name], parameter.dtype))
    return run


def _arrays(parameters: Iterable[Parameter]) -> dict:
    return {p.name: p.asnumpy() for p in parameters}


def _drop(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.dropped")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def _remove_leftovers(root: Path) -> None:
    for path in [*root.glob(".step_*.partial"), *root.glob(".step_*.dropped")]:
        _logger.info("removing %s, left by a run that was killed", path)
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
