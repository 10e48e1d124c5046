"""Which frames a denoiser is given in training, as Open-Sora chooses them: it learns to go on, back and between."""

import difflib
from collections.abc import Mapping

import numpy as np

MASKS = (
    "identity",
    "quarter_random",
    "quarter_head",
    "quarter_tail",
    "quarter_head_tail",
    "image_random",
    "image_head",
    "image_tail",
    "image_head_tail",
    "random",
    "intepolate",
)
# Open-Sora 1.1's names, and the right spelling.
_OTHER_NAMES = {"mask_no": "identity", "interpolate": "intepolate"}
_OTHER_NAMES |= {f"mask_{name}": name for name in MASKS if name.startswith(("quarter_", "image_"))}


class MaskGenerator:
    """Draws masks by their ratios.

    | name | frames that are given |
    |---|---|
    | identity | none |
    | quarter_random, _head, _tail | 1 to a quarter of them, anywhere, at the start or at the end |
    | quarter_head_tail | as many at both ends |
    | image_random, _head, _tail, _head_tail | one, or one at each end |
    | random | each with one probability between 0.1 and 0.9 |
    | intepolate | every second |

    A frame is a latent one here: an autoencoder that compresses time makes it of several. At least one is always left
    to generate, and an image has nothing to give.

    Args:
        mask_ratios: shares of the samples by name, in [0, 1]; 1.1's names (mask_no, mask_quarter_head ...) and
            "interpolate" will do. Without identity what they leave of 1 is identity's.

    Raises:
        ValueError: an unknown name, one given twice, or ratios that do not fit.
    """

    def __init__(self, mask_ratios: Mapping[str, float]):
        self.ratios: dict[str, float] = {}
        for given, ratio in mask_ratios.items():
            name = _known(given)
            if name in self.ratios:
                raise ValueError(f"mask_ratios has {name} twice, once as {given}")
            if not 0 <= ratio <= 1:
                raise ValueError(f"mask_ratios has {ratio} for {given}; ratios lie between 0 and 1")
            self.ratios[name] = float(ratio)
        total = sum(self.ratios.values())
        if total > 1 + 1e-6 or ("identity" in self.ratios and total < 1 - 1e-6):
            raise ValueError(f"mask_ratios add up to {total:g}; they must to 1, or without identity to 1 at most")
        self.ratios.setdefault("identity", max(0.0, 1 - total))

    def __call__(self, rng: np.random.Generator, num_frames: int) -> np.ndarray:
        """A mask (T,) for one sample of `num_frames` latent frames: True generates a frame, False gives it."""
        mask = np.ones(num_frames, bool)
        chosen = rng.random()
        if num_frames <= 1:
            return mask
        name, reached = "identity", 0.0
        for candidate, ratio in self.ratios.items():
            reached += ratio
            if chosen < reached:
                name = candidate
                break
        kind, _, place = name.partition("_")
        if kind in ("quarter", "image"):
            given = _whole(rng, 1, max(1, num_frames // 4)) if kind == "quarter" else 1
            if place == "random":
                start = _whole(rng, 0, num_frames - given)
                mask[start : start + given] = False
            if place.startswith("head"):
                mask[:given] = False
            if place.endswith("tail"):
                mask[-given:] = False
        elif kind == "random":
            given_share = rng.uniform(0.1, 0.9)
            mask = rng.random(num_frames) > given_share
        elif kind == "intepolate":
            mask[_whole(rng, 0, 1) :: 2] = False
        mask[-1] |= not mask.any()
        return mask


def _whole(rng: np.random.Generator, first: int, last: int) -> int:
    """One of first to last"""
    return int(rng.integers(first, last, endpoint=True))


def _known(name: str) -> str:
    known = _OTHER_NAMES.get(name, name)
    if known not in MASKS:
        # "mask_head" and its like stand in some of 1.0's configs, which its own code refuses: quarter or image?
        alike = [mask for mask in MASKS if mask.endswith(name.removeprefix("mask"))] if name.startswith("mask_") else []
        alike = alike or difflib.get_close_matches(name, MASKS, 2) or list(MASKS)
        raise ValueError(f"mask_ratios has no mask {name!r}; it may be one of {', '.join(alike)}")
    return known
