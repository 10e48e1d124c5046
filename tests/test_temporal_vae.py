"""The Open-Sora 1.2 VAE equals the original, names, numbers and latents; its chunks, and what sees what."""

import json
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from arrays import relative_error, video
from mindspore import Tensor, ops
from tiers import GRAPH_IN_FULL
from tiny_models import SMALL_TEMPORAL_VAE
from tiny_models import TEMPORAL_VAE as TINY

from mg.checkpoints import read_state_dict
from mg.models import create_model
from mg.models.layers.conv import CausalConv3d
from mg.models.layers.forms import in_form
from mg.models.temporal_vae.blocks import Upsample
from mg.models.temporal_vae.temporal_vae import TEMPORAL_VAE_CONFIG, OpenSoraVAE

DATA = Path(__file__).parent / "data"
ORIGINAL = DATA / "temporal_vae" / "weights.safetensors"
TOLERANCE = 1e-4  # of the output's scale
SMALL = {
    **SMALL_TEMPORAL_VAE,
    "channel_multipliers": [1, 1, 1],
    "temporal_downsample": [True, True],
    "micro_frame_size": 17,
}


def data(name: str) -> np.ndarray:
    return np.load(DATA / "temporal_vae" / f"{name}.npy")


@pytest.fixture(scope="module")
def model():
    """The original's weights: no layer is zero, as some are in an untrained model."""
    return create_model("temporal_vae", ORIGINAL, **TINY)


@pytest.fixture
def paper(model):
    """The same, in the layout and form of the paper, so that its layers can be called one by one."""
    with in_form(model, "paper"):
        yield model


@pytest.fixture(scope="module")
def small():
    """A half of two levels each, all its parameters random."""
    model, rng = create_model("temporal_vae", **SMALL), np.random.default_rng(0)
    for name, p in model.named_weights():
        p.set_data(Tensor(rng.normal(float(name.endswith("gamma")), 0.1, p.shape).astype(np.float32)))
    return model


# Equal to the original.


@pytest.mark.parametrize("mode", GRAPH_IN_FULL, indirect=True)
def test_every_step_equals_the_originals(mode):
    model = create_model("temporal_vae", ORIGINAL, **TINY)
    x = Tensor(data("x"))
    x_z_rec, z, mean, logvar, x_z = model.latents(x).values()
    y = model.reconstruct(x_z_rec, x.shape)
    for found, name in ((x_z, "x_z"), (z, "z"), (mean, "z"), (x_z_rec, "x_z_rec"), (y, "y"), (model(x), "y")):
        assert relative_error(found, data(name)) < TOLERANCE, name
    encoded = model.encode(x)
    assert relative_error(encoded.mean, data("z_scaled")) < TOLERANCE
    assert relative_error(model.decode(Tensor(data("z_scaled")), num_target_frames=20), data("y")) < TOLERANCE
    assert np.allclose(encoded.logvar.asnumpy(), logvar.asnumpy() - 2 * np.log(model.codec.scale), atol=1e-5)


@pytest.mark.full
def test_the_spatial_half_equals_diffusers_in_sdxls_config(tmp_path, mode):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sdxl = diffusers.AutoencoderKL(
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    ).eval()
    sdxl.save_pretrained(tmp_path)
    x = video(1, 3, 2, 24, 40)
    with torch.no_grad():
        images = torch.from_numpy(x.asnumpy()[0].swapaxes(0, 1))
        posterior = sdxl.encode(images).latent_dist
        decoded = sdxl.decode(posterior.mean).sample.numpy().swapaxes(0, 1)[None]
    moments = posterior.parameters.numpy().swapaxes(0, 1)[None]

    vae = create_model("temporal_vae", filters=32, num_res_blocks=1, channel_multipliers=[1, 1, 1, 1])
    vae.spatial_vae.load_weights(tmp_path)
    parameters = list(vae.spatial_vae.get_parameters())
    assert (len(parameters), sum(p.size for p in parameters)) == (248, 83_653_863)
    mean, logvar = vae.spatial_vae.posterior(x)
    assert relative_error(mean, moments[:, :4]) < TOLERANCE
    assert relative_error(logvar, moments[:, 4:]) < TOLERANCE
    assert relative_error(vae.spatial_vae.decode(Tensor(moments[:, :4])), decoded) < TOLERANCE
    assert relative_error(vae.spatial_latents(x), moments[:, :4] * 0.18215) < TOLERANCE


def test_the_default_is_the_released_checkpoint():
    stored = dict(line.split(" ", 1) for line in (DATA / "temporal_vae_names.txt").read_text().splitlines())
    shapes = OpenSoraVAE.weight_shapes(TEMPORAL_VAE_CONFIG)
    nothing = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    found = {name: array.shape for name, array in OpenSoraVAE.original_weights(nothing, TEMPORAL_VAE_CONFIG).items()}
    assert found == {name: tuple(json.loads(f"[{shape.strip('(),')}]")) for name, shape in stored.items()}
    sizes = {
        part: [int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(part)]
        for part in ("spatial_vae", "temporal_vae.encoder", "temporal_vae.decoder", "temporal_vae", "")
    }
    assert {part: (len(each), sum(each)) for part, each in sizes.items()} == {
        "spatial_vae": (248, 83_653_863),
        "temporal_vae.encoder": (131, 144_421_128),
        "temporal_vae.decoder": (132, 165_265_924),
        "temporal_vae": (267, 309_687_144),
        "": (515, 393_341_007),
    }


def test_parameters_have_their_place_as_their_name(model):
    assert [p.name for p in model.get_parameters()] == [name for name, _ in model.named_weights()]


@pytest.mark.full
def test_the_model_of_full_size_is_built_and_runs():
    model = create_model("temporal_vae")
    parameters = list(model.get_parameters())
    assert (len(parameters), sum(p.size for p in parameters)) == (515, 393_341_007)
    assert model(video(1, 3, 5, 16, 16)).shape == (1, 3, 5, 16, 16)


def test_the_originals_tensors_scale_and_shift_become_config(tmp_path):
    state = dict(read_state_dict(ORIGINAL))
    assert {"scale", "shift"} < state.keys()
    config = {**TEMPORAL_VAE_CONFIG, **TINY}
    assert OpenSoraVAE.config_in_weights(state) == {key: config[key] for key in ("scale", "shift")}
    assert set(OpenSoraVAE.translate_weights(state, config)) == set(OpenSoraVAE.weight_shapes(config))
    state["scale"], state["shift"] = np.float32(2.5), np.float32(0)  # as they are where training leaves them
    assert OpenSoraVAE.config_in_weights(state) == {"scale": 2.5, "shift": 0.0}
    model = create_model("temporal_vae", scale=2.5, shift=0.0, **SMALL)
    x = video(1, 3, 4, 8, 8)
    assert np.allclose(model.encode(x).mean.asnumpy(), model.latents(x)["mean"].asnumpy() / 2.5, atol=1e-6)


# Lengths.


def cut_into(model, micro_frame_size, monkeypatch):
    """As if the model were built with this `micro_frame_size`."""
    monkeypatch.setattr(model, "geometry", replace(model.geometry, chunk=micro_frame_size))


@pytest.mark.parametrize("micro_frame_size", [17, None])
def test_every_length_is_cut_into_chunks_padded_in_front_and_trimmed(small, micro_frame_size, monkeypatch):
    """What the networks are given, frames numbered from 1 and zeros between, and what is kept of theirs."""
    given, made = [], []

    def encode(x):
        given.append(x.asnumpy()[0, 0, :, 0, 0].astype(int).tolist())
        return ops.zeros((1, 8, x.shape[2] // 4, 1, 1))

    def decode(z):
        made.append(list(range(100 * len(made), 100 * len(made) + 4 * z.shape[2])))
        return Tensor(np.float32(made[-1]).reshape(1, 1, -1, 1, 1))

    cut_into(small, micro_frame_size, monkeypatch)
    monkeypatch.setattr(small.temporal_vae, "encode", encode)
    monkeypatch.setattr(small.temporal_vae, "decode", decode)
    for frames in range(1, 41):
        given.clear(), made.clear()
        numbers = np.arange(1, frames + 1)
        size = micro_frame_size or frames
        chunks = [numbers[start : start + size].tolist() for start in range(0, frames, size)]
        mean, _ = small.temporal_posterior(
            Tensor(np.float32(np.tile(numbers.reshape(1, 1, -1, 1, 1), (1, 4, 1, 1, 1))))
        )
        assert given == [[0] * (-len(chunk) % 4) + chunk for chunk in chunks]
        assert mean.shape[2] == small.latent_shape((1, 3, frames, 2, 2))[2]
        kept = small.code(mean, frames).asnumpy().ravel().tolist()
        assert kept == [number for chunk, each in zip(chunks, made) for number in each[-len(chunk) :]]
        most = small.code(mean, None).shape[2]  # as many frames as the latents can stand for
        assert most == frames + (
            -frames % 4 if micro_frame_size is None else -len(chunks[-1]) % 4 * (len(chunks[-1]) < 17)
        )


@pytest.mark.parametrize("frames", [6, 18])
def test_chunks_are_clips_of_their_own_for_the_networks(small, frames):
    x_z, raw = video(1, 4, frames, 2, 2).asnumpy(), small.temporal_vae
    mean, logvar = small.temporal_posterior(Tensor(x_z))
    moments, decoded = [], []
    for chunk in np.split(x_z, range(17, frames, 17), axis=2):
        front = -chunk.shape[2] % 4
        found = raw.encode(Tensor(np.pad(chunk, [(0, 0), (0, 0), (front, 0), (0, 0), (0, 0)])))
        moments.append(found.asnumpy())
        decoded.append(raw.decode(found[:, :4]).asnumpy()[:, :, front:])
    found = np.concatenate([mean.asnumpy(), logvar.asnumpy()], axis=1)
    assert np.allclose(found, np.concatenate(moments, axis=2), atol=1e-5)
    assert np.allclose(small.code(mean, frames).asnumpy(), np.concatenate(decoded, axis=2), atol=1e-4)


def test_fewer_frames_than_the_latents_stand_for_are_the_first(small):
    z = small.encode(video(1, 3, 21, 4, 4)).mean
    whole = small.decode(z).asnumpy()
    assert np.array_equal(small.decode(z, num_target_frames=9).asnumpy(), whole[:, :, :9])
    assert np.array_equal(small.decode(z, num_target_frames=99).asnumpy(), whole)
    first, last = small.decode(z, num_target_frames=19).asnumpy(), whole[:, :, 19:]
    assert np.array_equal(first[:, :, :17], whole[:, :, :17])
    assert np.allclose(first[:, :, 17:], last, atol=1e-6)  # of 2 frames in the last latent frame, they are the last


@pytest.mark.parametrize("frames", [3, 18, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 16, 17, 34))])
def test_a_clip_of_an_aligned_length_has_the_same_latents(small, frames):
    x = video(1, 3, frames, 8, 8).asnumpy()
    aligned, valid = small.align_frames(x)
    assert valid.shape == (aligned.shape[2],) and np.array_equal(aligned[:, :, valid > 0], x)
    found = small.latents(Tensor(aligned), None, Tensor(valid))
    wanted = small.latents(Tensor(x))
    for name in ("z", "mean", "logvar"):
        assert found[name].shape == wanted[name].shape
        assert np.allclose(found[name].asnumpy(), wanted[name].asnumpy(), atol=1e-5)
    pairs = [(found["target"], wanted["target"], 1e-5), (found["code"], wanted["code"], 5e-5)]
    pairs += [(small.reconstruct(found["code"], aligned.shape), small.reconstruct(wanted["code"], x.shape), 5e-5)]
    # Decoders amplify the rounding of their latents: on 8x8 pixels tenfold, on fewer much more.
    for aligned_one, plain_one, tolerance in pairs:
        assert np.allclose(aligned_one.asnumpy()[:, :, valid > 0], plain_one.asnumpy(), atol=tolerance)


@pytest.mark.parametrize("micro_frame_size, lengths", [(17, 10), (None, 9)])
def test_lengths_up_to_34_align_to_few(small, micro_frame_size, lengths, monkeypatch):
    cut_into(small, micro_frame_size, monkeypatch)
    aligned = [small.align_frames(np.zeros((1, 3, frames, 1, 1), np.float32))[0].shape[2] for frames in range(1, 35)]
    assert len(set(aligned)) == lengths
    assert all(0 <= length - frames < 4 for frames, length in enumerate(aligned, start=1))


# What sees what.


def test_no_convolution_looks_ahead(paper):
    """Changing frame k changes no output that stands for frames before it, and does change the one at it."""
    convolutions = {name: cell for name, cell in paper.cells_and_names() if isinstance(cell, CausalConv3d)}
    assert len(convolutions) == 32
    for name, conv in convolutions.items():
        x = video(1, conv.weight.shape[1], 6, 2, 2)
        before = conv(x).asnumpy()
        for k in range(6):
            changed = Tensor(np.where(np.arange(6).reshape(1, 1, 6, 1, 1) == k, 2.0, x.asnumpy()).astype(np.float32))
            differs = (conv(changed).asnumpy() != before).any(axis=(0, 1, 3, 4))
            assert not differs[: k // conv.stride[0]].any() and differs[k // conv.stride[0]], (name, k)


def test_a_doubled_frame_rate_looks_no_further(paper):
    ups = [cell for _, cell in paper.cells_and_names() if isinstance(cell, Upsample)]
    assert len(ups) == 2
    for up in ups:
        x = video(1, up.conv.weight.shape[1], 4, 2, 2).asnumpy()
        before = up(Tensor(x)).asnumpy()
        x[:, :, 2] += 1
        differs = (up(Tensor(x)).asnumpy() != before).any(axis=(0, 1, 3, 4))
        assert differs.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("k", [16, 17, *(pytest.param(n, marks=pytest.mark.full) for n in (0, 33, 36))])
def test_a_frame_affects_only_its_own_chunk(small, k):
    """Norms span the frames of a chunk, so that within it even latents before the frame may change."""
    x = video(1, 3, 37, 4, 4).asnumpy()
    mean, y = small.encode(Tensor(x)).mean.asnumpy(), small(Tensor(x)).asnumpy()
    x[:, :, k] += 0.5
    latents = (small.encode(Tensor(x)).mean.asnumpy() != mean).any(axis=(0, 1, 3, 4))
    frames = (small(Tensor(x)).asnumpy() != y).any(axis=(0, 1, 3, 4))
    chunk = k // 17
    assert latents[5 * chunk : 5 * chunk + 5].any() and frames[k]
    assert not np.delete(latents, range(5 * chunk, min(5 * chunk + 5, len(latents)))).any()
    assert not np.delete(frames, range(17 * chunk, min(17 * chunk + 17, 37))).any()


@pytest.mark.parametrize("micro_batch_size", [1, 4, 5])
def test_micro_batches_change_nothing(small, micro_batch_size, monkeypatch):
    x = video(2, 3, 5, 6, 4)
    monkeypatch.setattr(small.spatial_vae, "micro_batch_size", None)
    mean, y = small.encode(x).mean.asnumpy(), small(x).asnumpy()
    monkeypatch.setattr(small.spatial_vae, "micro_batch_size", micro_batch_size)
    seen, encoder = [], type(small.spatial_vae.encoder).construct
    monkeypatch.setattr(
        type(small.spatial_vae.encoder), "construct", lambda self, x: (seen.append(x.shape[0]), encoder(self, x))[1]
    )
    assert np.allclose(small.encode(x).mean.asnumpy(), mean, atol=1e-5)
    assert seen == [micro_batch_size] * -(-10 // micro_batch_size)
    assert np.allclose(small(x).asnumpy(), y, atol=1e-4)


# Tiles.


@pytest.fixture
def tiled(small):
    """A function that tiles the model until the end of the test."""
    yield small.enable_tiling
    small.disable_tiling()


@pytest.mark.parametrize("height, width", [(8, 20), pytest.param(25, 36, marks=pytest.mark.full)])
def test_tiles_give_the_untiled_shape(small, tiled, height, width):
    x = video(1, 3, 6, height, width)
    tiled(spatial_tile=16, spatial_overlap=8)
    assert small.encode(x).mean.shape == small.latent_shape(x.shape)
    assert small(x).shape == small.spatial_vae(x).shape == x.shape
    assert small.decode(small.encode(x).mean, num_target_frames=6).shape == (1, 3, 6, height + height % 2, width)


def test_tiles_without_overlap_are_clips_of_their_own(small, tiled):
    x = video(1, 3, 6, 8, 16)
    halves = [small(x[..., start : start + 8]).asnumpy() for start in (0, 8)]
    one = small(x).asnumpy()
    tiled(spatial_tile=8, spatial_overlap=0)
    assert np.allclose(small(x).asnumpy(), np.concatenate(halves, axis=4), atol=1e-4)
    tiled(spatial_tile=16)
    assert np.array_equal(small(x).asnumpy(), one)  # all of it in one tile


@pytest.mark.parametrize("key", ["encode_tile", "decode_tile"])
def test_tiles_along_time_are_refused(small, key):
    with pytest.raises(ValueError, match=f"{key} is 32; it must be 0: temporal_vae already cuts time into chunks"):
        small.enable_tiling(**{key: 32})
    with pytest.raises(ValueError, match="spatial_tile is 15; it must be a positive multiple of 2"):
        small.enable_tiling(spatial_tile=15)
    assert small.tiling is None and small.spatial_vae.tiling is None


# Precision and training.


def test_noise_is_added_to_the_mean_by_the_posteriors_deviation(small):
    x = video(1, 3, 6, 4, 4)
    noise = video(*small.latent_shape(x.shape), seed=1)
    code, z, mean, logvar, _ = small.latents(x, noise).values()
    assert np.allclose(z.asnumpy(), (mean + ops.exp(0.5 * logvar) * noise).asnumpy(), atol=1e-6)
    assert np.allclose(small.code(z, 6).asnumpy(), code.asnumpy(), atol=1e-6)


def test_an_untrained_posterior_is_certain():
    logvar = create_model("temporal_vae", **SMALL).latents(video(1, 3, 4, 4, 4))["logvar"].asnumpy()
    assert np.array_equal(logvar, np.full_like(logvar, -6))


# Layers.


def test_causal_convolutions_equal_torchs():
    torch = pytest.importorskip("torch")
    for kernel, stride in ((3, 1), (3, 2), (1, 1)):
        conv = CausalConv3d(3, 4, kernel, (stride, 1, 1))
        theirs = torch.nn.Conv3d(3, 4, kernel, (stride, 1, 1), (0, kernel // 2, kernel // 2))
        x = video(2, 3, 6, 5, 4)
        with torch.no_grad():
            theirs.weight.copy_(torch.from_numpy(conv.weight.asnumpy()))
            theirs.bias.normal_()
            conv.bias.set_data(Tensor(theirs.bias.numpy()))
        leaf = torch.from_numpy(x.asnumpy()).requires_grad_()
        wanted = theirs(torch.nn.functional.pad(leaf, (0, 0, 0, 0, kernel - stride, 0)))
        wanted.square().sum().backward()
        assert relative_error(conv(x), wanted.detach().numpy()) < 1e-5
        gradient = ms.grad(lambda x: conv(x).square().sum())(x)
        assert relative_error(gradient, leaf.grad.numpy()) < 1e-5


def test_frames_come_out_of_channels_as_in_the_original():
    up, x = Upsample(3), video(2, 3, 2, 2, 4)
    channels = up.conv(x).asnumpy()  # (B, 6, T, H, W): channel 2 c + i is frame i of channel c
    wanted = channels.reshape(2, 3, 2, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(2, 3, 4, 2, 4)
    assert np.array_equal(up(x).asnumpy(), wanted)


# Configs that cannot be built.


@pytest.mark.parametrize(
    "config, message",
    [
        ({"spatial_block_out_channels": [32, 48]}, "spatial_block_out_channels is .*; it must be .* multiples"),
        ({"channel_multipliers": []}, "channel_multipliers is .*; it must be whole numbers above 0"),
        ({"temporal_downsample": [True]}, "temporal_downsample is .*; it must be 2 values, each true or false"),
        ({"micro_frame_size": 0}, "micro_frame_size is 0; it must be a whole number above 0"),
        ({"num_res_blocks": None}, "num_res_blocks is None; it must be a whole number above 0"),
        ({"scale": [1, 2]}, r"scale is \[1, 2\]; it must be a number, or 4"),
        ({"scale": [1, 2, 3, 0]}, r"scale is \[1, 2, 3, 0\]; it must be above 0"),
        ({"shift": "none"}, "shift is none; it must be a number, or 4"),
        ({"filters": 40}, "40 channels cannot be normalised in 32 groups"),
        ({"microframe_size": 4}, "temporal_vae has no config key 'microframe_size'; did you mean 'micro_frame_size'?"),
    ],
)
def test_a_config_that_cannot_be_built_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        create_model("temporal_vae", **{**SMALL, **config})
