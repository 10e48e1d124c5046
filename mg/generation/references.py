"""References: the images and videos that a mask strategy takes frames from.

Each is scaled to cover the clip's size and centre-cropped. Of a video only those frames are read that the strategy
needs or that the autoencoder encodes together with them.
"""

import contextlib
import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from mg.checkpoints import atomic_write
from mg.data.transforms import center_crop, covering_size, resize_to_cover
from mg.data.video import is_image, open_video, read_image
from mg.generation.codec import LatentCodec
from mg.generation.masks import Insertion, place_among
from mg.plain_text import one_line

TIMEOUT = 30  # seconds without an answer from a server


def find_reference(reference: str, folder: Path) -> Path:
    """The file of a reference; for a URL its copy in `folder`, downloaded if missing.

    Raises:
        ValueError: there is no such file, or it cannot be downloaded.
    """
    if "://" not in reference:
        path = Path(reference)
        if not path.is_file():
            raise ValueError(f"reference_path: {reference}: no such file")
        return path
    name = Path(urlsplit(reference).path).name or "reference"
    path = folder / f"{hashlib.sha256(reference.encode()).hexdigest()[:16]}_{name[-100:]}"  # unique per URL
    if path.is_file():
        return path
    try:
        with (
            contextlib.closing(urllib.request.urlopen(reference, timeout=TIMEOUT)) as answer,
            atomic_write(path) as temporary,
        ):
            with open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file)
            length = answer.headers.get("Content-Length")
            if length is not None and Path(temporary).stat().st_size != int(length):
                raise OSError("the connection ended early")
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = one_line(getattr(error, "reason", error))
        raise ValueError(
            f"reference_path: {reference} cannot be downloaded ({reason}); download it, and give the file's path"
        ) from None
    return path


def read_reference(
    path: Path, size: tuple[int, int], insertions: Sequence[Insertion], codec: LatentCodec, align: int | None = None
) -> tuple[np.ndarray, int, int]:
    """The frames of a reference that a strategy needs.

    Args:
        size: height and width.
        insertions: those that use this reference.
        codec: the autoencoder that will encode them.
        align: as in `apply_mask_strategy`.

    Returns:
        uint8 (T, H, W, 3), the index of the first one among all frames, and the total number of frames, as far as the
        strategy needs it.

    Raises:
        VideoError: a file that cannot be read.
    """
    if is_image(path):
        return center_crop(resize_to_cover(read_image(path)[None], *size), *size), 0, 1
    chunk, latents = codec.chunk or (1, 1)
    with open_video(path) as video:
        covering = covering_size(video.height, video.width, *size)
        if not insertions or (align is None and all(made.start >= 0 for made in insertions)):
            last = max((made.start + made.length for made in insertions), default=1)
            stop = codec.frames_of(-(-last // latents) * latents)
            frames = np.stack([frame for _, frame in zip(range(stop), video.clip(size=covering))])
            return center_crop(frames, *size), 0, len(frames)
        total = video.num_frames
        first, stop = 0, total
        if codec.chunk:
            there = codec.latent_size((total, *size))[0]
            starts = [place_among(made.start, there, align) for made in insertions]
            ends = [start + made.length for start, made in zip(starts, insertions)]
            first = min(max(min(starts), 0), there - 1) // latents * chunk
            stop = max(first + chunk, -(-max(ends) // latents) * chunk)
        return center_crop(video.read(range(first, min(stop, total)), size=covering), *size), first, total
