"""PSNR and SSIM equal their definitions and scikit-image; the plain baseline keeps what interpolation can keep."""

import numpy as np
import pytest
from scipy.fft import dctn
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mg.data.synthetic import TRAIN_PHOTOGRAPHS, ClipSettings, draw_clip
from mg.evaluation.baseline import DCT_PLACES, area_trilinear_baseline, dct_baseline
from mg.evaluation.metrics import psnr, ssim


def video_pair(shape, noise=0.05, dtype=np.float32):
    """Smooth frames and a noisy copy, both in [0, 1]."""
    rng = np.random.default_rng(0)
    t, y, x, c = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    video = 0.5 + 0.4 * np.sin(0.3 * x + 0.2 * t + c) * np.cos(0.17 * y)
    return video.astype(dtype), np.clip(video + noise * rng.standard_normal(shape), 0, 1).astype(dtype)


@pytest.mark.parametrize("shape", [(3, 48, 40, 3), (2, 11, 11, 3), (1, 33, 12, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ssim_equals_scikit_image(shape, dtype):
    a, b = video_pair(shape, dtype=dtype)
    expected = [
        structural_similarity(
            x.astype(np.float64),
            y.astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
            data_range=1,
        )
        for x, y in zip(a, b)
    ]
    result = ssim(a, b)
    assert result.dtype == np.float64 and result.shape == shape[:1]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
    assert (result < 0.99).all()


def test_ssim_looks_only_at_whole_windows():
    """Worked out window by window, without a filter that would have to invent pixels beyond the border."""
    a, b = video_pair((1, 14, 13, 1), dtype=np.float64)
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(4):
        for left in range(3):
            x, y = (v[0, top : top + 11, left : left + 11, 0] for v in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    np.testing.assert_allclose(ssim(a, b), [np.mean(values)], rtol=0, atol=1e-9)


def test_psnr_equals_scikit_image():
    a, b = video_pair((4, 20, 22, 3))
    expected = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a, b)]
    result = psnr(a, b)
    assert result.dtype == np.float64 and result.shape == (4,)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_psnr_of_a_known_error():
    a = np.full((2, 8, 8, 3), 0.5)
    np.testing.assert_allclose(psnr(a, a + 0.1), [20, 20], atol=1e-9)


def test_equal_frames_give_infinite_psnr_and_ssim_one():
    a, b = video_pair((2, 16, 16, 3))
    b[0] = a[0]
    assert psnr(a, b)[0] == np.inf and np.isfinite(psnr(a, b)[1])
    np.testing.assert_allclose(ssim(a, b)[0], 1, atol=1e-9)


def test_a_frame_of_nan_gives_nan_and_leaves_the_others():
    a, b = video_pair((2, 16, 16, 3))
    b[0, 3, 3] = np.nan
    for metric in (psnr, ssim):
        result = metric(a, b)
        assert np.isnan(result[0]) and np.isfinite(result[1])


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros((1, 16, 16, 3)), np.zeros((2, 16, 16, 3)), r"\(1, 16, 16, 3\) and \(2, 16, 16, 3\)"),
        (np.zeros((16, 16, 3)), np.zeros((16, 16, 3)), r"\(T, H, W, C\)"),
        (np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8), "uint8"),
        (np.zeros((1, 16, 16, 3)), np.full((1, 16, 16, 3), 255.0), "255 to 255"),
        (np.full((1, 16, 16, 3), -1.0), np.zeros((1, 16, 16, 3)), "-1 to -1"),
    ],
)
def test_frames_that_cannot_be_compared_are_refused(metric, a, b, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b)


@pytest.mark.parametrize("shape", [(1, 10, 32, 3), (1, 32, 10, 3)])
def test_ssim_refuses_frames_smaller_than_its_window(shape):
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(np.zeros(shape), np.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 16, 32, 24), (3, 1, 8, 8), (3, 1, 3, 5), (2, 3, 17, 33, 19)])
def test_baseline_keeps_size_and_constants(shape):
    x = np.full(shape, -0.3, np.float32)
    result = area_trilinear_baseline(x)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32, 40), (29, 37, 43)])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_baseline_reproduces_a_ramp_between_the_outer_cell_centres(size, axis):
    ramp = np.arange(size[axis - 1], dtype=np.float64).reshape([-1 if i == axis else 1 for i in range(4)])
    x = np.broadcast_to(ramp, (2, *size))
    # Inside the centres of the first and the last whole cell; a cell filled up with edge values is off the ramp.
    inside = np.arange(4, size[axis - 1] // 8 * 8 - 4)
    np.testing.assert_allclose(area_trilinear_baseline(x).take(inside, axis), x.take(inside, axis), atol=1e-9)


def test_baseline_averages_cells_and_interpolates_between_their_centres():
    x = np.zeros((1, 1, 1, 4))
    x[..., 2:] = [[1, 3]]  # cells of two: 0 and 2, centred at 0.5 and 2.5
    np.testing.assert_allclose(area_trilinear_baseline(x, temporal=1, spatial=2)[0, 0, 0], [0, 0.5, 1.5, 2])


def test_baseline_takes_each_axis_by_its_own_factor():
    x = np.random.default_rng(0).random((3, 6, 10, 7))
    np.testing.assert_array_equal(area_trilinear_baseline(x, temporal=1, spatial=1), x)
    moving = np.broadcast_to(x[:, :, :1, :1], x.shape)  # changes over time only
    np.testing.assert_allclose(area_trilinear_baseline(moving, temporal=1, spatial=8), moving, atol=1e-12)


@pytest.mark.parametrize("x", [np.zeros((4, 8, 8)), np.zeros((3, 4, 8, 8), np.uint8)])
def test_baseline_refuses_what_is_not_a_float_video(x):
    with pytest.raises(ValueError, match=r"\(C, T, H, W\)"):
        area_trilinear_baseline(x)


def test_the_dct_baseline_keeps_what_it_keeps_and_nothing_else():
    video = np.random.default_rng(0).uniform(-1, 1, (3, 8, 16, 24))
    kept = dct_baseline(video)
    assert kept.shape == video.shape and len(set(DCT_PLACES)) == 16
    for row in range(2):
        for column in range(3):
            block = np.s_[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            wanted = dctn(video[block], norm="ortho")
            found = dctn(kept[block], norm="ortho")  # (colours, t, y, x)
            for t, y, x, colour in DCT_PLACES:
                assert found[colour, t, y, x] == pytest.approx(wanted[colour, t, y, x])
                found[colour, t, y, x] = 0
            np.testing.assert_allclose(found, 0, atol=1e-12)
    np.testing.assert_allclose(dct_baseline(kept), kept, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 16, 32, 24), (3, 1, 8, 8), (3, 1, 3, 5), (3, 17, 33, 19)])
def test_the_dct_baseline_keeps_size_and_colours_that_do_not_change(shape):
    x = np.broadcast_to(np.array([0.9, -0.3, 0.1], np.float32).reshape(3, 1, 1, 1), shape)
    result = dct_baseline(x)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, x, rtol=0, atol=1e-5)


def test_the_dct_baselines_places_are_right_for_moving_photographs():
    settings = ClipSettings(size=64, num_frames=16)
    clips = [draw_clip(TRAIN_PHOTOGRAPHS, number, settings)[0] for number in (0, 1, 5)]
    for clip in clips:
        x = clip.transpose(3, 0, 1, 2) / 127.5 - 1
        lost = [np.square(x - made).mean() for made in (dct_baseline(x), area_trilinear_baseline(x))]
        assert lost[0] < lost[1] / 1.5, "as many values as a latent's are no better than three colours"


@pytest.mark.parametrize("x", [np.zeros((1, 8, 8, 8)), np.zeros((2, 3, 8, 8, 8)), np.zeros((3, 8, 8, 8), np.uint8)])
def test_the_dct_baseline_refuses_what_is_not_one_video_in_colour(x):
    with pytest.raises(ValueError, match=r"needs floats \(3, T, H, W\)"):
        dct_baseline(x)
