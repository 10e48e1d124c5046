"""A video that is encoded and decoded by pieces gives the values of the whole video in the same tiles, to the bit."""

import numpy as np
import pytest
from mindspore import Tensor
from tiny_models import DC_AE, SMALL_HUNYUAN_VAE, SMALL_TEMPORAL_VAE

from mg import runtime
from mg.codec import Codec, Geometry
from mg.models import create_model
from mg.sampling import noise_at
from mg.tiling import Axis, TilingConfig, stretches, tiled

TAE = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
IMAGE_VAE = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}
ALONE = SMALL_TEMPORAL_VAE | {"micro_batch_size": 1}  # products of other batches round otherwise
OVERLAPPING = dict(encode_tile=8, encode_overlap=4, decode_tile=8, decode_overlap=4)

# Config, tiles, frame size, lengths: one frame, less than a tile, no multiple of anything.
CASES = {
    "tae": (TAE, dict(encode_tile=16, encode_overlap=8, decode_tile=24, decode_overlap=16), (9, 16), (1, 5, 37)),
    "dc_ae": (DC_AE | {"scaling_factor": 0.5}, OVERLAPPING, (32, 32), (1, 14)),
    "hunyuan_vae": (SMALL_HUNYUAN_VAE, OVERLAPPING, (3, 4), (1, 15)),
    "temporal_vae": (ALONE, dict(spatial_tile=4, spatial_overlap=2), (4, 5), (1, 8)),
    "image_vae": (IMAGE_VAE, dict(encode_tile=4, decode_tile=4, spatial_tile=4, spatial_overlap=2), (5, 8), (1, 11)),
}


class Reader:
    """An array that is read along time, and the pieces that were asked for."""

    def __init__(self, x: np.ndarray):
        self.x, self.asked = x, []

    def __call__(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.x.shape[2]
        self.asked.append((start, stop))
        return self.x[:, :, start:stop]


def video(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def join(pieces) -> np.ndarray:
    return np.concatenate(list(pieces), axis=2)


def assert_streams_equal_whole(model, frames: int, height: int, width: int) -> None:
    x = video(1, 3, frames, height, width)
    whole = model.encode(Tensor(x))
    read = Reader(x)
    pieces = list(model.encode_stream(read, frames))
    np.testing.assert_array_equal(join(piece.mean for piece in pieces), whole.mean.asnumpy())
    np.testing.assert_array_equal(join(piece.z for piece in pieces), join(piece.mean for piece in pieces))
    if whole.logvar is None:
        assert all(piece.logvar is None for piece in pieces)
    else:
        np.testing.assert_array_equal(join(piece.logvar for piece in pieces), whole.logvar.asnumpy())
    z = whole.mean.asnumpy()
    assert z.shape == model.latent_shape(x.shape)
    for target in (None, frames) if frames > 1 else (1,):
        wanted = model.decode(Tensor(z), target).asnumpy()
        read_z = Reader(z)
        np.testing.assert_array_equal(join(model.decode_stream(read_z, z.shape[2], target)), wanted)
    for reader in (read, read_z):
        assert reader.asked == sorted(reader.asked)
    return read.asked, read_z.asked


SLOW = ("image_vae", "temporal_vae", "dc_ae", "tae")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in SLOW)) for n in CASES])
def test_pieces_join_to_the_result_of_the_whole_in_tiles(name):
    config, tiles, size, lengths = CASES[name]
    model = create_model(name, **config)
    model.enable_tiling(**tiles)
    for frames in lengths:
        asked = assert_streams_equal_whole(model, frames, *size)
    longest = max(stop - start for start, stop in asked[0])
    assert len(asked[0]) > 1 and len(asked[1]) > 1 and longest < lengths[-1]


@pytest.mark.full
def test_graph_mode_gives_the_same():
    runtime.setup("cpu", "graph", seed=0)
    levels = {"ch_mult": [1, 1], "temporal_downsample_level": [0], "temporal_upsample_level": [1]}
    model = create_model("tae", **TAE | levels)
    model.enable_tiling(encode_tile=4, encode_overlap=2, decode_tile=4, decode_overlap=2)
    assert_streams_equal_whole(model, 7, 4, 4)


def test_along_time_a_stream_always_works_in_tiles():
    model = create_model("image_vae", **IMAGE_VAE)
    for tiles in (None, dict(encode_tile=0, decode_tile=0, decode_overlap=0, spatial_tile=4)):
        if tiles:
            model.enable_tiling(**tiles)
        read = Reader(video(1, 3, 40, 4, 6))
        assert sum(piece.mean.shape[2] for piece in model.encode_stream(read, 40)) == 40
        assert read.asked == [(0, 32), (32, 40)]
        read = Reader(video(1, 4, 40, 2, 3))
        assert [piece.shape for piece in model.decode_stream(read, 40)] == [(1, 3, 32, 4, 6), (1, 3, 8, 4, 6)]
    assert create_model("dc_ae", **DC_AE).codec._tiles_along_time().encode_overlap == 8


def test_decoding_ends_with_the_last_frame_that_is_wanted():
    model = create_model("image_vae", **IMAGE_VAE)
    model.enable_tiling(decode_tile=4)
    read = Reader(video(1, 4, 12, 2, 2))
    assert [piece.shape[2] for piece in model.decode_stream(read, 12, 6)] == [4, 2]
    assert read.asked == [(0, 4), (4, 8)]


class Doubling(Codec):
    """A codec whose networks only change sizes."""

    def __init__(self, **geometry):
        known = Geometry(3, 3, spatial=2, temporal=2, has_posterior=False, **geometry)
        tiling = TilingConfig(encode_tile=4, encode_overlap=0, decode_tile=4, decode_overlap=0, spatial_tile=0)
        super().__init__(
            known,
            lambda x: x[:, :, ::2, ::2, ::2],
            lambda z, still: z.repeat(2, 2).repeat(2, 3).repeat(2, 4),
            tiling,
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: (127 * x).astype(np.uint8), "has dtype uint8; it must be floating-point numbers"),
        (lambda x: x[:, :2], r"has shape \(1, 2, .*; it must be \(B, 3, T, H, W\)"),
        (lambda x: x[0], r"has shape \(3, .*; it must be \(B, 3, T, H, W\)"),
        (lambda x: x[:, :, :-1], "has 1 frames; it must have 2"),
    ],
)
@pytest.mark.parametrize("stream", ["encode_stream", "decode_stream"])
def test_a_piece_is_checked_as_a_clip_is(stream, change, message):
    x = video(1, 3, 4 + 2 if stream == "encode_stream" else 2 + 2, 4, 4)
    pieces = getattr(Doubling(), stream)(
        lambda start, stop: change(x[:, :, start:stop]) if start else x[:, :, :stop], x.shape[2]
    )
    assert next(pieces)[0].dtype == np.float32
    with pytest.raises(ValueError, match=r"what read\([24], [46]\) returned " + message):
        next(pieces)


def test_pieces_become_float32():
    x = video(1, 3, 6, 4, 4)
    pieces = list(Doubling().encode_stream(lambda start, stop: x[:, :, start:stop].astype(np.float64), 6))
    assert {piece.mean.dtype for piece in pieces} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(join(piece.mean for piece in pieces), x[:, :, ::2, ::2, ::2])


def test_a_length_that_cannot_be_is_an_error_before_anything_is_read():
    def read(start, stop):
        raise AssertionError("it was read")

    codec, images = Doubling(), Doubling(images_only=True)
    for call, message in (
        (lambda: codec.encode_stream(read, 0), "num_frames is 0; it must be at least 1"),
        (lambda: codec.decode_stream(read, 0), "num_latents is 0; it must be at least 1"),
        (lambda: codec.decode_stream(read, 4, -3), "num_target_frames is -3; it must be at least 1"),
        (lambda: images.encode_stream(read, 6), "the stream has 6 frames, but this export is for images"),
        (lambda: iter([codec.decode(video(1, 3, 2, 4, 4), -1)]), "num_target_frames is -1; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            next(call())


@pytest.mark.parametrize("name", ["tae", "temporal_vae"])
def test_samples_depend_on_the_seed_and_the_place_not_on_the_pieces(name):
    config, tiles, size, lengths = CASES[name]
    model = create_model(name, **config)
    model.enable_tiling(**tiles)
    x = video(1, 3, lengths[-1], *size)
    sampled = list(model.encode_stream(Reader(x), lengths[-1], seed=[7, 1]))
    wanted = model.codec.encode(x, noise_at([7, 1], 0, model.latent_shape(x.shape)))
    np.testing.assert_array_equal(join(piece.z for piece in sampled), wanted.z)
    assert not np.array_equal(wanted.z, wanted.mean)
    again, other = (join(p.z for p in model.encode_stream(Reader(x), lengths[-1], seed=seed)) for seed in ([7, 1], 8))
    np.testing.assert_array_equal(again, wanted.z)
    assert not np.array_equal(again, other)


def test_noise_is_that_of_the_frame():
    whole = noise_at(3, 0, (2, 4, 9, 5, 6))
    np.testing.assert_array_equal(noise_at(3, 4, (2, 4, 3, 5, 6)), whole[:, :, 4:7])
    assert whole.dtype == np.float32 and abs(whole.mean()) < 0.1 and abs(whole.std() - 1) < 0.1
    assert np.abs(whole[:, :, 0] - whole[:, :, 1]).min() > 0


@pytest.mark.parametrize("last", ["shift", "short"])
@pytest.mark.parametrize("lead", [0, 1])
def test_a_piece_is_finished_when_it_comes_and_needs_only_what_was_read(last, lead):
    for length in range(lead + 1, 60):
        x = np.arange(length, dtype=np.float32)
        axis = Axis(0, 12, 8, last, lead=lead)
        numbers = iter(range(1, 100))

        def fn(tile, numbers=numbers):
            return tile + next(numbers)  # what tiles say differs, so that fading shows

        read, found = [], []

        def take(start, stop, x=x, read=read):
            read.append(stop)
            return x[start:stop]

        for stretch in stretches(fn, take, length, [axis]):
            found.append(stretch)
            assert sum(map(len, found)) <= read[-1]
        numbers = iter(range(1, 100))
        np.testing.assert_array_equal(np.concatenate(found), tiled(lambda t: t + next(numbers), x, [axis]))
        assert len(read) == len(found) == len(axis.plan(length - lead))
