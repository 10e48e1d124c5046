"""The autoencoder's loss is the formula that its docstring gives, term by term, and its weights are switches."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mg import runtime
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


def two_stages(frames: int = SHAPE[2]):
    """code and target of a model of two stages (B, z, T, h, w)"""
    shape = (*LATENT[:2], frames, *LATENT[3:])
    return np.random.default_rng(2).standard_normal((2, *shape)).astype(np.float32)


def evaluate(config: dict, *values):
    """Loss and terms of arrays, or None, in the order of the loss' inputs."""
    loss = AutoencoderLoss(LossConfig(**{"perceptual_weight": 0, "kl_weight": 0, **config}))
    value, terms = loss(*(None if v is None else Tensor(v) for v in values))
    return float(value.asnumpy()), dict(zip(loss.terms, terms.asnumpy().tolist(), strict=True))


def compute(**config):
    return evaluate(config, *inputs())


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


def test_the_squared_error_can_replace_l1():
    x, y, *_ = inputs()
    loss, terms = compute(pixel_error="l2")
    assert loss == pytest.approx(((x - y) ** 2).sum() / (2 * 5), rel=1e-5)
    assert terms["l2"] == pytest.approx(((x - y) ** 2).mean(), rel=1e-5) and "l1" not in terms


def test_kl_is_summed_over_a_frame_and_averaged_over_frames(mode):
    *_, mean, logvar = inputs()
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum() / (2 * 5)
    plain, terms = compute()
    loss, _ = compute(kl_weight=0.25)
    assert terms["kl"] == pytest.approx(kl, rel=1e-5)
    assert loss - plain == pytest.approx(0.25 * kl, rel=1e-3)


def test_kl_of_a_standard_normal_is_zero():
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
    for part in ("none.safetensors", "mg-convert-lpips", "--loss.perceptual_weight 0"):
        assert part in str(error.value)
    AutoencoderLoss(LossConfig(lpips_weights=str(tmp_path / "none.safetensors"), perceptual_weight=0))


# Models of two stages.


def test_the_distance_of_first_latents_is_summed_over_a_frame_and_averaged_over_frames(mode):
    code, target = two_stages()
    wanted = np.abs(target - code).sum() / (2 * 5)
    plain, terms = compute()
    assert "latent" not in terms
    loss, terms = evaluate({"latent_weight": 0.5}, *inputs(), code, target)
    assert terms["latent"] == pytest.approx(wanted, rel=1e-5) and terms["identity"] == 0
    assert loss - plain == pytest.approx(0.5 * wanted, rel=1e-4)


@pytest.mark.parametrize("valid", [None, [0, 0, 0, 1]])
def test_an_image_keeps_its_first_latents_even_after_frames_that_do_not_count(mode, valid):
    x, y, z, mean, logvar = inputs()
    frames = len(valid or [1])
    code, target = two_stages(frames)
    z, mean, logvar = (v[:, :, :1] for v in (z, mean, logvar))
    values = (x[:, :, :frames], y[:, :, :frames], z, mean, logvar, code, target)
    values += (None if valid is None else np.float32(valid),)
    wanted = np.abs(target[:, :, -1:] - z).sum() / 2
    loss, terms = evaluate({"identity_weight": 0.5, "pixel_weight": 0}, *values)
    assert terms["identity"] == pytest.approx(wanted, rel=1e-5) and terms["latent"] == 0
    assert loss == pytest.approx(0.5 * wanted, rel=1e-5)


@pytest.mark.parametrize("valid", [None, [1, 1, 1, 1], [0, 0, 1, 1]])
def test_a_video_need_not_keep_its_first_latents(valid):
    x, y, z, mean, logvar = inputs()
    code, target = two_stages(4)
    values = (x[:, :, :4], y[:, :, :4], z[:, :, :1], mean[:, :, :1], logvar[:, :, :1], code, target)
    values += (None if valid is None else np.float32(valid),)
    assert evaluate({"identity_weight": 1.0}, *values)[1]["identity"] == 0
    short, terms = evaluate({"identity_weight": 1.0}, *inputs(), *two_stages())
    assert terms["identity"] == 0 and short == compute()[0]


def test_an_image_cannot_keep_latents_of_other_channels():
    x, y, z, mean, logvar = (v[:, :, :1] for v in inputs())
    code, target = (v[:, :3] for v in two_stages(1))
    with pytest.raises(ValueError, match="identity_weight must be 0: .* have 3 channels, the second's 4"):
        evaluate({"identity_weight": 1.0}, x, y, z, mean, logvar, code, target)


def test_the_pixels_weight_is_of_l1_and_lpips_together(lpips_file):
    settings = {"perceptual_weight": 0.5, "lpips_weights": lpips_file}
    whole, terms = compute(**settings)
    half, same = compute(**settings, pixel_weight=0.5)
    assert half == pytest.approx(whole / 2, rel=1e-6) and same == terms


def test_without_pixels_there_is_no_reconstruction_and_no_lpips(mode, tmp_path):
    x, _, *latents = inputs()
    missing = {"perceptual_weight": 1.0, "lpips_weights": str(tmp_path / "none.safetensors")}
    loss, terms = evaluate({**missing, "pixel_weight": 0, "latent_weight": 1.0}, x, None, *latents, *two_stages())
    assert list(terms) == ["kl", "outlier", "latent", "identity"]
    assert loss == pytest.approx(terms["latent"], rel=1e-6)


def test_kl_may_be_summed_over_a_clip():
    frame, terms = compute(kl_weight=1.0)
    clip, per_clip = compute(kl_weight=1.0, kl_per_clip=True)
    assert per_clip["kl"] == pytest.approx(5 * terms["kl"], rel=1e-5)
    assert clip - frame == pytest.approx(4 * terms["kl"], rel=1e-4)


@pytest.mark.parametrize("mode, kl_per_clip", [("graph", True), ("pynative", True), ("pynative", False)])
def test_frames_that_do_not_count_change_nothing(mode, lpips_file, kl_per_clip):
    runtime.setup("cpu", mode, seed=0)
    config = dict(
        perceptual_weight=0.5,
        lpips_weights=lpips_file,
        kl_weight=0.1,
        kl_per_clip=kl_per_clip,
        outlier_weight=1e3,
        latent_weight=0.3,
        pixel_weight=0.7,
    )
    x, y, *latents = inputs()
    code, target = two_stages()
    kept, valid = [0, 1, 4], np.float32([1, 1, 0, 0, 1])
    wanted, terms = evaluate(config, x[:, :, kept], y[:, :, kept], *latents, code[:, :, kept], target[:, :, kept])
    loss, found = evaluate(config, x, y, *latents, code, target, valid)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert found == pytest.approx(terms, rel=1e-5) and min(terms[name] for name in terms if name != "identity") > 0


@pytest.mark.parametrize("detached", [True, False])
def test_the_latents_that_are_compared_with_may_learn_too(detached):
    config = LossConfig(pixel_weight=0, kl_weight=0, latent_weight=1.0, detach_latents=detached)
    loss = AutoencoderLoss(config)
    x, _, z, mean, logvar = map(Tensor, inputs())
    code, target = map(Tensor, two_stages())
    to_code, to_target = ms.grad(lambda c, t: loss(x, None, z, mean, logvar, c, t)[0], (0, 1))(code, target)
    assert np.abs(to_code.asnumpy()).max() > 0
    assert (np.abs(to_target.asnumpy()).max() > 0) == (not detached)


WEIGHTS = "pixel_weight perceptual_weight kl_weight outlier_weight outlier_range latent_weight identity_weight".split()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_negative_weight_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least 0"):
        LossConfig(**{name: -1})
