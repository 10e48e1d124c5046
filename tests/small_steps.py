"""The training step of a model of two convolutions, its updates and its checkpoints."""

from pathlib import Path

import mindspore as ms
import numpy as np
from training_runs import TwoConvs

from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.training.checkpoint import save_checkpoint
from mg.training.optim import OptimConfig
from mg.training.step import TrainStep


def make(z_channels: int = 2, dtype: str = "fp32", seed: int = 0, **config):
    ms.set_seed(seed)
    model = TwoConvs({"z_channels": z_channels})
    loss = AutoencoderLoss(LossConfig(perceptual_weight=0))
    return model, TrainStep(model, loss, OptimConfig(**{"lr": 0.01, **config}), 10, dtype)


def update(model, step, seed: int):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (1, 3, 2, 8, 8)).astype(np.float32)
    step.accumulate(x, rng.standard_normal(model.latent_shape(x.shape), dtype=np.float32))
    return step.update()


def save(root: Path, number: int, model, step, keep: int = 0, **run) -> Path:
    return save_checkpoint(root, model, step, {"step": number, **run}, keep)
