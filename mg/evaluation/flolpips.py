"""LPIPS that looks where the motion went wrong, after FloLPIPS (Danier, Zhang and Bull 2022, arXiv 2207.08119).

A frame's LPIPS maps are not averaged evenly over the image but weighted by how far the flow to the next frame differs
between the two videos. The paper's flow is PWC-Net's; with another estimator (see `mg.evaluation.flow`) this is another
figure, to be compared only with figures of the same estimator.
"""

from collections.abc import Sequence

import cv2
import numpy as np


def flolpips(maps: Sequence[np.ndarray], real_flow: np.ndarray, generated_flow: np.ndarray) -> np.ndarray:
    """Flow-weighted perceptual distance of every frame that has a next one.

    At each depth the difference of the flows is interpolated linearly to the map's size, and its length, scaled to sum
    to 1 over the map, weights the map. The depths are summed. Where the flows agree everywhere there is nothing to
    prefer: the weights are even then, and the frame counts with its LPIPS.

    Args:
        maps: LPIPS' distance maps per depth, (T - 1, H_k, W_k), as `mg.losses.lpips.LPIPSMaps` gives them.
        real_flow, generated_flow: pixels (T - 1, H, W, 2), as `mg.evaluation.flow.optical_flow` gives them.

    Returns:
        float64 (T - 1,), zero for equal frames.

    Raises:
        ValueError: flows of different shapes, or maps of another number of frames.
    """
    if real_flow.shape != generated_flow.shape or any(len(map_) != len(real_flow) for map_ in maps):
        shapes = [array.shape for array in (real_flow, generated_flow, *maps)]
        raise ValueError(f"two flows (T - 1, H, W, 2) and maps (T - 1, h, w) are needed, got shapes {shapes}")
    difference = real_flow.astype(np.float64) - generated_flow
    distances = [
        sum((map_[t] * _weights(difference[t], map_.shape[1:])).sum(dtype=np.float64) for map_ in maps)
        for t in range(len(difference))
    ]
    return np.array(distances, dtype=np.float64)


def _weights(difference: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Flow difference (H, W, 2) -> weights (h, w) that sum to 1."""
    height, width = size
    lengths = np.linalg.norm(cv2.resize(difference, (width, height), interpolation=cv2.INTER_LINEAR), axis=-1)  # (h, w)
    total = lengths.sum()
    return lengths / total if total > 0 else np.full(size, 1 / lengths.size)
