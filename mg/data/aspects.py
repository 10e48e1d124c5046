"""The sizes that Open-Sora 1.x has names for: a resolution and an aspect ratio, and lengths in its own units.

Its models were trained on these sizes, which lie in aspects.json beside this file. They are not those that `buckets`
computes, after Open-Sora 2.0: 240p at 9:16 is 240 x 426 here.
"""

import difflib
import json
from functools import cache
from importlib import resources

# Height to width, as 1.x writes it: 9:16 lies, 16:9 stands.
RATIOS = (
    "3:8 9:21 12:25 1:2 9:17 27:50 9:16 5:8 2:3 3:4 1:1 4:3 3:2 16:9 17:9 2:1 50:27".split()
)  # fmt: skip
# Multiples of a clip of 51 frames, which is three chunks of the 1.2 VAE; seconds at 24 frames per second, about.
LENGTHS = {"1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816}
LENGTHS |= {"2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816}


def image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Height and width in pixels of a resolution, 240p say, at an aspect ratio, height to width.

    The square resolutions (256, 512, ...) have a table of ratios of their own: the nearest one is taken.

    Raises:
        ValueError: a name that is none; the nearest one is named.
    """
    sizes = _named(resolution, _resolutions(), "resolution")["sizes"]
    _named(aspect_ratio, dict.fromkeys(RATIOS), "aspect_ratio")
    height, width = map(int, aspect_ratio.split(":"))
    nearest = min(sizes, key=lambda ratio: abs(float(ratio) - height / width))
    return tuple(sizes[nearest])


def frame_count(length: int | str) -> int:
    """A number of frames, or what one of `LENGTHS` stands for.

    Raises:
        ValueError: a name that is none, or a number below 1.
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
