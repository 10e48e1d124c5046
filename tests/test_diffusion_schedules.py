"""Schedules keep what they promise, whatever the network: their tables, guidance, frames that are given, noise and
losses. What they make of the originals' networks is in test_diffusion_parity.py."""

import json
import math
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn, ops

from mg import runtime
from mg.diffusion.schedules import SampleNoise, create_schedule, timestep_transform
from mg.diffusion.schedules.tables import DiffusionTables, noise_betas, respaced

DATA = Path(__file__).parent / "data" / "generation"
SHAPE = (2, 4, 3, 5, 6)  # (B, C, T, H, W)
IDDPM = dict(num_sampling_steps=10, cfg_scale=3.0)
RFLOW = dict(num_sampling_steps=10, cfg_scale=3.0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Recorder:
    """A network that keeps what it is given, and answers by `answer`, an array or a function of x and t."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, x, t, **inputs):
        self.calls.append({"x": x.asnumpy(), "t": t.asnumpy()} | {k: v.asnumpy() for k, v in inputs.items()})
        answer = self.answer(x.asnumpy(), t.asnumpy()) if callable(self.answer) else self.answer
        return Tensor(answer.astype(np.float32))


def bounded(x, t):
    """An answer of 8 channels that mixes neither samples nor frames."""
    level = t.reshape(-1, 1, 1, 1, 1) / 1000
    return np.concatenate([np.tanh(x) + 0.1 * level, np.cos(x)], axis=1)


def sample(name: str, config: dict, network=bounded, shape=SHAPE, seed=0, **inputs):
    """Latents by that schedule, and the network's calls; the start of each sample is its seed's."""
    noise = SampleNoise([[seed, at] for at in range(shape[0])], shape[1:])
    model = Recorder(network)
    given = {"z": noise.start(), "noise": noise, "cond": {"y": normal(shape[0], 1, 7, 8)}, "null": {"y": normal(7, 8)}}
    return create_schedule(name, **config).sample(model, **{**given, **inputs}), model.calls


# Steps and tables.


def test_sampling_takes_the_steps_that_the_original_takes():
    for respacing, kept in json.loads((DATA / "iddpm_tables" / "timesteps.json").read_text()).items():
        assert respaced(1000, respacing) == kept
    assert respaced(1000, "1") == [0] and respaced(1000, "") == list(range(1000))
    assert create_schedule("iddpm", num_sampling_steps=4).timesteps == [0, 333, 666, 999]
    assert create_schedule("iddpm", timestep_respacing="ddim50").timesteps == list(range(0, 1000, 20))
    assert create_schedule("iddpm", timestep_respacing="", num_sampling_steps=4).num_steps == 4


def test_tables_are_those_of_the_original_in_fp64():
    wanted = np.load(DATA / "iddpm_tables" / "tables_n.npz")
    tables = create_schedule("iddpm", num_sampling_steps=6).tables
    for name in wanted.files:
        np.testing.assert_allclose(getattr(tables, name), wanted[name], rtol=1e-12, err_msg=name)
    assert tables.posterior_mean_coef1[0] == 1.0  # it is 0.99983 where tables are kept in fp32


def test_the_cosine_schedule_is_its_formula():
    kept = DiffusionTables(noise_betas("squaredcos_cap_v2", 100)).alphas_cumprod
    at = (np.arange(1, 100) / 100 + 0.008) / 1.008 * math.pi / 2
    np.testing.assert_allclose(kept[:99], np.cos(at) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)
    assert noise_betas("squaredcos_cap_v2", 100)[-1] == 0.999


def test_speed_draws_and_weighs_as_the_original():
    schedule = create_schedule("iddpm-speed")
    wanted = np.load(DATA / "iddpm_tables" / "speed_p.npy")
    np.testing.assert_allclose(schedule.probabilities, wanted, rtol=1e-2)  # at the edge the original's fp32 shows
    weights = np.load(DATA / "iddpm_tables" / "speed_weights.npy")
    np.testing.assert_allclose(1 - schedule.tables.alphas_cumprod, weights, atol=3e-7)
    assert schedule.meaningful_steps == 700

    t = schedule.draw_t(np.random.default_rng(0), 4000)
    assert t.shape == (4000,) and t.dtype == np.int32 and t.min() >= 0 and t.max() < 1000
    drawn, mirrored = t[:2001], t[2001:]
    assert (mirrored == np.abs(700 - drawn[:1999])).all()
    assert abs((drawn <= 640).mean() - schedule.probabilities[:641].sum()) < 0.03
    assert schedule.draw_t(np.random.default_rng(0), 1).shape == (1,)


def test_the_timestep_transform_is_the_original_s():
    for height, width, frames, scale, t, wanted in np.load(DATA / "rflow_transform" / "rows.npy"):
        latent = 1 if frames == 1 else frames // 17 * 5
        assert timestep_transform(t, (height, width, latent), scale) == pytest.approx(wanted, abs=1e-3)


def test_no_transformed_time_lies_outside_of_training():
    schedule = create_schedule("rflow", num_sampling_steps=30, use_timestep_transform=True)
    for height in range(128, 2049, 64):
        for frames in range(1, 17):  # for 2 to 16 the original samples nothing
            times = schedule.times((height, 1.5 * height, frames))
            assert times.dtype == np.float32 and times[0] == 1000 and (np.diff(times) < 0).all() and times[-1] > 0


def test_training_draws_times_by_the_method():
    def draw(count=20000, size=None, **config):
        return create_schedule("rflow", **config).draw_t(np.random.default_rng(1), count, size)

    uniform = draw()
    assert uniform.dtype == np.float32 and abs(uniform.mean() - 500) < 5 and uniform.min() >= 0 and uniform.max() < 1000
    whole = draw(use_discrete_timesteps=True)
    assert (np.unique(whole) == np.arange(1000)).all()
    bell = draw(sample_method="logit-normal", loc=0.5, scale=2.0)
    logit = np.log(bell / (1000 - bell.astype(np.float64)))
    assert abs(logit.mean() - 0.5) < 0.05 and abs(logit.std() - 2.0) < 0.05
    moved = draw(size=(512, 512, 4), use_timestep_transform=True, transform_scale=1.5)
    np.testing.assert_allclose(moved, timestep_transform(uniform, (512, 512, 4), 1.5), rtol=1e-3)
    steps = create_schedule("iddpm").draw_t(np.random.default_rng(1), 20000)
    assert steps.dtype == np.int32 and steps.min() == 0 and steps.max() == 999 and abs(steps.mean() - 499.5) < 5


# Guidance.


@pytest.mark.parametrize("name, config", [("iddpm", IDDPM), ("rflow", RFLOW), ("dpm-solver", IDDPM)])
def test_the_network_gets_both_halves(name, config):
    y, null, mask, fps = normal(2, 1, 7, 8, seed=1), normal(7, 8, seed=2), np.eye(2, 7) > 0, np.float32([24, 8])
    _, calls = sample(name, config, cond={"y": y, "mask": mask, "fps": Tensor(fps)}, null={"y": null})
    assert len(calls) == 10
    for call in calls:
        assert call["x"].shape == (4, *SHAPE[1:]) and (call["x"][:2] == call["x"][2:]).all()
        assert call["t"].dtype == np.float32 and len(call["t"]) == 4 and len(set(call["t"])) == 1
        assert (call["y"] == np.concatenate([y, [[null], [null]]])).all()
        # A null caption is cut to its sample's length, and a b comes as a b a b, not a a b b.
        assert (call["mask"] == np.concatenate([mask, mask])).all() and (call["fps"] == [24, 8, 24, 8]).all()
        assert "x_mask" not in call


def test_a_scale_of_1_runs_only_the_conditional_half():
    for name in ("iddpm", "rflow", "dpm-solver"):
        without, calls = sample(name, {"num_sampling_steps": 3, "cfg_scale": 1.0}, null={})
        assert all(len(call["x"]) == 2 for call in calls)
        with_, _ = sample(name, {"num_sampling_steps": 3, "cfg_scale": 1.0 + 1e-7})
        np.testing.assert_allclose(without, with_, rtol=1e-4, atol=1e-4)


def test_guidance_leaves_other_channels_to_the_condition():
    answer = normal(4, 8, *SHAPE[2:], seed=3)
    one = dict(diffusion_steps=1000, num_sampling_steps=1, cfg_scale=3.0)  # a step from t = 0 to the network's latents
    tables = create_schedule("iddpm", **one).tables
    z = normal(*SHAPE, seed=4)
    for channel in (None, 3):
        found, _ = sample("iddpm", {**one, "cfg_channel": channel}, answer, z=z)
        eps = answer[:2, :4].copy()
        eps[:, :channel] = answer[2:, :channel][:, :4] + 3 * (answer[:2, :channel] - answer[2:, :channel])[:, :4]
        wanted = tables.sqrt_recip_alphas_cumprod[0] * z - tables.sqrt_recipm1_alphas_cumprod[0] * eps
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


# What sampling reaches.


def gaussian_network(spread: float, flow: bool):
    """The network that training ends with where latents are normal with that standard deviation."""
    levels = DiffusionTables(noise_betas("linear", 1000)).alphas_cumprod

    def answer(x, t):
        t = float(t[0])
        if flow:
            signal, noise = 1 - t / 1000, t / 1000
        else:
            signal = math.sqrt(math.exp(np.interp(t, np.arange(1000), np.log(levels))))
            noise = math.sqrt(1 - signal**2)
        share = 1 / (signal**2 * spread**2 + noise**2)
        prediction = x * ((signal * spread**2 - noise) if flow else noise) * share
        return np.concatenate([prediction, np.full_like(x, -1)], axis=1)

    return answer


@pytest.mark.parametrize(
    "name, config, within",
    [
        ("iddpm", dict(num_sampling_steps=250), 0.04),
        ("dpm-solver", dict(num_sampling_steps=160), 0.02),
        ("rflow", dict(num_sampling_steps=100), 0.02),
        ("rflow", dict(num_sampling_steps=100, use_timestep_transform=True), 0.04),
    ],
)
def test_sampling_reaches_the_distribution_that_the_network_knows(name, config, within):
    shape, network = (1, 4, 4, 32, 32), gaussian_network(0.7, name == "rflow")
    found, _ = sample(name, {**config, "cfg_scale": 1.0}, network, shape, null={}, size=(512, 512, 4))
    assert found.std() == pytest.approx(0.7, rel=within) and abs(found.mean()) < 0.02


def test_dpm_solver_is_of_second_order():
    end = DiffusionTables(noise_betas("linear", 1000)).alphas_cumprod[[-1, 0]]
    exact = math.sqrt(end[1] * 0.49 + 1 - end[1]) / math.sqrt(end[0] * 0.49 + 1 - end[0])
    shape, network, errors = (1, 1, 1, 1, 1), gaussian_network(0.7, False), []
    for steps in (80, 160):
        config = dict(num_sampling_steps=steps, cfg_scale=1.0)
        found, _ = sample("dpm-solver", config, network, shape, z=np.ones(shape), null={})
        errors.append(found.item() - exact)
    assert 3.5 < errors[0] / errors[1] < 5 and abs(errors[1]) < 0.003


def test_progress_wraps_the_steps_and_sees_each():
    seen = []

    def progress(steps):
        assert len(steps) == 10
        for step in steps:
            seen.append(step)
            yield step

    for name in ("iddpm", "rflow", "dpm-solver"):
        sample(name, IDDPM, progress=progress)
    assert seen == [*range(10)] * 3


# Frames that are given.

MASK = np.float32([[0.0, 1.0, 1.0], [1.0, 0.45, 0.0]])


@pytest.mark.parametrize("name", ["iddpm", "rflow"])
def test_frames_to_keep_are_kept_to_the_bit(name):
    z = 3 * normal(*SHAPE, seed=5)
    found, calls = sample(name, IDDPM, z=z, frame_mask=MASK)
    kept = (MASK == 0)[:, None, :, None, None] & np.ones(SHAPE, bool)
    assert (found[kept] == z[kept]).all() and np.isfinite(found).all()
    assert (np.abs(found - z)[~kept] > 1e-3).mean() > 0.9
    for call in calls:
        assert (call["x"][:2][kept] == z[kept]).all() and not call["x_mask"][:2][MASK == 0].any()
        assert call["x_mask"][:2][MASK == 1].all() and (call["x_mask"][:2] == call["x_mask"][2:]).all()


@pytest.mark.parametrize("name, first", [("iddpm", 5), ("rflow", 6)])  # at level 4 of 9 to 0; at t = 400
def test_a_frame_to_edit_is_noised_once_when_its_turn_comes(name, first):
    z, noise, asked = 3 * normal(*SHAPE, seed=5), normal(*SHAPE, seed=6), []

    def draw(step, purpose):
        asked.append((step, purpose))
        return noise

    _, calls = sample(name, IDDPM, z=z, frame_mask=MASK, noise=draw)
    assert [step for step, purpose in asked if purpose == "renoise"] == [first]
    assert [bool(call["x_mask"][1, 1]) for call in calls] == [step >= first for step in range(10)]
    before, noised = calls[first - 1]["x"][1, :, 1], calls[first]["x"][1, :, 1]
    assert (before == z[1, :, 1]).all()
    if name == "iddpm":
        level = create_schedule("iddpm", **IDDPM).tables.alphas_cumprod[4]
        wanted = math.sqrt(level) * z + math.sqrt(1 - level) * noise
    else:
        wanted = 0.6 * z + 0.4 * noise
    np.testing.assert_allclose(noised, wanted[1, :, 1], rtol=1e-5, atol=1e-6)


def test_how_far_a_frame_is_noised_is_cut_in_fp32():
    for ratio, steps, level in ((0.29, 100, 29), (0.8, 30, 24), (0.05, 6, 0)):
        mask = np.float32([[ratio, 1]])
        _, calls = sample("iddpm", dict(num_sampling_steps=steps), shape=(1, 4, 2, 2, 2), frame_mask=mask)
        assert [bool(call["x_mask"][0, 0]) for call in calls].index(True) == steps - 1 - level


def test_the_original_s_way_shows_frames_one_step_later_and_changes_the_kept():
    z = 3 * normal(*SHAPE, seed=5)
    found, calls = sample("iddpm", {**IDDPM, "original_masks": True}, z=z, frame_mask=MASK)
    assert [bool(call["x_mask"][1, 1]) for call in calls] == [step >= 6 for step in range(10)]
    assert 0 < np.abs(found - z)[0, :, 0].max() < 0.2
    assert (calls[-1]["x"][0, :, 0] != z[0, :, 0]).any() and (calls[-2]["x"][0, :, 0] == z[0, :, 0]).all()


def test_a_mask_of_ones_means_no_mask():
    for name in ("iddpm", "rflow", "dpm-solver"):
        with_, calls = sample(name, IDDPM, frame_mask=np.ones((2, 3)))
        assert (with_ == sample(name, IDDPM)[0]).all() and "x_mask" not in calls[0]


@pytest.mark.parametrize("name", ["iddpm", "rflow", "dpm-solver"])
def test_a_sample_does_not_depend_on_its_batch(name):
    mask = {} if name == "dpm-solver" else {"frame_mask": MASK}
    both, _ = sample(name, IDDPM, **mask)
    shape = (1, *SHAPE[1:])
    noise = SampleNoise([[0, 1]], SHAPE[1:])
    mask = {name: value[1:] for name, value in mask.items()}
    alone, _ = sample(name, IDDPM, shape=shape, z=noise.start(), noise=noise, **mask)
    assert (alone[0] == both[1]).all() and (both[0] != both[1]).any()


def test_noise_depends_only_on_seed_step_and_purpose():
    noise = SampleNoise([[1, 2], [1, 3]], (4, 3, 32, 32))
    drawn = [noise.start(), noise(0, "step"), noise(1, "step"), noise(1, "renoise")]
    assert all(values.dtype == np.float32 and abs(values.std() - 1) < 0.02 for values in drawn)
    flat = np.stack([values[at].ravel() for values in drawn for at in (0, 1)])
    assert np.abs(np.corrcoef(flat) - np.eye(8)).max() < 0.1
    assert (noise(1, "step") == drawn[2]).all()
    assert (SampleNoise([[1, 3]], (4, 3, 32, 32))(1, "step")[0] == drawn[2][1]).all()


# Losses.


def answer_of(x0, eps, values):
    """A network that answers so, whatever it is given."""
    return Recorder(np.concatenate([eps, values], axis=1) if values is not None else eps)


def numpy_terms(tables, x0, t, noise, eps, values, predict_xstart=False, log_variances=None):
    """Squared error and bound in bits, each (B,), in fp64, for t > 0."""

    def at(name):
        return getattr(tables, name)[t].reshape(-1, 1, 1, 1, 1)

    x0, noise, eps = (v.astype(np.float64) for v in (x0, noise, eps))
    x_t = at("sqrt_alphas_cumprod") * x0 + at("sqrt_one_minus_alphas_cumprod") * noise
    found = eps if predict_xstart else at("sqrt_recip_alphas_cumprod") * x_t - at("sqrt_recipm1_alphas_cumprod") * eps
    apart = at("posterior_mean_coef1") * (x0 - found)
    true = at("posterior_log_variance_clipped")
    if values is None:
        own = log_variances[t].reshape(-1, 1, 1, 1, 1)
    else:
        share = (values.astype(np.float64) + 1) / 2
        own = share * np.log(at("betas")) + (1 - share) * true
    bits = 0.5 * (own - true - 1 + np.exp(true - own) + apart**2 * np.exp(-own)) / math.log(2)
    bits = np.broadcast_to(bits, x0.shape)
    return ((eps - (x0 if predict_xstart else noise)) ** 2).mean((1, 2, 3, 4)), bits.mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    "config",
    [{}, {"predict_xstart": True}, {"learn_sigma": False}, {"rescale_learned_sigmas": True, "diffusion_steps": 100}]
    + [{"use_kl": True, "diffusion_steps": 100}, {"use_kl": True, "learn_sigma": False, "sigma_small": True}],
    ids=str,
)
def test_the_loss_is_its_formula(config):
    schedule = create_schedule("iddpm", **config)
    x0, noise, eps, values = (normal(*SHAPE, seed=seed) for seed in range(4))
    values = values if schedule.learn_sigma else None
    t, steps = np.int32([3, 70]), schedule.num_steps
    tables = schedule.tables
    small = tables.posterior_log_variance_clipped
    error, bound = numpy_terms(tables, x0, t, noise, eps, values, schedule.predict_xstart, small)
    wanted = error + bound * (steps / 1000 if "rescale_learned_sigmas" in config else 1)
    if not schedule.learn_sigma:
        wanted = error
    if schedule.use_kl:
        wanted = bound * steps
    found = schedule.training_losses(answer_of(x0, eps, values), Tensor(x0), Tensor(t), Tensor(noise))
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=2e-5)


def test_a_fixed_variance_is_what_a_step_adds():
    large = create_schedule("iddpm", learn_sigma=False, use_kl=True)
    x0, noise, eps = (normal(*SHAPE, seed=seed) for seed in range(3))
    t = np.int32([3, 70])
    _, bound = numpy_terms(large.tables, x0, t, noise, eps, None, log_variances=np.log(large.tables.betas))
    found = large.training_losses(answer_of(x0, eps, None), Tensor(x0), Tensor(t), Tensor(noise))
    np.testing.assert_allclose(found.asnumpy(), bound * 1000, rtol=2e-5)


def test_the_loss_of_the_first_step_is_the_likelihood_of_a_bin():
    """A network that is right about the latents, at -1, 1 and between: almost all of a bin's mass is there."""
    schedule = create_schedule("iddpm")
    x0 = np.zeros(SHAPE, np.float32)
    x0[0], x0[1] = 1.0, 0.25
    noise = normal(*SHAPE)
    values = np.full(SHAPE, -1, np.float32)  # the posterior's variance, of 0.005^2; a bin is 0.008 wide
    _, bound = schedule.loss_terms(answer_of(x0, noise, values), Tensor(x0), Tensor(np.int32([0, 0])), Tensor(noise))
    sigma = math.exp(0.5 * schedule.tables.posterior_log_variance_clipped[0])
    inside = math.erf(1 / 255 / sigma / math.sqrt(2))
    np.testing.assert_allclose(bound.asnumpy(), [-math.log2((1 + inside) / 2), -math.log2(inside)], rtol=2e-2)


class Step(nn.Cell):
    """A network of one layer under a schedule's loss; the answer depends on time, and on which frames are given."""

    def __init__(self, schedule):
        super().__init__()
        self.layer = nn.Dense(4, 8, weight_init=Tensor(normal(8, 4)), bias_init=Tensor(normal(8)))
        self.schedule = schedule

    def network(self, x, t, x_mask=None, scale=None):
        out = self.layer(x.transpose(0, 2, 3, 4, 1)) * scale.reshape(-1, 1, 1, 1, 1) + t.reshape(-1, 1, 1, 1, 1) / 1000
        if x_mask is not None:
            out = out * (1 + x_mask.astype(ms.float32).reshape(x_mask.shape[0], -1, 1, 1, 1))
        return out.transpose(0, 4, 1, 2, 3)

    def construct(self, x0, t, noise, x_mask, scale):
        return mint.mean(self.schedule.training_losses(self.network, x0, t, noise, x_mask, scale=scale))


X_MASK = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("name", ["iddpm", pytest.param("iddpm-speed", marks=pytest.mark.full), "rflow"])
def test_a_compiled_step_has_the_loss_and_gradients_of_op_by_op(name):
    x0, noise = Tensor(normal(*SHAPE)), Tensor(normal(*SHAPE, seed=1))
    t = Tensor(np.float32([420.5, 3.0]) if name == "rflow" else np.int32([420, 0]))
    found = {}
    for mode in ("graph", "pynative"):
        runtime.setup("cpu", mode)
        step = Step(create_schedule(name))
        gradient = ops.value_and_grad(step, None, step.trainable_params())
        loss, gradients = gradient(x0, t, noise, Tensor(X_MASK), Tensor(np.float32([1.0, 0.5])))
        found[mode] = [value.asnumpy() for value in (loss, *gradients)]
    for graph, pynative in zip(found["graph"], found["pynative"], strict=True):
        assert np.abs(graph).max() > 0
        np.testing.assert_allclose(graph, pynative, rtol=1e-5, atol=1e-6 * np.abs(pynative).max())


def test_the_bound_trains_only_the_variance():
    x0, noise, t = Tensor(normal(*SHAPE)), Tensor(normal(*SHAPE, seed=1)), Tensor(np.int32([420, 0]))
    eps, values = Tensor(normal(*SHAPE, seed=2)), Tensor(normal(*SHAPE, seed=3))

    def gradients(term, **config):
        schedule = create_schedule("iddpm", **config)

        def loss(eps, values):
            return schedule.loss_terms(lambda x, t: mint.cat((eps, values), 1), x0, t, noise)[term].sum()

        return [np.abs(gradient.asnumpy()).max() for gradient in ops.grad(loss, (0, 1))(eps, values)]

    of_error, of_bound = gradients(0), gradients(1)
    assert of_error[0] > 0 and of_error[1] == 0
    assert of_bound[0] == 0 and of_bound[1] > 0
    assert min(gradients(1, use_kl=True)) > 0


@pytest.mark.parametrize("name", ["iddpm", "rflow"])
def test_given_frames_are_inputs_but_not_part_of_the_loss(name):
    schedule, x0, noise = create_schedule(name), normal(*SHAPE), normal(*SHAPE, seed=1)
    t = Tensor(np.float32([900, 800]) if name == "rflow" else np.int32([900, 800]))
    answer = normal(2, 8, *SHAPE[2:], seed=2)
    model = Recorder(answer)
    losses = schedule.training_losses(model, Tensor(x0), t, Tensor(noise), Tensor(X_MASK)).asnumpy()
    given = ~X_MASK[:, None, :, None, None] & np.ones(SHAPE, bool)
    wanted = x0
    if name == "iddpm":  # at the first of the thousand levels
        tables = schedule.tables
        wanted = tables.sqrt_alphas_cumprod[0] * x0 + tables.sqrt_one_minus_alphas_cumprod[0] * noise
    shown = model.calls[0]["x"]
    np.testing.assert_allclose(shown[given], wanted[given], rtol=1e-6 if name == "iddpm" else 0, atol=1e-7)
    assert np.abs(shown - wanted)[~given].mean() > 0.3 and (model.calls[0]["x_mask"] == X_MASK).all()
    assert (model.calls[0]["t"] == [900, 800]).all()

    answer[np.concatenate([given, given], axis=1)] += 7
    other = schedule.training_losses(Recorder(answer), Tensor(x0), t, Tensor(noise), Tensor(X_MASK)).asnumpy()
    assert (other == losses).all()
    # The mean over the frames that are generated, not over all.
    alone = schedule.training_losses(
        Recorder(answer[1:, :, 2:]), Tensor(x0[1:, :, 2:]), t[1:], Tensor(noise[1:, :, 2:])
    ).asnumpy()
    np.testing.assert_allclose(losses[1], alone[0], rtol=1e-6)
    none = schedule.training_losses(model, Tensor(x0), t, Tensor(noise), Tensor(np.zeros((2, 3), bool))).asnumpy()
    assert (none == 0).all()


# What cannot be.


@pytest.mark.parametrize(
    "name, config, said",
    [
        ("ddim", {}, "there is no schedule 'ddim'; the schedules are iddpm, iddpm-speed, dpm-solver, rflow"),
        ("rflow", {"cfg_scales": 7.0}, "the schedule rflow has no argument 'cfg_scales'; did you mean 'cfg_scale'?"),
        ("dpm-solver", {"cfg_channel": 3}, "has no argument 'cfg_channel'"),
        ("iddpm", {"num_sampling_steps": 10, "timestep_respacing": "20"}, "so give one of them"),
        ("iddpm", {"num_sampling_steps": 0}, "num_sampling_steps is 0; it must be a whole number from 1 to 1000"),
        ("iddpm", {"num_sampling_steps": 1001}, "num_sampling_steps is 1001; it must be a whole number from 1 to 1000"),
        ("rflow", {"num_sampling_steps": 2.5}, "num_sampling_steps is 2.5; it must be a whole number, at least 1"),
        ("iddpm", {"timestep_respacing": "ddim60"}, "no stride leaves that many of 1000 steps"),
        ("iddpm", {"timestep_respacing": "600,10"}, "a section of 500 of 1000 steps cannot keep 600"),
        ("iddpm", {"timestep_respacing": "fast"}, "it must be such as"),
        ("iddpm", {"noise_schedule": "quadratic"}, "noise_schedule is 'quadratic'; it must be one of linear"),
        ("iddpm-speed", {"num_sampling_steps": 10}, "iddpm-speed only trains, and on all steps"),
        ("rflow", {"sample_method": "normal"}, "sample_method is 'normal'; it must be one of uniform, logit-normal"),
        ("rflow", {"sample_method": "logit-normal", "use_discrete_timesteps": True}, "draws whole times uniformly"),
    ],
)
def test_an_impossible_config_is_one_line(name, config, said):
    with pytest.raises(ValueError) as error:
        create_schedule(name, **config)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, config, inputs, said",
    [
        ("iddpm-speed", {}, {}, "iddpm-speed only trains; sample with iddpm"),
        ("dpm-solver", {}, {"frame_mask": MASK}, "dpm-solver can keep no frames; use iddpm or rflow"),
        ("rflow", {"use_timestep_transform": True}, {}, "needs the size"),
        ("rflow", {"use_timestep_transform": True}, {"size": (512, 512, 0)}, "0 latent frames"),
        ("iddpm", {"cfg_channel": 5}, {}, "cfg_channel is 5; the latents have 4 channels"),
        (
            "iddpm",
            {},
            {"frame_mask": MASK[:, :2]},
            "(B, T), (2, 3) for these latents; this one is (2, 2)",
        ),
        ("iddpm", {}, {"frame_mask": MASK + 0.5}, "values must be between 0 (keep) and 1 (generate)"),
        ("iddpm", {}, {"noise": None}, "iddpm needs noise in its steps"),
        ("iddpm", {}, {"noise": lambda step, purpose: np.zeros(3)}, "the noise of step 0 has the shape (3,)"),
        ("iddpm", {"learn_sigma": False}, {}, "answers with 8 channels, not 4, for latents of 4; learn_sigma is False"),
        ("rflow", {}, {"null": {}}, "needs a null caption; without one it must be 1"),
        ("rflow", {}, {"null": {"y": normal(9, 8)}}, "the null input y has the shape (9, 8), which does not fit"),
        ("rflow", {}, {"null": {"z": normal(7, 8)}}, "'z' is in the null inputs but not in the conditional ones"),
        ("rflow", {}, {"z": normal(4, 3, 5, 6)}, "latents are (B, C, T, H, W)"),
        ("rflow", {}, {"network": lambda x, t: x[:, :2]}, "the network answers latents of the shape"),
    ],
)
def test_an_impossible_sample_is_one_line(name, config, inputs, said):
    with pytest.raises(ValueError) as error:
        sample(name, config, **inputs)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_schedule_that_cannot_train_says_so():
    x, t = Tensor(normal(*SHAPE)), Tensor(np.int32([1, 2]))
    for call in (
        lambda: create_schedule("dpm-solver").training_losses(None, x, t, x),
        lambda: create_schedule("dmp-solver").draw_t(np.random.default_rng(0), 2),  # as 1.0's documents spell it
    ):
        with pytest.raises(ValueError, match="dpm-solver only samples; train with iddpm"):
            call()
    with pytest.raises(ValueError, match="use_kl trains without frame masks"):
        create_schedule("iddpm", use_kl=True).training_losses(None, x, t, x, Tensor(X_MASK))
    with pytest.raises(ValueError, match="needs the size"):
        create_schedule("rflow", use_timestep_transform=True).draw_t(np.random.default_rng(0), 2)
