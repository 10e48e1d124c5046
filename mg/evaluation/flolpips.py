"""LPIPS weighted by motion errors, after FloLPIPS (Danier, Zhang and Bull 2022, arXiv 2207.08119).

A frame's LPIPS maps are not averaged uniformly over the image but weighted by how much the flow to the next frame
differs between the two videos. The paper uses PWC-Net flow; with another estimator (see `mg.evaluation.flow`) the
values differ and can only be compared with those of the same estimator.
"""

from collections.abc import Sequence

import cv2
import numpy as np


def flolpips(maps: Sequence[np.ndarray], real_flow: np.ndarray, generated_flow: np.ndarray) -> np.ndarray:
    """Flow-weighted perceptual distance of every frame that has a next one.

    At each depth the flow difference is interpolated linearly to the map's size, and its length, normalized to sum
    to 1 over the map, weights the map. The depths are summed. If the flows agree everywhere, the weights are uniform
    and the result is the frame's plain LPIPS.

    Args:
        maps: LPIPS distance maps per depth, (T - 1, H_k, W_k), from `mg.losses.lpips.LPIPSMaps`.
        real_flow, generated_flow: pixels (T - 1, H, W, 2), from `mg.evaluation.flow.optical_flow`.

    Returns:
        float64 (T - 1,), zero for equal frames.

    Raises:
        ValueError: the flows' shapes differ, or the maps have another number of frames.
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
