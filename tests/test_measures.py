"""Measures of one video against another: each equals its own definition, and what cannot be taken is left out aloud."""

import numpy as np
import pytest
from lpips_weights import write_random_weights
from mindspore import Tensor
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mg.evaluation.measures import METRICS, Measures, MeasuresConfig
from mg.losses.lpips import LPIPS, LPIPSWeightsError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_random_weights(tmp_path_factory.mktemp("weights") / "lpips_alex.safetensors"))


def video_pair(frames=4, height=40, width=44, seed=0):
    """A pattern that drifts, and a copy with noise that drifts faster, in [0, 1]."""
    rng = np.random.default_rng(seed)
    t, y, x, c = np.meshgrid(*map(np.arange, (frames, height, width, 3)), indexing="ij")
    videos = [0.5 + 0.4 * np.sin(0.4 * (x - speed * t) + c) * np.cos(0.3 * y) for speed in (0.5, 1)]
    real, generated = np.float32(videos)
    return real, np.clip(generated + 0.03 * rng.standard_normal(real.shape), 0, 1).astype(np.float32)


def test_every_measure_is_the_mean_of_its_definition_over_the_frames(weights, mode):
    real, generated = video_pair()
    measures = Measures(MeasuresConfig(lpips_weights=weights))
    assert measures.names == list(METRICS) and measures.left_out == {}
    found = measures.of(real, generated)
    assert list(found) == list(METRICS) and all(isinstance(value, float) for value in found.values())
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(real, generated)]
    expected = {
        "psnr": np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]),
        "ssim": np.mean(
            [
                structural_similarity(
                    a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=1
                )
                for a, b in pairs
            ]
        ),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6)
    x, y = (Tensor(video.transpose(0, 3, 1, 2) * 2 - 1) for video in (real, generated))
    assert found["lpips"] == pytest.approx(LPIPS("alex", weights)(x, y).asnumpy().mean(), rel=1e-5)


def test_lpips_looks_through_the_network_asked_for(weights, tmp_path):
    real, generated = video_pair(2, 32, 36)
    vgg = write_random_weights(tmp_path / "lpips_vgg.safetensors", "vgg")
    measures = Measures(MeasuresConfig(["lpips"], "vgg", str(vgg)))
    x, y = (Tensor(video.transpose(0, 3, 1, 2) * 2 - 1) for video in (real, generated))
    assert measures.of(real, generated)["lpips"] == pytest.approx(LPIPS("vgg", vgg)(x, y).asnumpy().mean(), rel=1e-5)
    assert "vgg" in measures.describe()["lpips"]


@pytest.mark.parametrize("limit, sizes", [(4 * 31 * 31, [3, 3]), (5 * 31 * 31, [5]), (100, [1] * 5)])
def test_long_videos_run_in_chunks_of_one_shape_and_count_every_frame_once(limit, sizes, weights, monkeypatch):
    monkeypatch.setattr("mg.evaluation.measures.CHUNK_PIXELS", limit)
    measures = Measures(MeasuresConfig(["lpips"], lpips_weights=weights))
    network, shapes = measures._lpips, []
    monkeypatch.setattr(measures, "_lpips", lambda x, y: shapes.append(x.shape) or network(x, y))
    real, generated = video_pair(5, 31, 31)
    found = measures.of(real, generated)["lpips"]
    assert [shape[0] for shape in shapes] == sizes
    single = [measures.of(real[t : t + 1], generated[t : t + 1])["lpips"] for t in range(len(real))]
    assert found == pytest.approx(np.mean(single), rel=1e-6)


def test_equal_videos_score_best(weights):
    real, _ = video_pair()
    assert Measures(MeasuresConfig(lpips_weights=weights)).of(real, real) == pytest.approx(
        {"psnr": 100, "ssim": 1, "lpips": 0, "flolpips": 0}
    )


def test_a_single_frame_has_no_flolpips(weights):
    real, generated = video_pair(1)
    measures = Measures(MeasuresConfig(lpips_weights=weights))
    assert list(measures.of(real, generated)) == ["psnr", "ssim", "lpips"]


def test_measures_come_in_the_requested_order():
    measures = Measures(MeasuresConfig(["ssim", "psnr", "ssim"]))
    assert measures.names == ["ssim", "psnr"] == list(measures.of(*video_pair(1, 12, 12))) == list(measures.describe())
    assert measures.left_out == {}


def test_without_weights_lpips_and_flolpips_are_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measures = Measures(MeasuresConfig())
    assert measures.names == ["psnr", "ssim"] == list(measures.of(*video_pair(2)))
    assert list(measures.left_out) == ["lpips", "flolpips"]
    for line in measures.left_out.values():
        for part in ("models/lpips_alex.safetensors", "mg-convert-lpips --net alex", "weights/v0.1/alex.pth"):
            assert part in line
        assert "\n" not in line and "--loss" not in line
    vgg = Measures(MeasuresConfig(["lpips"], "vgg"))
    assert vgg.names == [] and "models/lpips_vgg.safetensors" in vgg.left_out["lpips"]


def test_weights_that_do_not_fit_are_an_error(weights):
    with pytest.raises(LPIPSWeightsError, match="does not fit LPIPS with vgg"):
        Measures(MeasuresConfig(["flolpips"], "vgg", weights))


@pytest.mark.parametrize("flow, title", [("dis", "OpenCV DIS"), ("farneback", "OpenCV Farneback")])
def test_descriptions_name_the_network_and_the_flow(flow, title, weights):
    lines = Measures(MeasuresConfig(lpips_weights=weights, flow=flow)).describe()
    assert list(lines) == list(METRICS) and "dB" in lines["psnr"] and "alex" in lines["lpips"]
    for part in (title, "alex", "not comparable with PWC-Net"):
        assert part in lines["flolpips"]


@pytest.mark.parametrize("metric", [[], ["psnr", "fvd"]])
def test_an_unknown_metric_is_refused_with_the_known_ones(metric):
    with pytest.raises(ValueError, match="metric is .*one or more of psnr, ssim, lpips, flolpips"):
        MeasuresConfig(metric)


@pytest.mark.parametrize(
    "bad, message", [(np.nan, "not finite"), (np.inf, "not finite"), (-0.5, r"\[0, 1\], got -0.5"), (2, r"to 2")]
)
@pytest.mark.parametrize("metric", ["psnr", "lpips"])
def test_invalid_pixel_values_are_refused(metric, bad, message, weights):
    real, generated = video_pair(2, 31, 31)
    generated[1, 2, 3] = bad
    with pytest.raises(ValueError, match=f"the generated video .*{message}"):
        Measures(MeasuresConfig([metric], lpips_weights=weights)).of(real, generated)
    with pytest.raises(ValueError, match="the real video .*not floats: uint8"):
        Measures(MeasuresConfig([metric], lpips_weights=weights)).of(real.astype(np.uint8), real.astype(np.uint8))


@pytest.mark.parametrize("shape", [(3, 12, 12, 3), (2, 12, 13, 3), (2, 12, 12, 1), (0, 12, 12, 3), (12, 12, 3)])
def test_shapes_that_cannot_be_compared_are_refused(shape):
    with pytest.raises(ValueError, match=r"must both be \(T, H, W, 3\)"):
        Measures(MeasuresConfig(["psnr"])).of(video_pair(2, 12, 12)[0], np.zeros(shape, np.float32))
    if shape[-1] != 3 or not shape[0]:
        with pytest.raises(ValueError, match=r"must both be \(T, H, W, 3\)"):
            Measures(MeasuresConfig(["psnr"])).of(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
