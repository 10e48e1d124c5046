"""Frames keep their content through resizing, cropping and the way to a tensor and back."""

import numpy as np
import pytest

from mg.data import transforms


def frames(height=20, width=30, num_frames=3):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "shape, size, wanted", [((20, 30), 10, (10, 15)), ((30, 20), 40, (60, 40)), ((7, 7), 7, (7, 7))]
)
def test_the_short_side_takes_the_size(shape, size, wanted):
    assert transforms.resize_short_side(frames(*shape), size).shape == (3, *wanted, 3)


@pytest.mark.parametrize(
    "shape, cover, wanted",
    [
        ((20, 30), (10, 10), (10, 15)),
        ((20, 30), (10, 20), (13, 20)),
        ((30, 20), (60, 30), (60, 40)),
        ((20, 30), (20, 24), (20, 30)),
    ],
)
def test_resizing_to_cover_a_size_makes_nothing_larger_than_needed(shape, cover, wanted):
    x = frames(*shape)
    covering = transforms.resize_to_cover(x, *cover)
    assert covering.shape == (3, *wanted, 3)
    assert np.array_equal(covering, x) == (wanted == shape)
    assert transforms.center_crop(covering, *cover).shape == (3, *cover, 3)


def test_shrinking_averages_areas():
    x = frames(20, 40)
    blocks = x.reshape(3, 10, 2, 20, 2, 3).mean(axis=(2, 4))
    assert np.abs(transforms.resize_short_side(x, 10) - blocks).max() <= 1


def test_center_crop_is_the_middle():
    x = frames(20, 30)
    assert np.array_equal(transforms.center_crop(x, 10), x[:, 5:15, 10:20])
    with pytest.raises(ValueError, match="20 x 30"):
        transforms.center_crop(x, 21)
    assert np.array_equal(transforms.center_crop(x, 12, 20), x[:, 4:16, 5:25])
    with pytest.raises(ValueError, match="12 x 31 out of frames of 20 x 30"):
        transforms.center_crop(x, 12, 31)


def test_random_crop_reaches_every_place_and_moves_with_no_frame():
    rows, columns = np.mgrid[:6, :7]
    x = np.broadcast_to(np.dstack([rows, columns, columns]), (2, 6, 7, 3)).astype(np.uint8)
    rng = np.random.default_rng(0)
    crops = [transforms.random_crop(x, 5, 5, rng) for _ in range(60)]
    assert all(np.array_equal(crop[0], crop[1]) for crop in crops)
    assert {tuple(crop[0, 0, 0, :2]) for crop in crops} == {(r, c) for r in range(2) for c in range(3)}


def test_flip_mirrors_left_and_right():
    x = frames()
    assert np.array_equal(transforms.horizontal_flip(x)[:, :, 0], x[:, :, -1])


def test_color_jitter_keeps_the_picture():
    x = frames()
    drawn = [transforms.jitter_colors(x, np.random.default_rng(seed)) for seed in range(8)]
    assert len({y.tobytes() for y in drawn}) == 8
    for y in drawn:
        assert y.shape == x.shape and y.dtype == np.uint8
        links = [[abs(np.corrcoef(x[..., a].ravel(), y[..., b].ravel())[0, 1]) for a in range(3)] for b in range(3)]
        assert sorted(np.argmax(links, axis=1)) == [0, 1, 2] and np.max(links, axis=1).min() > 0.99


def test_tensor_and_back_is_exact():
    x = frames()
    tensor = transforms.to_video_tensor(x)
    assert tensor.shape == (3, 3, 20, 30) and tensor.dtype == np.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(tensor[1, 2], x[2, ..., 1] / np.float32(127.5) - 1)
    assert np.array_equal(transforms.to_uint8_frames(tensor), x)
    assert transforms.to_uint8_frames(np.full((3, 1, 2, 2), 1.7)).max() == 255
