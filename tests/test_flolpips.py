"""LPIPS weighted by flow differences equals a plain reference of its own; the flows are what they say."""

import numpy as np
import pytest
from lpips_weights import write_random_weights

from mg.checkpoints import open_state_dict
from mg.evaluation.flolpips import flolpips
from mg.evaluation.flow import FLOWS, optical_flow
from mg.evaluation.measures import Measures, MeasuresConfig

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_random_weights(tmp_path_factory.mktemp("weights") / "lpips_alex.safetensors"))


def scene(height, width, offset):
    """A smooth random pattern seen through a window `offset` pixels further left, (H, W, 3) in [0, 1]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    frame = np.zeros((height, width, 3))
    for _ in range(12):
        a, b = rng.uniform(-0.5, 0.5, 2)
        frame += rng.uniform(0.2, 1, 3) * np.sin(a * (x - offset) + b * y + rng.uniform(0, 6))[..., None]
    return (0.5 + frame / 20).clip(0, 1).astype(np.float32)


def video_pair(frames=3, height=48, width=64):
    real = np.stack([scene(height, width, 1.5 * t) for t in range(frames)])
    generated = np.stack([scene(height, width, 2.5 * t + 0.5) for t in range(frames)])
    generated[:, : height // 2] = 0.8 * real[:, : height // 2]  # moves alike there
    return real, generated


def reference_maps(state, x, y):
    """LPIPS' maps of one pair of frames (H, W, 3) in [0, 1], with PyTorch's functions."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional

    def features(frame):
        x = torch.tensor(frame.transpose(2, 0, 1)[None].astype(np.float64)) * 2 - 1
        x = (x - torch.tensor(SHIFT)[None, :, None, None]) / torch.tensor(SCALE)[None, :, None, None]
        taps = []
        for index, stride, padding, pooled in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
            if pooled:
                x = F.max_pool2d(x, 3, 2)
            w, b = (torch.tensor(state[f"backbone.features.{index}.{part}"]).double() for part in ("weight", "bias"))
            x = F.relu(F.conv2d(x, w, b, stride, padding))
            taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    linear = [torch.tensor(state[f"linear.{k}.weight"]).double()[:, :, None, None] for k in range(5)]
    return [F.conv2d((a - b).square(), w)[0, 0].numpy() for a, b, w in zip(features(x), features(y), linear)]


def interpolate(field, height, width):
    """(H, W, 2) -> (height, width, 2), linearly between pixel centres, position by position."""
    result = np.empty((height, width, 2))
    last_row, last_column = field.shape[0] - 1, field.shape[1] - 1
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * field.shape[0] / height - 0.5, 0), last_row)
            x = min(max((j + 0.5) * field.shape[1] / width - 0.5, 0), last_column)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, last_row), min(left + 1, last_column)
            above = field[top, left] * (1 - (x - left)) + field[top, right] * (x - left)
            below = field[bottom, left] * (1 - (x - left)) + field[bottom, right] * (x - left)
            result[i, j] = above * (1 - (y - top)) + below * (y - top)
    return result


def reference(maps, difference):
    """Of one frame: at each depth the mean of the map, weighted by the length of the interpolated difference."""
    distance = 0
    for map_ in maps:
        weights = np.sqrt((interpolate(difference.astype(np.float64), *map_.shape) ** 2).sum(-1))
        distance += (map_ * weights).sum() / weights.sum()
    return distance


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("height, width", [(48, 64), (67, 45)])
def test_a_video_equals_the_plain_reference(height, width, flow, weights):
    real, generated = video_pair(3, height, width)
    found = Measures(MeasuresConfig(["lpips", "flolpips"], lpips_weights=weights, flow=flow)).of(real, generated)
    flows = [optical_flow(video, flow) for video in (real, generated)]
    with open_state_dict(weights) as state:
        tensors = {name: state[name] for name in state.shapes}
    expected = [reference(reference_maps(tensors, real[t], generated[t]), flows[0][t] - flows[1][t]) for t in range(2)]
    assert found["flolpips"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert abs(found["flolpips"] - found["lpips"]) > 0.01 * found["lpips"]  # the weights matter


def test_differences_count_only_where_the_flows_differ():
    flow = np.zeros((1, 8, 8, 2), np.float32)
    other = flow.copy()
    other[0, :, 4:] = (3, 4)
    left, right = np.zeros((2, 1, 8, 8), np.float32)
    left[..., :4], right[..., 4:] = 1, 1
    assert flolpips([left], flow, other) == 0
    assert flolpips([right], flow, other) == pytest.approx(1)
    assert flolpips([right, left, right], flow, other) == pytest.approx(2)


def test_equal_flows_weigh_evenly():
    maps = [np.random.default_rng(0).random((2, *size)) for size in ((5, 6), (3, 4))]
    flow = np.ones((2, 12, 16, 2), np.float32)
    expected = sum(map_.mean((1, 2)) for map_ in maps)
    np.testing.assert_allclose(flolpips(maps, flow, flow), expected, rtol=1e-12)
    one_differs = flow.copy()
    one_differs[1, :6] += 1
    found = flolpips(maps, flow, one_differs)
    assert found[0] == pytest.approx(expected[0]) and found[1] != pytest.approx(expected[1])


def test_shapes_that_do_not_belong_together_are_refused():
    flow = np.zeros((2, 8, 8, 2), np.float32)
    for maps, other in (([np.zeros((3, 4, 4))], flow), ([np.zeros((2, 4, 4))], flow[:, :4])):
        with pytest.raises(ValueError, match=r"\(2, 8, 8, 2\)"):
            flolpips(maps, flow, other)


@pytest.mark.parametrize("estimator", FLOWS)
def test_a_flow_says_how_far_to_the_right_and_down_pixels_move(estimator):
    frames = np.stack([scene(64, 80, 2 * t) for t in range(3)])
    flow = optical_flow(frames, estimator)
    assert flow.shape == (2, 64, 80, 2) and flow.dtype == np.float32
    for pair in flow:
        assert np.abs(np.median(pair[12:-12, 12:-12], (0, 1)) - (2, 0)).max() < 0.1
    down = optical_flow(frames.transpose(0, 2, 1, 3), estimator)
    assert np.abs(np.median(down[0, 12:-12, 12:-12], (0, 1)) - (0, 2)).max() < 0.1
    np.testing.assert_array_equal(flow, optical_flow(frames, estimator))  # the same every time


@pytest.mark.parametrize("estimator", FLOWS)
def test_still_frames_do_not_flow_and_one_frame_has_no_flow(estimator):
    frames = np.stack([scene(31, 31, 0)] * 2)
    assert np.abs(np.median(optical_flow(frames, estimator)[0], (0, 1))).max() < 1e-3
    assert optical_flow(frames[:1], estimator).shape == (0, 31, 31, 2)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="flow is 'pwc'; it must be one of dis, farneback"):
        optical_flow(np.zeros((2, 16, 16, 3)), "pwc")
