"""The reconstruction loss is the formula that its docstring gives, term by term, and its weights are switches."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mg.checkpoints import write_state_dict
from mg.losses.lpips import LPIPS, LPIPSWeightsError
from mg.losses.reconstruction import AutoencoderLoss, LossConfig

SHAPE = (2, 3, 5, 16, 16)  # (B, C, T, H, W)
LATENT = (2, 4, 2, 6, 5)  # (B, z, t, h, w)


def inputs():
    """x, y, z, mean, logvar; two latents stand far out of their frames."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    z, mean, logvar = rng.standard_normal((3, *LATENT)).astype(np.float32)
    z[0, :, 0, 2, 3] += 30
    z[1, 2, 1, 0, 0] -= 50
    return x, y, z, mean, logvar


def compute(**config):
    loss = AutoencoderLoss(LossConfig(**{"perceptual_weight": 0, "kl_weight": 0, **config}))
    value, terms = loss(*map(Tensor, inputs()))
    return float(value.asnumpy()), dict(zip(loss.terms, terms.asnumpy().tolist()))


def numpy_outlier(z, reach, per_channel):
    z = z.astype(np.float64)
    excess = []
    for b in range(z.shape[0]):
        for t in range(z.shape[2]):
            frame = z[b, :, t]  # (z, h, w)
            centred = frame - frame.mean((1, 2), keepdims=True)
            std = frame.std((1, 2), keepdims=True)
            if per_channel:
                excess.append(np.maximum(np.abs(centred) - reach * std, 0))
            else:
                norm = np.sqrt((centred**2).sum(0))
                excess.append(np.maximum(norm - reach * np.sqrt((std**2).sum()), 0))
    return np.mean(excess)


@pytest.fixture
def lpips_file(tmp_path, monkeypatch):
    """A weight file for LPIPS with random weights."""
    with monkeypatch.context() as patch:
        patch.setattr(LPIPS, "_load", lambda *_: None)
        shapes = {name: parameter.shape for name, parameter in LPIPS("vgg", "").parameters_dict().items()}
    rng = np.random.default_rng(1)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) == 4 else 100
        values = rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        tensors[name] = (np.abs(values) if name.startswith("linear") else values).astype(np.float32)
    write_state_dict(tmp_path / "lpips.safetensors", tensors)
    return str(tmp_path / "lpips.safetensors")


def test_l1_is_summed_over_a_frame_and_averaged_over_frames(mode):
    x, y, *_ = inputs()
    loss, terms = compute()
    assert loss == pytest.approx(np.abs(x - y).sum() / (2 * 5), rel=1e-5)
    assert terms["l1"] == pytest.approx(np.abs(x - y).mean(), rel=1e-5)
    assert terms["lpips"] == terms["outlier"] == 0


def test_kl_is_summed_over_a_frame_and_averaged_over_frames(mode):
    *_, mean, logvar = inputs()
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum() / (2 * 5)
    plain, terms = compute()
    loss, _ = compute(kl_weight=0.25)
    assert terms["kl"] == pytest.approx(kl, rel=1e-5)
    assert loss - plain == pytest.approx(0.25 * kl, rel=1e-3)


def test_kl_of_a_standard_normal_is_nothing():
    loss = AutoencoderLoss(LossConfig(perceptual_weight=0))
    x, y, z, *_ = map(Tensor, inputs())
    zeros = ms.ops.zeros(LATENT)
    assert loss(x, y, z, zeros, zeros)[1].asnumpy()[2] == 0


def test_without_a_posterior_there_is_no_kl_and_the_rest_is_the_same(mode):
    x, y, z, mean, logvar = map(Tensor, inputs())
    loss = AutoencoderLoss(LossConfig(perceptual_weight=0, kl_weight=0, outlier_weight=1e5))
    with_posterior, without = loss(x, y, z, mean, logvar), loss(x, y, z, z, None)
    assert float(without[0].asnumpy()) == pytest.approx(float(with_posterior[0].asnumpy()), rel=1e-6)
    assert without[1].asnumpy()[2] == 0 and with_posterior[1].asnumpy()[2] > 0


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reach", [1.0, 3.0])
def test_outliers_are_penalised_as_the_paper_or_as_mindone_writes(mode, per_channel, reach):
    penalty = numpy_outlier(inputs()[2], reach, per_channel)
    assert penalty > 0.1
    plain, terms = compute()
    assert terms["outlier"] == 0
    loss, terms = compute(outlier_weight=1e5, outlier_range=reach, outlier_per_channel=per_channel)
    assert terms["outlier"] == pytest.approx(penalty, rel=1e-5)
    assert loss - plain == pytest.approx(1e5 * penalty, rel=1e-3)


@pytest.mark.parametrize("per_channel", [False, True])
def test_latents_without_any_spread_have_a_finite_gradient(per_channel):
    loss = AutoencoderLoss(LossConfig(perceptual_weight=0, outlier_weight=1, outlier_per_channel=per_channel))
    x, y, _, mean, logvar = map(Tensor, inputs())
    gradient = ms.grad(lambda z: loss(x, y, z, mean, logvar)[0])(ms.ops.ones(LATENT))
    assert np.isfinite(gradient.asnumpy()).all()


def test_lpips_counts_for_every_value_of_a_frame(lpips_file):
    x, y, *_ = inputs()
    frames = [Tensor(v.transpose(0, 2, 1, 3, 4).reshape(10, 3, 16, 16)) for v in (x, y)]
    distance = float(LPIPS("vgg", lpips_file)(*frames).mean().asnumpy())
    assert distance > 0.01
    plain, _ = compute()
    loss, terms = compute(perceptual_weight=0.5, lpips_weights=lpips_file)
    assert terms["lpips"] == pytest.approx(distance, rel=1e-5)
    assert loss - plain == pytest.approx(0.5 * distance * 3 * 16 * 16, rel=1e-4)


def test_the_loss_trains_nothing_of_lpips(lpips_file):
    assert AutoencoderLoss(LossConfig(lpips_weights=lpips_file)).trainable_params() == []


def test_missing_lpips_weights_name_the_tool_and_the_switch(tmp_path):
    with pytest.raises(LPIPSWeightsError) as error:
        AutoencoderLoss(LossConfig(lpips_weights=str(tmp_path / "none.safetensors")))
    for part in ("none.safetensors", "tools/convert_lpips.py", "--loss.perceptual_weight 0"):
        assert part in str(error.value)
    AutoencoderLoss(LossConfig(lpips_weights=str(tmp_path / "none.safetensors"), perceptual_weight=0))


@pytest.mark.parametrize("name", ["perceptual_weight", "kl_weight", "outlier_weight", "outlier_range"])
def test_a_negative_weight_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least 0"):
        LossConfig(**{name: -1})
