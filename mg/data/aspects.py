"""The named sizes of Open-Sora 1.x: a resolution with an aspect ratio, and lengths in its own units.

Its models were trained on these sizes, which are in aspects.json next to this file. They differ from those that
`buckets` computes following Open-Sora 2.0: 240p at 9:16 is 240 x 426 here.
"""

import difflib
import json
from functools import cache
from importlib import resources

# Height to width, as 1.x writes it (9:16 is landscape, 16:9 portrait), and the number its tables use for it. The last
# one is 1.85, but the original uses 25:12 for it.
RATIOS = {
    "3:8": 0.38,
    "9:21": 0.43,
    "12:25": 0.48,
    "1:2": 0.50,
    "9:17": 0.53,
    "27:50": 0.54,
    "9:16": 0.56,
    "5:8": 0.62,
    "2:3": 0.67,
    "3:4": 0.75,
    "1:1": 1.00,
    "4:3": 1.33,
    "3:2": 1.50,
    "16:9": 1.78,
    "17:9": 1.89,
    "2:1": 2.00,
    "50:27": 2.08,
}
# Multiples of a 51-frame clip (three chunks of the 1.2 VAE); approximate seconds at 24 frames per second.
LENGTHS = {"1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816}
LENGTHS |= {"2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816}


def image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Height and width in pixels of a resolution such as 240p at an aspect ratio (height to width).

    The square resolutions (256, 512, ...) have their own table of ratios; the nearest one is used.

    Raises:
        ValueError: an unknown name; the message suggests the nearest one.
    """
    sizes = _named(resolution, _resolutions(), "resolution")["sizes"]
    ratio = _named(aspect_ratio, RATIOS, "aspect_ratio")
    height, width = sizes[min(sizes, key=lambda there: abs(float(there) - ratio))]
    return height, width


def sizes_by_shape(resolution: str, grid: int = 1) -> dict[float, tuple[int, int]]:
    """All sizes (height, width) in a resolution's table, by height / width; `grid` is ignored.

    Raises:
        ValueError: an unknown name; the message suggests the nearest one.
    """
    sizes = _named(resolution, _resolutions(), "resolution")["sizes"]
    return {float(shape): (height, width) for shape, (height, width) in sizes.items()}


def frame_count(length: int | str) -> int:
    """A number of frames, from a number or a name in `LENGTHS`.

    Raises:
        ValueError: an unknown name, or a number below 1.
    """
    if isinstance(length, str) and not length.isdecimal():
        return _named(length, LENGTHS, "num_frames")
    if int(length) < 1:
        raise ValueError(f"num_frames is {length}; it must be at least 1")
    return int(length)


@cache
def _resolutions() -> dict[str, dict]:
    return json.loads(resources.files("mg.data").joinpath("aspects.json").read_text(encoding="utf-8"))


def _named(name, table: dict, what: str):
    if name not in table:
        near = difflib.get_close_matches(str(name), table, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(table)}"
        raise ValueError(f"{what} is {name!r}; {hint}")
    return table[name]
