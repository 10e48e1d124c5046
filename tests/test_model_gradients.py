"""A model's gradients are the same in graph mode and in PyNative, and with activations recomputed; nearly so in bf16.

(The TAE's: tests/test_training_step.py. Video DC-AE's against a discriminator: tests/test_adversarial_training.py.)
"""

import functools

import numpy as np
import pytest
from lpips_weights import write_random_weights
from mindspore import Tensor
from tiny_models import DC_AE, IMAGE_VAE, SMALL_HUNYUAN_VAE, SMALL_TEMPORAL_VAE

from mg import runtime
from mg.losses.lpips import LPIPS
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model
from mg.training.optim import OptimConfig
from mg.training.step import TrainStep

# Config, every term of its loss, and a clip: of one chunk and a half, and one that is padded.
CASES = {
    "temporal_vae": (
        {**SMALL_TEMPORAL_VAE, "micro_frame_size": 3},
        dict(kl_weight=1e-3, latent_weight=1, detach_latents=False),
        (1, 3, 4, 4, 4),
    ),
    "hunyuan_vae": (SMALL_HUNYUAN_VAE, dict(kl_weight=1e-3), (1, 3, 4, 4, 3)),
    "dc_ae": (DC_AE, dict(kl_weight=0), (1, 3, 3, 32, 30)),
    "image_vae": (IMAGE_VAE, dict(kl_weight=1e-3), (1, 3, 2, 4, 3)),
}


def gradients(name: str, mode: str, dtype: str = "fp32", recompute: bool = False) -> list[np.ndarray]:
    """Those of a training step."""
    config, loss, shape = CASES[name]
    runtime.setup("cpu", mode, seed=0)
    model = create_model(name, dtype=dtype, use_recompute=recompute, **config)
    rng = np.random.default_rng(0)
    for p in model.get_parameters():
        p.set_data(p + Tensor(rng.normal(0, 0.05, p.shape).astype(np.float32)))  # none is zero
    step = TrainStep(model, AutoencoderLoss(LossConfig(perceptual_weight=0, **loss)), OptimConfig(), 1)
    x = rng.uniform(-1, 1, shape).astype(np.float32)
    step.accumulate(x, rng.standard_normal(model.latent_shape(x.shape), dtype=np.float32))
    return list(step.updater.gathered().values())


@functools.cache
def plain_gradients(name: str) -> list[np.ndarray]:
    found = gradients(name, "pynative")
    assert all(np.abs(gradient).max() > 0 for gradient in found)
    return found


WAYS = [("graph", "fp32", False, 5e-5), ("graph", "fp32", True, 5e-5)]
WAYS += [("pynative", "fp32", True, 5e-5), ("pynative", "bf16", False, 0.1)]
QUICK = "image_vae"  # to compile


@pytest.mark.parametrize(
    "name, mode, dtype, recompute, bound",
    [
        pytest.param(name, *way, marks=[pytest.mark.full] * (way[0] == "graph" and (name != QUICK or way[2])))
        for name in CASES
        for way in WAYS
    ],
)
def test_gradients_are_the_same_however_they_come(name, mode, dtype, recompute, bound):
    plain = plain_gradients(name)
    scale = np.sqrt(sum(np.square(gradient).sum() for gradient in plain))
    found = gradients(name, mode, dtype, recompute)
    assert max(np.abs(some - wanted).max() for some, wanted in zip(found, plain, strict=True)) < bound * scale


@pytest.mark.full
def test_gradients_compile_after_a_graph_of_lpips(tmp_path):
    """As behind a benchmark in one process: `+=` of a tensor in that graph was enough to break MindSpore's compiler."""
    runtime.setup("cpu", "graph", seed=0)
    lpips = LPIPS("alex", write_random_weights(tmp_path / "alex.safetensors"))
    x = Tensor(np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32))
    assert float(lpips(x, -x).asnumpy().item()) > 0
    assert all(np.isfinite(gradient).all() for gradient in gradients("image_vae", "graph"))
