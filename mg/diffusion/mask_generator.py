"""Which frames a denoiser is given in training, chosen as in Open-Sora: it learns to extend clips in both directions
and to interpolate."""

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
# Open-Sora 1.1's names, and the correct spelling.
_OTHER_NAMES = {"mask_no": "identity", "interpolate": "intepolate"}
_OTHER_NAMES |= {f"mask_{name}": name for name in MASKS if name.startswith(("quarter_", "image_"))}


class MaskGenerator:
    """Draws masks according to their ratios.

    | name | given frames |
    |---|---|
    | identity | none |
    | quarter_random, _head, _tail | from one frame to a quarter of them: anywhere, at the start or at the end |
    | quarter_head_tail | the same number at both ends |
    | image_random, _head, _tail, _head_tail | one, or one at each end |
    | random | each with the same probability, drawn from 0.1 to 0.9 |
    | intepolate | every second frame |

    Frames are latent frames here: an autoencoder that compresses time merges several into one. At least one is always
    left to generate, so an image has no given frames.

    Args:
        mask_ratios: mask name -> share of the samples, in [0, 1]; 1.1's names (mask_no, mask_quarter_head ...) and
            "interpolate" are accepted. If identity is left out, it gets what remains of 1.

    Raises:
        ValueError: an unknown or repeated name, or invalid ratios.
    """

    def __init__(self, mask_ratios: Mapping[str, float]):
        self.ratios: dict[str, float] = {}
        for given, ratio in mask_ratios.items():
            name = _known(given)
            if name in self.ratios:
                raise ValueError(f"mask_ratios has {name} twice, once as {given}")
            if not 0 <= ratio <= 1:
                raise ValueError(f"mask_ratios has {ratio} for {given}; ratios must be between 0 and 1")
            self.ratios[name] = float(ratio)
        total = sum(self.ratios.values())
        if total > 1 + 1e-6 or ("identity" in self.ratios and total < 1 - 1e-6):
            raise ValueError(f"mask_ratios add up to {total:g}; it must be 1, or without identity at most 1")
        self.ratios.setdefault("identity", max(0.0, 1 - total))

    def __call__(self, rng: np.random.Generator, num_frames: int) -> np.ndarray:
        """A mask (T,) for one sample of `num_frames` latent frames: True to generate a frame, False if it is given."""
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
    """A whole number from first to last, inclusive."""
    return int(rng.integers(first, last, endpoint=True))


def _known(name: str) -> str:
    known = _OTHER_NAMES.get(name, name)
    if known not in MASKS:
        # "mask_head" and the like are in some of 1.0's configs, but its own code rejects them: quarter or image?
        alike = [mask for mask in MASKS if mask.endswith(name.removeprefix("mask"))] if name.startswith("mask_") else []
        alike = alike or difflib.get_close_matches(name, MASKS, 2) or list(MASKS)
        raise ValueError(f"mask_ratios has no mask {name!r}; it may be one of {', '.join(alike)}")
    return known
