"""Reconstructions of a few fixed clips, drawn during training."""

from itertools import chain
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mg.data.loader import ClipLoader
from mg.data.transforms import to_uint8_frames
from mg.data.video import write_image
from mg.models.autoencoder import VideoAutoencoder

_FRAMES = 8  # drawn per clip
_SEARCHED = 100  # steps that are searched for clips


class Previews:
    """Draws the first clips that a run trains on, and their reconstructions.

    The clips are those of the first worker's first steps, and so are fixed by the config; images are used only if there
    are too few videos. Nothing that training depends on changes: no generator, no statistics, no count of bad files.

    Args:
        folder: where the pictures go.
        loader: of the run.
        count: most clips to draw.
    """

    def __init__(self, folder: Path, loader: ClipLoader, count: int):
        self.folder, self.loader, self.count = folder, loader, count
        self._clips: list[np.ndarray] | None = None

    def draw(self, model: VideoAutoencoder, step: int) -> Path | None:
        """Write step_N.png, which has two rows per clip: up to eight of its frames, evenly spaced, and below them their
        reconstructions from the posterior's mean. None if there is no clip to draw."""
        if self._clips is None:
            self._clips = _first_clips(self.loader, self.count)
        strips = []
        for x in self._clips:  # one by one, to save memory; (3, T, H, W)
            y = model(Tensor(x[None])).asnumpy()[0]
            strips += [_strip(x), _strip(y)]
        if not strips:
            return None
        width = max(strip.shape[1] for strip in strips)
        padded = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
        path = self.folder / f"step_{step:06d}.png"
        write_image(path, np.concatenate(padded))
        return path


def _first_clips(loader: ClipLoader, count: int) -> list[np.ndarray]:
    """Clips (3, T, H, W) of different rows, from the first steps."""
    if not count:
        return []
    steps = range(min(loader.steps_per_epoch, _SEARCHED))
    clips: dict[str, np.ndarray] = {}
    for step in chain((step for step in steps if loader.num_frames(step) > 1), steps):
        x, names = loader.peek(step)
        for name, clip in zip(names, () if x is None else x):
            clips.setdefault(name, clip)
        if len(clips) >= count:
            break
    return list(clips.values())[:count]


def _strip(video: np.ndarray) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] -> frames side by side, uint8 (H, n W, 3)"""
    last = video.shape[1] - 1
    shown = np.linspace(0, last, min(last + 1, _FRAMES)).round().astype(int)
    return np.concatenate(to_uint8_frames(video[:, shown]), axis=1)
