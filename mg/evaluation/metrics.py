"""PSNR and SSIM of reconstructed frames, in float64.

SSIM follows Wang et al. 2004 (Gaussian window of 11 pixels, sigma 1.5, valid region, mean over channels) and equals
scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1,
data_range=1)`, but is several times faster.
"""

import cv2
import numpy as np

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2

# dB that an error-free frame counts as, to keep means finite.
PSNR_CEILING = 100.0

# Tolerance for rounding of values that were clipped to [0, 1].
RANGE_TOLERANCE = 1e-3


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per frame, in dB, with data range 1 and the error averaged over all channels.

    Args:
        a, b: floats (T, H, W, C) in [0, 1].

    Returns:
        float64 (T,). Equal frames give `inf`, and so does a mean over them; frames with NaN give NaN.

    Raises:
        ValueError: shapes differ or are not 4-D, or values are not floats or outside [0, 1].
    """
    _check_pair(a, b)
    errors = np.array([np.square(x.astype(np.float64) - y).mean() for x, y in zip(a, b)], dtype=np.float64)  # (T,)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(errors)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity per frame, at most 1, with data range 1.

    Args:
        a, b: floats (T, H, W, C) in [0, 1], height and width at least 11.

    Returns:
        float64 (T,). Equal frames give 1; frames with NaN give NaN.

    Raises:
        ValueError: as for `psnr`, and for frames smaller than the window.
    """
    _check_pair(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got shape {a.shape}")
    return np.array([_frame_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b)], dtype=np.float64)


def _frame_ssim(x: np.ndarray, y: np.ndarray) -> float:
    x_mean, y_mean = _window_mean(x), _window_mean(y)
    product = x_mean * y_mean
    squares = x_mean**2 + y_mean**2
    covariance = _window_mean(x * y) - product
    variances = _window_mean(x**2 + y**2) - squares  # of x plus of y
    similarity = (2 * product + SSIM_C1) * (2 * covariance + SSIM_C2)
    return (similarity / ((squares + SSIM_C1) * (variances + SSIM_C2))).mean()


def _window_mean(frame: np.ndarray) -> np.ndarray:
    """Gaussian-weighted mean around each pixel whose window is inside the frame: (H, W, C) -> (H - 10, W - 10, C)."""
    margin = SSIM_WINDOW // 2
    return cv2.GaussianBlur(frame, (SSIM_WINDOW, SSIM_WINDOW), SSIM_SIGMA)[margin:-margin, margin:-margin]


def _check_pair(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"frames to compare must both be (T, H, W, C), got shapes {a.shape} and {b.shape}")
    for frames in (a, b):
        if not np.issubdtype(frames.dtype, np.floating):
            raise ValueError(f"frames to compare must be floats in [0, 1], got {frames.dtype}")
        if frames.size and (frames.min() < -RANGE_TOLERANCE or frames.max() > 1 + RANGE_TOLERANCE):
            raise ValueError(
                f"frames must be in [0, 1], got {frames.min():.4g} to {frames.max():.4g}: scale or clip them"
            )
