"""Tiling returns exactly the untiled shape, blends linearly, and shows a model few shapes, one tile at a time."""

import itertools
import re

import mindspore as ms
import numpy as np
import pytest

from mg.models.autoencoder import on_host
from mg.tiling import Axis, TilingConfig, plan, tiled

RNG = np.random.default_rng(0)


def shrink(x, factor, dim):
    """A local encoder: means of `factor` neighbours, a last group of fewer included."""
    starts = np.arange(0, x.shape[dim], factor)
    sizes = np.minimum(starts + factor, x.shape[dim]) - starts
    shape = [1] * x.ndim
    shape[dim] = -1
    return np.add.reduceat(x, starts, axis=dim) / sizes.reshape(shape)


class Recorder:
    """A model that notes the shapes it was shown."""

    def __init__(self, fn=lambda tile: tile):
        self.fn, self.shapes = fn, []

    def __call__(self, tile):
        assert tile.flags["C_CONTIGUOUS"]
        self.shapes.append(tile.shape)
        return self.fn(tile)


@pytest.mark.parametrize("last", ["shift", "short"])
@pytest.mark.parametrize("align", [1, 4])
def test_a_plan_covers_every_length_once_in_order_without_idle_tiles(last, align):
    for tile, overlap in [(4, 0), (8, 0), (8, 4), (16, 12), (32, 8)]:
        for length in range(1, 71):
            tiles = plan(length, tile, overlap, last, align)
            assert tiles[0][0] == 0 and tiles[-1][1] == length
            assert all(start % align == 0 and 0 < stop - start <= tile for start, stop in tiles)
            for (start, stop), (next_start, next_stop) in itertools.pairwise(tiles):
                assert start < next_start <= stop - overlap and next_stop > stop


def test_the_last_tile_shifts_back_to_full_size_or_is_cut_short():
    assert plan(21, 8, 4, "shift") == [(0, 8), (4, 12), (8, 16), (12, 20), (13, 21)]
    assert plan(21, 8, 4, "short") == [(0, 8), (4, 12), (8, 16), (12, 20), (16, 21)]
    assert plan(21, 8, 4, "shift", align=4)[-1] == (16, 21)  # no multiple of 4 is nearer
    assert plan(40, 32, 0, "shift") == [(0, 32), (32, 40)]  # without overlap tiles stay where they are
    assert plan(33, 32, 0) == [(0, 32), (32, 33)]
    assert plan(5, 8, 4) == [(0, 5)]


@pytest.mark.parametrize("last", ["shift", "short"])
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_a_local_model_gives_the_same_tiled_and_whole_for_any_size(last, factor):
    for length, (tile, overlap) in itertools.product(range(1, 71), [(1, 0), (2, 0), (2, 1), (4, 3), (5, 2)]):
        x = RNG.normal(size=(2, length)).astype(np.float32)
        encode = Axis(1, tile * factor, overlap * factor, last, down=factor)
        whole = shrink(x, factor, 1)
        np.testing.assert_array_equal(tiled(lambda part: shrink(part, factor, 1), x, [encode]), whole)
        decode = Axis(1, tile, overlap, last, up=factor)
        np.testing.assert_array_equal(tiled(lambda part: part.repeat(factor, 1), x, [decode]), x.repeat(factor, 1))


@pytest.mark.parametrize("shape", [(1, 2, 1, 16, 16), (1, 2, 9, 33, 70), (2, 1, 33, 17, 40), (1, 1, 40, 8, 7)])
def test_all_three_axes_tiled_at_once_change_nothing_for_a_local_model(shape):
    config = TilingConfig(16, 8, 16, 8, spatial_tile=16, spatial_overlap=8)
    x = RNG.normal(size=shape).astype(np.float32)

    def encode(video):
        return shrink(shrink(shrink(video, 8, 2), 8, 3), 8, 4)

    def decode(latents):
        return latents.repeat(8, 2).repeat(8, 3).repeat(8, 4)

    z = tiled(encode, x, config.encode_axes(8, 8))
    np.testing.assert_array_equal(z, encode(x))
    np.testing.assert_array_equal(tiled(decode, z, config.decode_axes(8, 8)), decode(z))


def test_the_later_tile_fades_in_along_a_linear_ramp():
    numbers = itertools.count()
    joined = tiled(lambda tile: np.full_like(tile, next(numbers)), np.zeros(12, np.float32), [Axis(0, 8, 4)])
    np.testing.assert_array_equal(joined, [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_a_corner_blends_bilinearly():
    values = iter([1, 2, 3, 4])
    axes = [Axis(0, 4, 2), Axis(1, 4, 2)]
    joined = tiled(lambda tile: np.full_like(tile, next(values)), np.zeros((6, 6), np.float32), axes)
    ramp = np.array([0, 0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(joined, 1 + ramp[None, :] + 2 * ramp[:, None])


@pytest.mark.parametrize("last", ["shift", "short"])
def test_blending_is_a_partition_of_unity(last):
    for length, (tile, overlap) in itertools.product(range(1, 40), [(4, 2), (7, 3), (8, 7), (8, 0)]):
        count = len(plan(length, tile, overlap, last))
        weights = []  # the share of each tile in the result, one tile at a time
        for one in range(count):
            shares = iter(np.eye(count)[one])
            axes = [Axis(0, tile, overlap, last)]
            weights.append(tiled(lambda part: np.full_like(part, next(shares)), np.zeros(length, np.float32), axes))
        assert np.min(weights) >= 0
        assert all(np.max(share) > 0 for share in weights)
        np.testing.assert_allclose(np.sum(weights, axis=0), 1, rtol=0, atol=1e-6)


def test_a_shifted_plan_shows_a_model_one_shape_whatever_the_size():
    for height, width in [(17, 23), (32, 100), (71, 19)]:
        model = Recorder()
        tiled(model, np.zeros((height, width), np.float32), [Axis(0, 16, 4), Axis(1, 16, 4)])
        assert set(model.shapes) == {(16, 16)}
        assert len(model.shapes) == len(plan(height, 16, 4)) * len(plan(width, 16, 4))


def test_what_a_model_sees_does_not_grow_with_the_frame_or_the_video():
    axes = TilingConfig(spatial_tile=64, spatial_overlap=16).decode_axes(8, 8)
    seen = []
    for t, h, w in [(4, 8, 8), (5, 20, 30), (16, 40, 40)]:
        model = Recorder(lambda z: z.repeat(8, 2).repeat(8, 3).repeat(8, 4))
        assert tiled(model, np.zeros((1, 1, t, h, w), np.float32), axes).shape == (1, 1, t * 8, h * 8, w * 8)
        seen.append(max(np.prod(shape) for shape in model.shapes))
    assert seen == [4 * 8 * 8] * 3


def test_time_is_the_outer_loop_and_columns_the_inner_one():
    x = np.arange(4 * 4 * 4, dtype=np.float32).reshape(1, 1, 4, 4, 4)
    model = Recorder(lambda tile: corners.append(tile.flat[0]) or tile)
    corners = []
    tiled(model, x, [Axis(dim, 2) for dim in (2, 3, 4)])
    assert corners == [0, 2, 8, 10, 32, 34, 40, 42]


def test_movie_gen_encodes_in_32_frame_tiles_and_decodes_with_16_frames_shared():
    config = TilingConfig()
    (encode,), (decode,) = config.encode_axes(8, 8), config.decode_axes(8, 8)
    assert encode.plan(70) == [(0, 32), (32, 64), (64, 70)]
    assert encode.scaled(70) == 9
    assert decode.plan(9) == [(0, 4), (2, 6), (4, 8), (5, 9)]
    assert encode.plan(1) == decode.plan(1) == [(0, 1)]  # an image is one tile


def test_dc_ae_keeps_192_of_256_pixels_and_6_of_8_latents():
    config = TilingConfig.from_tile_sizes(4, 32)
    assert config == TilingConfig(32, 8, 32, 8, spatial_tile=256, spatial_overlap=64, last="short")
    time, rows, columns = config.encode_axes(4, 32)
    assert rows.plan(640) == columns.plan(640) == [(0, 256), (192, 448), (384, 640)]
    assert [rows.scaled(start) for start, _ in rows.plan(640)] == [0, 6, 12]
    assert time.plan(40) == [(0, 32), (24, 40)]
    latent_time, latent_rows, _ = config.decode_axes(4, 32)
    assert latent_rows.plan(20) == [(0, 8), (6, 14), (12, 20)]
    assert (latent_rows.tile - latent_rows.overlap) * latent_rows.up == 192
    assert (latent_time.tile - latent_time.overlap) * latent_time.up == 24


@pytest.mark.parametrize("temporal_tile_size", [4, 12, 32, 36, 96])
@pytest.mark.parametrize("spatial_tile_size", [32, 96, 256, 320])
@pytest.mark.parametrize("factor", [0, 0.25, 0.3, 0.9])
def test_tile_sizes_other_than_the_trained_ones_keep_every_frame_and_pixel(
    temporal_tile_size, spatial_tile_size, factor
):
    config = TilingConfig.from_tile_sizes(
        4,
        32,
        temporal_tile_size=temporal_tile_size,
        spatial_tile_size=spatial_tile_size,
        tile_overlap_factor=factor,
    )
    for frames, size in [(52, 512), (76, 32), (96, 352)]:  # the first two lose 3 frames each in the original
        z = RNG.normal(size=(1, 1, frames // 4, size // 32, 1)).astype(np.float32)
        x = z.repeat(4, 2).repeat(32, 3).repeat(32, 4)
        np.testing.assert_array_equal(tiled(lambda part: part[:, :, ::4, ::32, ::32], x, config.encode_axes(4, 32)), z)
        decoded = tiled(lambda part: part.repeat(4, 2).repeat(32, 3).repeat(32, 4), z, config.decode_axes(4, 32))
        np.testing.assert_array_equal(decoded, x)


def test_the_overlap_is_a_share_of_the_tile_in_whole_latents():
    config = TilingConfig.from_tile_sizes(4, 32, True, True, 320, 40, 0.25)  # 10 latents each way
    assert (config.encode_overlap, config.decode_overlap, config.spatial_overlap) == (8, 8, 64)


def test_space_and_time_are_tiled_on_their_own():
    assert TilingConfig.from_tile_sizes(4, 32, use_temporal_tiling=False) == TilingConfig(0, 0, 0, 0, 256, 64, "short")
    assert TilingConfig.from_tile_sizes(4, 32, use_spatial_tiling=False) == TilingConfig(32, 8, 32, 8, 0, 0, "short")
    assert TilingConfig.from_tile_sizes(4, 32, False, False, 1, 1).encode_axes(4, 32) == []  # sizes not in use


@pytest.mark.parametrize("spatial_tile, dims", [(0, []), (64, [3, 4])])
def test_a_temporal_tile_of_0_leaves_time_whole(spatial_tile, dims):
    config = TilingConfig(encode_tile=0, decode_tile=0, spatial_tile=spatial_tile)
    assert [axis.dim for axis in config.encode_axes(8, 8)] == dims
    assert [axis.dim for axis in config.decode_axes(8, 8)] == dims
    assert [axis.dim for axis in TilingConfig(encode_tile=0).decode_axes(8, 8)] == [2]


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(spatial_tile_size=100), "spatial_tile_size is 100; it must be a positive multiple of 32"),
        (dict(spatial_tile_size=0), "spatial_tile_size is 0; it must be a positive multiple of 32"),
        (dict(temporal_tile_size=30), "temporal_tile_size is 30; it must be a positive multiple of 4"),
        (dict(tile_overlap_factor=1.0), "tile_overlap_factor is 1.0; it must be at least 0 and below 1"),
        (dict(tile_overlap_factor=-0.1), "tile_overlap_factor is -0.1; it must be at least 0 and below 1"),
    ],
)
def test_tile_sizes_that_do_not_fit_are_named_with_a_remedy(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TilingConfig.from_tile_sizes(4, 32, **sizes)


def test_a_causal_model_maps_4k_plus_1_frames_tiled_as_whole():
    def encode(x):
        return np.concatenate([x[:1], shrink(x[1:], 4, 0)]) if len(x) > 1 else x

    def decode(z):
        return np.concatenate([z[:1], z[1:].repeat(4, 0)])

    for k, last in itertools.product(range(12), ["shift", "short"]):
        x = RNG.normal(size=4 * k + 1).astype(np.float32)
        z = tiled(encode, x, [Axis(0, 16, 4, last, down=4, lead=1)])
        np.testing.assert_array_equal(z, encode(x))
        np.testing.assert_array_equal(tiled(decode, z, [Axis(0, 4, 1, last, up=4, lead=1)]), decode(z))


def test_neighbours_in_space_share_a_quarter_of_the_tile_unless_told_otherwise():
    for spatial_tile, overlap, shared in [(256, None, 64), (72, None, 16), (8, None, 0), (64, 0, 0), (64, 32, 32)]:
        config = TilingConfig(spatial_tile=spatial_tile, spatial_overlap=overlap)
        assert [axis.overlap for axis in config.encode_axes(8, 8)[1:]] == [shared] * 2
        assert [axis.overlap for axis in config.decode_axes(8, 8)[1:]] == [shared // 8] * 2


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_the_device_sees_tensors_of_tiles_and_the_host_joins_arrays(dtype):
    x = np.arange(2 * 11, dtype=np.float32).reshape(2, 11)
    shapes = set()

    def double(tile):
        shapes.add(tile.shape)
        assert isinstance(tile, ms.Tensor) and tile.dtype == ms.float32
        return (tile * 2).astype(dtype)

    y = tiled(on_host(double), x, [Axis(1, 4, 2)])
    assert y.dtype == np.float32 and shapes == {(2, 4)}
    np.testing.assert_array_equal(y, x * 2)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(encode_tile=12), "encode_tile is 12; it must be a positive multiple of 8"),
        (dict(decode_tile=-8), "decode_tile is -8; it must be a positive multiple of 8"),
        (dict(decode_overlap=32), "decode_overlap is 32; it must be a multiple of 8 from 0 to 24, since decode_"),
        (dict(encode_overlap=-8), "encode_overlap is -8; it must be a multiple of 8 from 0 to 24"),
        (dict(spatial_tile=100), "spatial_tile is 100; it must be a positive multiple of 16"),
        (dict(spatial_tile=64, spatial_overlap=8), "spatial_overlap is 8; it must be a multiple of 16 from 0 to 48"),
        (dict(spatial_overlap=16), "spatial_overlap is 16, spatial_tile 0"),
        (dict(last="middle"), "last is 'middle'; it must be one of shift, short"),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_a_remedy(fields, message):
    for axes in ("encode_axes", "decode_axes"):
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(TilingConfig(**fields), axes)(8, 16)


def test_a_model_of_another_scale_is_reported():
    with pytest.raises(ValueError, match="tile of 8 samples along dimension 0 came back with 8; 4 are right"):
        tiled(lambda tile: tile, np.zeros(20, np.float32), [Axis(0, 8, 4, down=2)])
