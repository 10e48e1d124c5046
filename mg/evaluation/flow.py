"""Optical flow between consecutive frames, by estimators that need no weights. Results based on flow depend on the
estimator and must name it."""

import itertools
from collections.abc import Callable

import cv2
import numpy as np


def optical_flow(frames: np.ndarray, estimator: str = "dis") -> np.ndarray:
    """The motion of each pixel from every frame to the next one, in pixels.

    The estimators work on 8-bit grey levels.

    Args:
        frames: floats (T, H, W, 3) in [0, 1], of at least 12 pixels a side.
        estimator: one of `FLOWS`.

    Returns:
        float32 (T - 1, H, W, 2): right and down.

    Raises:
        ValueError: an unknown estimator.
    """
    if estimator not in FLOWS:
        raise ValueError(f"flow is {estimator!r}; it must be one of {', '.join(FLOWS)}")
    levels = np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in levels]  # (H, W) each
    flows = [FLOWS[estimator](before, after) for before, after in itertools.pairwise(grey)]
    return np.stack(flows) if flows else np.empty((0, *frames.shape[1:3], 2), np.float32)


def _dis(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Dense inverse search, Kroeger et al. 2016 (arXiv 1603.03590), with OpenCV's preset `medium`."""
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(before, after, None)


def _farneback(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Polynomial expansion, Farneback 2003, with the settings of OpenCV's own examples."""
    return cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)


FLOWS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"dis": _dis, "farneback": _farneback}

# Names for tables.
FLOW_TITLES = {"dis": "OpenCV DIS", "farneback": "OpenCV Farneback"}
