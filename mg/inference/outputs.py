"""The files that commands write for clips: their names, and pictures with one column per method."""

import os
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from mg.data.video import write_image, write_video
from mg.plain_text import file_name

LABEL_HEIGHT = 20


def output_names(names: list[str]) -> list[str]:
    """File names without suffix for the paths of an index: folders become part of the name, duplicates get a number.

    Characters that file names can't hold or terminals would interpret become underscores. A name that is too long for
    the file system is cut and gets a checksum, which keeps it distinct from others with the same beginning.
    """
    return unique([_file_name(name) for name in names])


def _file_name(name: str) -> str:
    return file_name(os.path.splitext(Path(name).as_posix())[0].strip("/"))


def unique(names: list[str], taken: Iterable[str] = ()) -> list[str]:
    """`names` with _2, _3, ... appended to those that occurred before or are `taken`, ignoring case."""
    seen = {name.lower() for name in taken}
    result = []
    for name in names:
        chosen, number = name, 1
        while chosen.lower() in seen:
            number += 1
            chosen = f"{name}_{number}"
        seen.add(chosen.lower())
        result.append(chosen)
    return result


def write_frames(path: Path, frames: np.ndarray | Iterable[np.ndarray], fps: float) -> None:
    """Write uint8 frames (T, H, W, 3), or pieces of them, as a video; the first one as an image if `path` is a .png."""
    if path.suffix == ".png":
        write_image(path, frames[0] if isinstance(frames, np.ndarray) else next(iter(frames))[0])
    else:
        write_video(path, frames, fps)


def side_by_side(columns: dict[str, np.ndarray]) -> np.ndarray:
    """uint8 videos (T, H, W, 3) of one shape -> one video with a labelled column for each"""
    return np.concatenate([_label(frames, name) for name, frames in columns.items()], axis=2)


def _label(frames: np.ndarray, text: str) -> np.ndarray:
    """Add a strip with `text` above every frame, shrunk to fit a narrow frame."""
    width = frames.shape[2]
    font, scale, text = cv2.FONT_HERSHEY_SIMPLEX, 0.45, text.encode("ascii", "replace").decode()  # it draws only ASCII
    needed = cv2.getTextSize(text, font, scale, 1)[0][0] + 8
    strip = np.full((LABEL_HEIGHT, width, 3), 24, np.uint8)
    scale *= min(1, width / needed)
    cv2.putText(strip, text, (4, LABEL_HEIGHT - 6), font, scale, (255,) * 3, 1, cv2.LINE_AA)
    return np.concatenate([np.broadcast_to(strip, (len(frames), *strip.shape)), frames], axis=1)
