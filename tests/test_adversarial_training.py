"""Stage 2 trains both networks as its losses say, from the update on that its config says, and resumes to the bit."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from tiny_models import DC_AE, SMALL_HUNYUAN_VAE, SMALL_TEMPORAL_VAE
from training_runs import TwoConvs, read_records, short_run, stopped_at, write_data

from mg import runtime
from mg.checkpoints import CheckpointError, read_state_dict
from mg.losses.adversarial import (
    DiscriminatorLossConfig,
    GeneratorLossConfig,
    discriminator_loss,
    generator_loss,
)
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model, from_pretrained
from mg.models.discriminator import DISCRIMINATOR_FILE, DiscriminatorConfig, NLayerDiscriminator3D
from mg.training import trainer
from mg.training.optim import OptimConfig, OptimizerConfig
from mg.training.step import Adversary, TrainStep
from mg.training.trainer import TrainingError

LOSS = LossConfig(perceptual_weight=0, kl_weight=0.1, outlier_weight=10.0)
DISC_WEIGHT = 0.5
BOTH_MODES = pytest.mark.parametrize("mode", [pytest.param("graph", marks=pytest.mark.full), "pynative"])


def make_discriminator(dtype: str = "fp32", dropout: float = 0.3, logits: float = 30.0):
    """A small one, whose logits are spread wider than at its start by the factor `logits`."""
    discriminator = NLayerDiscriminator3D(DiscriminatorConfig(ndf=4, n_layers=2, dropout=dropout), dtype)
    weight = discriminator.main[-1].weight
    weight.set_data(weight * logits)
    return discriminator


def make(mode: str = "pynative", logits: float = 30.0, loss=LOSS, disc=None, gen_start=0, disc_start=0, **optim):
    """Model, step with an adversary, and its discriminator; all from the same seed."""
    runtime.setup("cpu", mode, seed=0)
    model, discriminator = TwoConvs({}), make_discriminator(logits=logits)
    adversary = Adversary(
        discriminator,
        GeneratorLossConfig(gen_start, DISC_WEIGHT),
        DiscriminatorLossConfig(disc_start),
        disc or OptimizerConfig(lr=1e-3),
    )
    config = OptimConfig(**{"lr": 1e-3, **optim})
    return model, TrainStep(model, AutoencoderLoss(loss), config, 20, adversary=adversary), discriminator


def batch(seed: int = 0, frames: int = 3):
    """Video, noise, and each clip's generator of the dropout's masks."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (2, 3, frames, 16, 16)).astype(np.float32)
    return (
        x,
        rng.standard_normal((2, 2, frames, 16, 16), dtype=np.float32),
        [np.random.default_rng([seed, clip]) for clip in (1, 2)],
    )


def norm(values) -> float:
    return math.sqrt(sum(float((np.asarray(value, np.float64) ** 2).sum()) for value in values))


def assert_close(found, wanted, tolerance: float = 2e-5):
    """Lists of gradients, relative to the global norm."""
    scale = norm(wanted)
    for value, right in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(value) - np.asarray(right)).max() <= tolerance * scale


def snapshot(step) -> dict:
    """All that an update may change, apart from the loss scales."""
    networks = [*step.updater.parameters, *step.discriminator.get_parameters()]
    values = step.state() | {p.name: p.asnumpy() for p in networks}
    return {name: value.copy() for name, value in values.items() if not name.endswith(("scale_value", "counter"))}


def assert_same(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


class ByHand:
    """The gradients of a batch, each loss for itself, and the reconstruction."""

    def __init__(self, model, discriminator, loss=LOSS):
        self.model, self.discriminator = model, discriminator
        self.whole, self.config = AutoencoderLoss(loss), loss
        self.parameters = ms.ParameterTuple(model.trainable_params())

    def draw(self, x, generators):
        return [tuple(map(Tensor, self.discriminator.draw_masks(x.shape, generators))) for _ in range(3)]

    def autoencoder(self, x, noise, masks):
        """Adaptive weight; gradients of all losses and of the generator loss."""

        def nll(x, noise):
            return ops.abs(x - self.model.forward(x, noise)[0]).sum() / (x.shape[0] * x.shape[2])

        def generator(x, noise):
            return -self.discriminator.forward(self.model.forward(x, noise)[0], masks)[0].mean()

        def whole(x, noise):
            y, z, mean, logvar = self.model.forward(x, noise)
            return self.whole(x, y, z, mean, logvar)[0]

        x, noise = Tensor(x), Tensor(noise)
        losses = [ms.grad(function, None, self.parameters)(x, noise) for function in (whole, generator, nll)]
        last = [p.name for p in self.parameters].index(self.model.last_conv.weight.name)
        weight = min(max(norm([losses[2][last]]) / (norm([losses[1][last]]) + 1e-4), 0.0), 1e4)
        return weight, losses[0], losses[1]

    def judge(self, x, y, real_masks, fake_masks):
        def loss(x, y):
            real, fake = (self.discriminator.forward(v, m)[0] for v, m in ((x, real_masks), (y, fake_masks)))
            return 0.5 * (ops.relu(1 - real).mean() + ops.relu(1 + fake).mean())

        parameters = ms.ParameterTuple(self.discriminator.trainable_params())
        return ms.value_and_grad(loss, None, parameters)(Tensor(x), y)


# One update.


@pytest.mark.parametrize(
    "mode, loss_scale, logits",
    [("graph", "dynamic", 0.5), ("pynative", "dynamic", 0.5), ("pynative", "dynamic", 30.0), ("pynative", "none", 0.5)],
)
def test_gradients_and_adaptive_weight_are_those_of_each_loss_taken_apart(mode, loss_scale, logits):
    """Reconstruction and generator loss alone are weighed: KL and outlier penalty, which act on the latents, are not.
    Where the generator's gradient is small the 1e-4 next to it counts, and must bear the loss scale too."""
    disc = OptimizerConfig(lr=1e-3, loss_scale=loss_scale, init_loss_scale=64.0)
    model, step, discriminator = make(mode, logits, disc=disc, loss_scale=loss_scale)
    x, noise, generators = batch()
    step.accumulate(x, noise, generators)
    scale = float(step.updater.loss_scale().asnumpy())
    assert scale == (1024 if loss_scale == "dynamic" else 1)
    report = dict(zip(step._compete.terms, step._reports[0][1].asnumpy().tolist()))

    runtime.setup("cpu", "pynative")
    by_hand = ByHand(model, discriminator)
    masks = by_hand.draw(x, batch()[2])
    weight, whole, generated = by_hand.autoencoder(x, noise, masks[0])
    if logits < 1:
        last = [g for p, g in zip(by_hand.parameters, generated) if p.name == model.last_conv.weight.name]
        assert 1e-4 / norm(last) > 5 * 2e-4
    assert 1 < weight < 1e4
    assert report["adaptive_weight"] == pytest.approx(weight, rel=2e-4)
    wanted = [a + DISC_WEIGHT * weight * b for a, b in zip(whole, generated)]
    assert norm(wanted) > 1.01 * norm(whole) or norm(wanted) < 0.99 * norm(whole)
    assert_close([g / scale for g in step.updater.gathered().values()], wanted, 1e-4)

    y = model.forward(Tensor(x), Tensor(noise))[0]
    value, gradients = by_hand.judge(x, y, *masks[1:])
    judged = step.discriminator_updater.gathered().values()
    assert_close([g / (64 if scale > 1 else 1) for g in judged], gradients, 1e-4)
    result = step.update()
    assert result.terms["disc"] == pytest.approx(float(value.asnumpy()), rel=1e-4)
    assert result.grad_norm == pytest.approx(norm(wanted), rel=1e-4)
    assert result.discriminator.grad_norm == pytest.approx(norm(gradients), rel=1e-4)
    generator_term = result.terms["gen"] * DISC_WEIGHT * weight
    without = result.terms["l1"] * 3 * 16 * 16 + 0.1 * result.terms["kl"] + 10 * result.terms["outlier"]
    assert result.loss == pytest.approx(without + generator_term, rel=1e-3)


@BOTH_MODES
def test_running_statistics_move_by_every_pass_of_an_update_in_its_order(mode):
    model, step, discriminator = make(mode)
    x, noise, generators = batch()
    runtime.setup("cpu", "pynative")
    y = model.forward(Tensor(x), Tensor(noise))[0]
    means, variances = np.zeros(8), np.ones(8)
    masks = ByHand(model, discriminator).draw(x, batch()[2])
    for video, drawn in zip((y, Tensor(x), y), masks):  # the generator's pass, then the discriminator's two
        statistics = discriminator.forward(video, drawn)[1]
        means = 0.9 * means + 0.1 * statistics[0].asnumpy()
        variances = 0.9 * variances + 0.1 * statistics[1].asnumpy()
    runtime.setup("cpu", mode)
    step.accumulate(x, noise, generators)
    assert (discriminator.main[3].running_mean.asnumpy() == 0).all()
    step.update()
    np.testing.assert_allclose(discriminator.main[3].running_mean.asnumpy(), means, rtol=0, atol=1e-6)
    np.testing.assert_allclose(discriminator.main[3].running_var.asnumpy(), variances, rtol=0, atol=1e-6)


def test_accumulated_gradients_are_the_mean_over_the_batches_for_both_networks():
    _, step, _ = make(accumulation=2)
    gradients = []
    for seeds in ((0,), (1,), (0, 1)):
        for seed in seeds:
            step.accumulate(*batch(seed))
        updaters = (step.updater, step.discriminator_updater)
        gradients.append([g for updater in updaters for g in updater.gathered().values()])
        for updater in updaters:
            updater.forget()
    assert_close(gradients[2], [a + b for a, b in zip(*gradients[:2])], 1e-6)  # half of each, as they were gathered


def test_the_generator_learns_to_please_a_frozen_discriminator():
    loss = LossConfig(perceptual_weight=0, kl_weight=0)
    _, step, discriminator = make(loss=loss, disc_start=100, lr=0.01)
    before = snapshot(step)
    x, noise, _ = batch()
    pleased = []
    for _ in range(8):
        step.accumulate(x, noise)
        result = step.update()
        assert result.discriminator is None and "disc" not in result.terms
        pleased.append(result.terms["gen"])
    assert pleased[-1] < pleased[0] - 0.1
    after = snapshot(step)
    for parameter in discriminator.trainable_params():
        np.testing.assert_array_equal(after[parameter.name], before[parameter.name])


def test_the_discriminator_learns_to_tell_the_reconstructions_of_a_frozen_generator():
    _, step, _ = make(lr=1e-12, disc=OptimizerConfig(lr=3e-3))
    x, noise, _ = batch()
    fooled, results = [], []
    for _ in range(12):
        step.accumulate(x, noise)
        results.append(step.update())
        fooled.append(results[-1].terms["disc"])
    assert fooled[-1] < fooled[0] - 0.1
    assert results[-1].terms["logits_real"] > results[-1].terms["logits_fake"]


def test_losses_of_logits_are_the_papers():
    rng = np.random.default_rng(0)
    real, fake = (3 * rng.standard_normal((2, 2, 1, 3, 4, 4))).astype(np.float32)
    hinge = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    vanilla = 0.5 * (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean())
    assert float(discriminator_loss(Tensor(real), Tensor(fake), "hinge").asnumpy()) == pytest.approx(hinge, rel=1e-5)
    assert float(discriminator_loss(Tensor(real), Tensor(fake), "vanilla").asnumpy()) == pytest.approx(
        vanilla, rel=1e-5
    )
    assert float(generator_loss(Tensor(fake)).asnumpy()) == pytest.approx(-fake.mean(), rel=1e-5)
    large = Tensor(np.float32([-1e4, 1e4]))
    assert float(discriminator_loss(large, large, "vanilla").asnumpy()) == pytest.approx(5e3)


def test_each_loss_starts_with_the_update_that_its_config_names():
    _, step, discriminator = make(gen_start=3, disc_start=2)
    runtime.setup("cpu", "pynative", seed=0)
    plain_model = TwoConvs({})
    plain = TrainStep(plain_model, AutoencoderLoss(LOSS), OptimConfig(lr=1e-3), 20)
    beginning = snapshot(step)
    logged = []
    for update in range(4):
        before = snapshot(step)
        step.accumulate(*batch(update))
        result = step.update()
        logged.append([name in result.terms for name in ("gen", "adaptive_weight", "disc", "logits_real")])
        after = snapshot(step)
        names = [p.name for p in discriminator.get_parameters()]
        assert all((after[name] == before[name]).all() for name in names) == (update < 2)
        plain.accumulate(*batch(update)[:2])
        if plain.update() and update < 3:
            for parameter in plain.updater.parameters:
                np.testing.assert_array_equal(parameter.asnumpy(), after[parameter.name])
    assert logged == [[False] * 4, [False] * 4, [False, False, True, True], [True] * 4]
    last = plain_model.last_conv.weight
    assert not (last.asnumpy() == after[last.name]).all() and beginning.keys() == after.keys()


@BOTH_MODES
def test_an_update_that_is_not_finite_changes_neither_network(mode):
    _, step, _ = make(mode, accumulation=2, ema_decay=0.9)
    step.accumulate(*batch(0))
    step.accumulate(*batch(1))
    step.update()
    before = snapshot(step)
    x, noise, generators = batch(2)
    x[0, 0, 0, 0, 0] = float("inf")
    step.accumulate(*batch(3))
    step.accumulate(x, noise, generators)
    result = step.update()
    assert not result.updated and not result.discriminator.updated
    assert_same(snapshot(step), before)
    step.accumulate(*batch(4))
    step.accumulate(*batch(5))
    result = step.update()
    assert result.updated and result.discriminator.updated and math.isfinite(result.loss)


def test_each_network_has_its_own_loss_scale_and_its_own_check():
    """A discriminator in fp16 whose gradients overflow under its scale is left out, and the autoencoder is not."""
    runtime.setup("cpu", "pynative", seed=0)
    model, discriminator = TwoConvs({}), make_discriminator("fp16")
    adversary = Adversary(discriminator, optim=OptimizerConfig(lr=1e-3, init_loss_scale=2.0**30))
    config = OptimConfig(lr=1e-3, init_loss_scale=16.0)
    step = TrainStep(model, AutoencoderLoss(LOSS), config, 20, "fp16", adversary=adversary)
    before = snapshot(step)
    step.accumulate(*batch())
    result = step.update()
    assert result.updated and result.loss_scale == 16
    assert not result.discriminator.updated and result.discriminator.loss_scale == 2.0**30
    assert float(step.discriminator_updater.loss_scale().asnumpy()) == 2.0**29
    after = snapshot(step)
    assert not (after[model.last_conv.weight.name] == before[model.last_conv.weight.name]).all()
    for parameter in discriminator.trainable_params():
        np.testing.assert_array_equal(after[parameter.name], before[parameter.name])


# Runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


ADVERSARY = (
    "--discriminator.ndf=4 --discriminator.n_layers=2 --optim_discriminator.lr=1e-3 --optim.ema_decay=0.9 "
    "--optim.accumulation=2 --data.image_ratio=0 --gen_loss_config.gen_start=2 --disc_loss_config.disc_start=1 "
    "--optim_discriminator.schedule=linear_decay --optim_discriminator.warmup_steps=2"
).split()


@pytest.fixture(scope="module")
def stage_1(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("stage_1") / "run"
    short_run(output, *data, "--max_steps=2", "--ckpt_save_steps=2")
    return output


@pytest.fixture(scope="module")
def stage_2(data, stage_1, tmp_path_factory):
    output = tmp_path_factory.mktemp("stage_2") / "run"
    options = [*data, *ADVERSARY, "--model.from_pretrained", stage_1 / "checkpoints" / "step_000002"]
    short_run(output, *options, "--max_steps=7", "--ckpt_save_steps=2")
    return output, options


def test_a_run_of_stage_2_logs_both_networks_and_keeps_the_discriminator(stage_2):
    output, _ = stage_2
    records = read_records(output)
    autoencoder = ["loss", "l1", "lpips", "kl", "outlier", "grad_norm", "lr", "loss_scale", "skipped"]
    disc = ["disc", "logits_real", "logits_fake", "disc_grad_norm", "disc_lr", "disc_loss_scale", "disc_skipped"]
    wanted = [{"step", *autoencoder}, {"step", *autoencoder, *disc}]
    wanted.append({*wanted[1], "gen", "adaptive_weight"})
    assert [set(record) for record in records] == wanted[:2] + wanted[2:] * 5
    rates = [record["disc_lr"] for record in records[1:]]
    assert rates == pytest.approx([5e-4, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4])  # of six updates: its own first is number 2
    assert {record["lr"] for record in records} == {0.01}
    checkpoint = output / "checkpoints" / "step_000007"
    discriminator = NLayerDiscriminator3D(DiscriminatorConfig(ndf=4, n_layers=2, from_pretrained=str(checkpoint)))
    assert np.abs(discriminator.main[3].running_mean.asnumpy()).max() > 0
    assert from_pretrained(checkpoint).name == "two_convs"


@pytest.mark.parametrize("weights", ["checkpoints/step_000002", "two_convs.ckpt"])
def test_stage_2_begins_with_what_stage_1_left(stage_1, data, tmp_path, monkeypatch, weights):
    begun = {}
    monkeypatch.setattr(trainer, "_updates", lambda task, *rest: begun.update(task.model.parameters_dict()) or iter(()))
    with pytest.raises(AttributeError):  # no generator, so nothing to close: the run ends before its first update
        short_run(tmp_path, *data, *ADVERSARY, "--model.from_pretrained", stage_1 / weights, "--max_steps=1")
    left = read_state_dict(stage_1 / "two_convs.ckpt")
    assert_same({name: p.asnumpy() for name, p in begun.items()}, left)


def test_a_resumed_run_of_stage_2_is_the_run_that_was_not_stopped(stage_2, data, tmp_path):
    whole, options = stage_2
    settings = [*options, "--max_steps=7", "--ckpt_save_steps=2"]
    with stopped_at(6):  # updates 5 and 6 are made again
        short_run(tmp_path, *settings)
    assert len(read_records(tmp_path)) == 6
    assert short_run(tmp_path, *settings, "--resume") == read_records(whole)
    for name in ("model", "discriminator", "state"):
        file = f"checkpoints/step_000007/{name}.safetensors"
        assert_same(read_state_dict(tmp_path / file), read_state_dict(whole / file))


def test_a_discriminator_may_begin_with_that_of_another_run(stage_2, data, tmp_path):
    output, _ = stage_2
    checkpoint = output / "checkpoints" / "step_000007"
    short_run(
        tmp_path, *data, *ADVERSARY, "--max_steps=1", f"--discriminator.from_pretrained={checkpoint}"
    )  # its first update is before disc_start
    found = read_state_dict(tmp_path / "checkpoints" / "step_000001" / DISCRIMINATOR_FILE)
    assert_same(found, read_state_dict(checkpoint / DISCRIMINATOR_FILE))


def test_resuming_the_other_stage_is_one_clear_line(stage_1, stage_2, data):
    for output, options, message in (
        (stage_1, ADVERSARY, "none there and one here"),
        (stage_2[0], ["--optim.ema_decay=0.9", "--optim.accumulation=2"], "one there and none here"),
    ):
        before = (output / "log.jsonl").read_bytes()
        with pytest.raises(CheckpointError, match=f"its discriminator is not this run's .{message}.; resume with"):
            short_run(output, *data, *options, "--resume", "--max_steps=9")
        assert (output / "log.jsonl").read_bytes() == before


def test_too_many_updates_of_the_discriminator_left_out_end_the_run(tmp_path, data):
    overflowing = "--optim_discriminator.loss_scale=dynamic --optim_discriminator.init_loss_scale=1e38".split()
    with pytest.raises(TrainingError, match="the discriminator's loss or its gradient was not finite in 3 updates"):
        short_run(tmp_path, *data, *ADVERSARY, *overflowing, "--optim_discriminator.max_skipped=3", "--max_steps=9")
    records = read_records(tmp_path)
    assert [record.get("disc_skipped", 0) for record in records] == [0, 1, 2, 3]
    assert [record["skipped"] for record in records] == [0] * 4


# Video DC-AE.


def dc_ae_gradients(mode: str, dtype: str, checkpointed: bool = False, output: bool = True):
    """Loss and gradients of one clip, with a discriminator."""
    runtime.setup("cpu", mode, seed=0)
    model = create_model("dc_ae", dtype=dtype, **DC_AE)
    rng = np.random.default_rng(0)
    for parameter in model.trainable_params():  # gains start near zero, which would hide the branches' gradients
        noise = (0.3 if parameter.ndim == 1 else 0.02) * rng.uniform(0, 1, parameter.shape)
        parameter.set_data(Tensor((parameter.asnumpy() + noise).astype(np.float32)))
    if checkpointed:
        model.recompute_activations(output=output)
    loss = AutoencoderLoss(LossConfig(perceptual_weight=0, kl_weight=0))
    step = TrainStep(model, loss, OptimConfig(lr=1e-3), 20, adversary=Adversary(make_discriminator()))
    x = rng.uniform(-1, 1, (1, 3, 4, 32, 32)).astype(np.float32)
    step.accumulate(x, np.zeros(model.latent_shape(x.shape), np.float32), [np.random.default_rng(0)])
    return step._reports[0][1].asnumpy(), list(step.updater.gathered().values())


@pytest.mark.full
@pytest.mark.parametrize("mode, dtype, output", [("graph", "bf16", False), ("pynative", "fp32", True)])
def test_gradient_checkpointing_changes_no_gradient_of_dc_ae(mode, dtype, output):
    report, gradients = dc_ae_gradients("pynative", dtype)  # a graph without it would take as long again to compile
    scale = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)
    found, recomputed = dc_ae_gradients(mode, dtype, True, output)
    assert found == pytest.approx(report, rel=1e-5)
    for value, wanted in zip(recomputed, gradients, strict=True):
        assert np.abs(value - wanted).max() <= 5e-5 * scale


def test_a_kl_weight_for_a_model_without_posterior_is_an_error_that_names_the_key(tmp_path, data):
    sizes = [f"--model.config.{key}={value}" for key, value in DC_AE.items()]
    with pytest.raises(TrainingError, match="loss.kl_weight is 1e-06; it must be 0, dc_ae has no posterior"):
        short_run(tmp_path, *data, "--model.name=dc_ae", *sizes, "--loss.kl_weight=1e-6")


# The other models.


@pytest.mark.parametrize(
    "name, config",
    [
        (
            "tae",
            {
                "ch": 32,
                "ch_mult": [1, 1],
                "num_res_blocks": 1,
                "z_channels": 2,
                "temporal_downsample_level": [0],
                "temporal_upsample_level": [1],
            },
        ),
        ("image_vae", {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 2}),
        ("temporal_vae", {**SMALL_TEMPORAL_VAE, "micro_frame_size": 3}),
        ("hunyuan_vae", SMALL_HUNYUAN_VAE),
    ],
)
def test_every_model_can_be_trained_against_a_discriminator(name, config):
    runtime.setup("cpu", "pynative", seed=0)
    model, rng = create_model(name, **config), np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1, 3, 4, 18, 16)).astype(np.float32)
    noise = np.zeros(model.latent_shape(x.shape), np.float32)
    h = model.features(model.latents(Tensor(x), Tensor(noise))["code"], x.shape[2])
    np.testing.assert_allclose(model.picture(h, x.shape).asnumpy(), model(Tensor(x)).asnumpy(), atol=1e-5)

    plain, against = (
        TrainStep(model, AutoencoderLoss(LOSS), OptimConfig(), 20, adversary=adversary)
        for adversary in (None, Adversary(make_discriminator(dropout=0), GeneratorLossConfig(0, DISC_WEIGHT)))
    )
    for step in (plain, against):
        step.accumulate(x, noise)
    weight = against._reports[0][1].asnumpy()[-1]
    alone, both = (step.updater.gathered()[model.last_conv.weight.name] for step in (plain, against))
    # By its definition the weight makes the generator's share at the last convolution disc_weight of the other's.
    assert 0 < weight < 1e4
    assert np.linalg.norm(both - alone) == pytest.approx(DISC_WEIGHT * np.linalg.norm(alone), rel=0.01)
