"""A model that starts from clips: its straight path is fitted, the rest is as in an untrained one."""

import numpy as np
import pytest
from arrays import psnr
from mindspore import Tensor
from training_runs import assert_same_weights, short_run, stopped_at, write_data

from mg import runtime
from mg.checkpoints import read_state_dict
from mg.models import create_model

# The smallest that has a straight path: 4x2x2, of which time is halved at both levels that halve the frame.
SMALL = {
    "ch": 8,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "norm_num_groups": 2,
    "z_channels": 8,
    "temporal_downsample_level": [0, 1],
    "temporal_upsample_level": [2, 1],
}
NARROW = [f"--model.config.{option}" for option in ("ch=8", "ch_mult=[1,1,1,1]", "norm_num_groups=2")]

# The smallest DC-AE, and one of the temporal half: 4x2x2.
SMALL_DC_AE = {
    "latent_channels": 32,
    "encoder_width_list": [8, 16, 32, 32, 32, 32],
    "encoder_depth_list": [1] * 6,
    "decoder_width_list": [8, 8, 16, 32, 32, 128],
    "decoder_depth_list": [1] * 6,
}
SMALL_TEMPORAL_VAE = {
    "spatial_block_out_channels": [8, 8],
    "spatial_layers_per_block": 1,
    "norm_num_groups": 2,
    "filters": 12,
    "channel_multipliers": [1, 1, 1],
    "temporal_downsample": [True, True],
    "num_res_blocks": 1,
    "micro_frame_size": 8,
    "shift": 0.0,
    "scale": 1.0,
}


def waves(count: int, seed: int) -> np.ndarray:
    """Coloured waves that move, bright or dark. (count, 3, 8, 32, 32)"""
    rng = np.random.default_rng(seed)
    t, y, x = np.mgrid[:8, :32, :32]
    clips = []
    for _ in range(count):
        along, across, speed = rng.uniform(-0.9, 0.9, 3)
        wave = np.sin(along * x + across * y + speed * t + rng.uniform(0, 6))
        clips.append(rng.uniform(-0.5, 0.5, (3, 1, 1, 1)) + rng.uniform(0.1, 0.5, (3, 1, 1, 1)) * wave)
    return np.stack(clips).astype(np.float32)


def test_reconstructs_clips_that_it_was_not_fitted_to():
    runtime.setup("cpu", "pynative")
    tae = create_model("tae", **SMALL)
    x = waves(3, 1)
    untrained = psnr(tae(Tensor(x)).asnumpy(), x)
    tae.start_linear(list(waves(24, 0)))
    blocks = x.reshape(3, 3, 2, 4, 8, 4, 8, 4).mean((3, 5, 7), keepdims=True)
    average = psnr(np.broadcast_to(blocks, (3, 3, 2, 4, 8, 4, 8, 4)).reshape(x.shape), x)
    started = psnr(tae(Tensor(x)).asnumpy(), x)
    assert started > untrained + 10 and started > average + 0.5, (untrained, average, started)
    _, mean, logvar = tae.encode(Tensor(x))
    np.testing.assert_allclose(mean.asnumpy().std((0, 2, 3, 4)), 1, atol=0.7)
    np.testing.assert_allclose(logvar.asnumpy(), -6, atol=1e-4)


@pytest.mark.full
def test_a_dc_ae_reconstructs_clips_that_it_was_not_fitted_to():
    runtime.setup("cpu", "pynative")
    dc_ae = create_model("dc_ae", **SMALL_DC_AE)
    x = waves(2, 1)
    untrained = psnr(dc_ae(Tensor(x)).asnumpy(), x)
    dc_ae.start_linear(list(waves(200, 0)))
    started = psnr(dc_ae(Tensor(x)).asnumpy(), x)
    assert started > untrained + 3, (untrained, started)


def test_the_temporal_half_reconstructs_latents_that_it_was_not_fitted_to():
    runtime.setup("cpu", "pynative")
    vae = create_model("temporal_vae", **SMALL_TEMPORAL_VAE)

    def error() -> float:
        found = vae.latents(Tensor(waves(2, 1)))
        target = found["target"].asnumpy()
        return np.mean(np.square(found["code"].asnumpy() - target)) / np.mean(np.square(target))

    untrained = error()
    vae.start_linear(list(waves(24, 0)))
    assert error() < 0.3 < untrained, (untrained, error())
    _, mean, logvar = vae.encode(Tensor(waves(4, 1)))
    np.testing.assert_allclose(np.square(mean.asnumpy()).mean((0, 2, 3, 4)), 1, atol=0.7)
    np.testing.assert_allclose(logvar.asnumpy(), -6, atol=1e-4)


@pytest.mark.parametrize(
    "name, config, reason",
    [
        (
            "dc_ae",
            dict(SMALL_DC_AE, latent_channels=16),
            "encoder_width_list must end in latent_channels",
        ),
        ("temporal_vae", dict(SMALL_TEMPORAL_VAE, channel_multipliers=[1, 1, 2]), "channel_multipliers must all be 1"),
    ],
)
def test_other_models_without_a_known_straight_path_are_refused(name, config, reason):
    with pytest.raises(ValueError, match=f"has no linear start: {reason}"):
        create_model(name, **config).start_linear([])


@pytest.mark.parametrize(
    "config, reason",
    [
        (dict(ch_mult=[1, 1, 2]), "ch_mult must differ between its first two levels"),
        (dict(norm_num_groups=4), "each norm group must have a multiple of 4 channels"),
        (
            dict(temporal_upsample_level=[1, 0]),
            "temporal_upsample_level must be temporal_downsample_level with 1 added",
        ),
    ],
)
def test_a_config_without_a_known_straight_path_is_refused(config, reason):
    with pytest.raises(ValueError, match=f"^this TAE has no linear start: {reason}"):
        create_model("tae", **SMALL | config).start_linear([])


def test_clips_too_uniform_to_fit_are_refused():
    with pytest.raises(ValueError, match="^the clips are too few or too uniform to fit 8 latent channels"):
        create_model("tae", **SMALL).start_linear([np.zeros((3, 8, 32, 32), np.float32)])


@pytest.mark.full
def test_a_run_starts_from_its_first_clips_and_resumes_to_the_bit(tmp_path):
    options = [*write_data(tmp_path), "--model.name=tae", "--model.linear_start=4"]
    options += [f"--model.config.{key}={value}" for key, value in SMALL.items()]
    options += "--data.batch_size=2 --optim.name=muon --optim.lr=1e-4 --max_steps=2 --ckpt_save_steps=1".split()
    records = short_run(tmp_path / "whole", *options)
    at_random = short_run(tmp_path / "random", *options, "--model.linear_start=0", "--max_steps=1")
    assert records[0]["l1"] < 0.5 * at_random[0]["l1"]
    with stopped_at(2):
        short_run(tmp_path / "parts", *options)
    assert short_run(tmp_path / "parts", *options, "--resume") == records
    assert_same_weights(
        read_state_dict(tmp_path / "parts" / "tae.ckpt"), read_state_dict(tmp_path / "whole" / "tae.ckpt")
    )


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--model.name=two_convs"], "model.linear_start is 4; it must be 0, two_convs has no linear start"),
        (["--model.name=tae", *NARROW], "data.sample_n_frames is 4; a linear start needs a multiple of 8"),
        (
            ["--model.name=tae", *NARROW, "--data.sample_n_frames=8"],
            "model.linear_start is 4; this TAE has no linear start: ch_mult must",
        ),
        (["--model.from_pretrained=x.ckpt"], "linear_start is 4; it must be 0 if the weights start from x.ckpt"),
    ],
)
def test_a_run_with_nothing_to_fit_says_so(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        short_run(tmp_path, *write_data(tmp_path), "--model.linear_start=4", *options)
