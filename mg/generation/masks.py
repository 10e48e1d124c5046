"""Mask strategies: which frames of a clip are given, from which reference, and how freely they may change.

A strategy is a string of groups `loop,reference,start,target,length,edit` joined by `;`. Missing numbers default to
those of 0,0,0,0,1,0: "0" puts the first frame of the first reference at the start of the first clip. Start, target and
length are in latent frames.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Insertion(NamedTuple):
    """One group of a strategy.

    Attributes:
        loop: the clip that it applies to.
        reference: which of the prompt's references to use.
        start: the first latent frame of the reference to use; negative counts from its end.
        target: the latent frame of the clip to put it at; negative counts from the clip's end.
        length: number of latent frames.
        edit: 0 keeps them as they are, 1 generates them from scratch, in between they are noised that far.
    """

    loop: int = 0
    reference: int = 0
    start: int = 0
    target: int = 0
    length: int = 1
    edit: float = 0.0


def parse_mask_strategy(text: str | None) -> list[Insertion]:
    """The groups of a strategy; none for "" and None.

    Raises:
        ValueError: a malformed group; the message says which.
    """
    return [_parse_group(group, text) for group in text.split(";")] if text and text.strip() else []


def _parse_group(group: str, text: str) -> Insertion:
    def wrong(what: str) -> ValueError:
        names = ",".join(Insertion._fields)
        return ValueError(f"mask_strategy {text!r}: {what}; a group is {names}, numbers separated by commas")

    numbers = group.split(",")
    if len(numbers) > len(Insertion._fields):
        raise wrong(f"{group.strip()!r} has {len(numbers)} numbers, more than 6")
    values: list = []
    for name, number in zip(Insertion._fields, numbers):
        try:
            values.append((float if name == "edit" else int)(number))
        except ValueError:
            kind = "a number" if name == "edit" else "a whole number"
            raise wrong(f"{name} is {number.strip()!r}, which is not {kind}") from None
    made = Insertion(*values)
    if made.loop < 0 or made.reference < 0 or made.length < 1:
        raise wrong(f"{group.strip()!r}: loop and reference must be at least 0, length at least 1")
    if not 0 <= made.edit <= 1:
        raise wrong(f"edit is {made.edit:g}, which is not between 0 and 1")
    return made


def continuation(loop: int, reference: int, length: int, edit: float = 0.0) -> Insertion:
    """Makes a clip continue from the end of the previous one, which is now a reference."""
    return Insertion(loop, reference, -length, 0, length, edit)


def nearest_point(value: int, step: int, length: int) -> int:
    """A multiple of `step` near `value`, among `length` frames: the previous one, or the next one if that is nearer
    and followed by a whole step of frames."""
    number, rest = divmod(value, step)
    return (number + (rest > step / 2 and number < length // step - 1)) * step


def place_among(number: int, frames: int, align: int | None = None) -> int:
    """Resolve a start or target among `frames` latent frames, see `apply_mask_strategy`."""
    at = number + frames * (number < 0)
    return nearest_point(at, align, frames) if align else at


def apply_mask_strategy(
    z: np.ndarray,
    references: Sequence[np.ndarray],
    insertions: Sequence[Insertion],
    loop: int = 0,
    align: int | None = None,
    repeat_images: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Put the frames of a strategy's references into a clip's noise.

    Later groups overwrite earlier ones. If the reference or the clip is too short, only as many frames are used as
    there are; but an image with a start before its only frame is repeated, as in the originals.

    Args:
        z: noise, (C, T, h, w).
        references: latents (C, t, h, w) each.
        insertions: the prompt's; those for other loops are skipped.
        align: move starts and targets to multiples of this, as Open-Sora 1.2 does with 5: a chunk of its VAE.
        repeat_images: an image fills all `length` frames, as in Open-Sora 1.1; else one.

    Returns:
        z with the references in it, and the frame mask (T,): 0 keeps a frame, 1 generates it.

    Raises:
        ValueError: a missing reference, frames outside the reference, or a target outside the clip.
    """
    z, total = z.copy(), z.shape[1]
    mask = np.ones(total, np.float32)
    for made in insertions:
        if made.loop != loop:
            continue
        if made.reference >= len(references):
            raise ValueError(f"{_said(made)} uses reference {made.reference}, of which there are {len(references)}")
        source = references[made.reference]
        frames = source.shape[1]
        start, target = place_among(made.start, frames, align), place_among(made.target, total, align)
        if not 0 <= target < total:
            raise ValueError(f"{_said(made)} has its target at latent frame {made.target}; the clip has {total}")
        stop = start + made.length if repeat_images and frames == 1 else min(start + made.length, frames)
        if stop <= 0 or start >= frames:
            raise ValueError(f"{_said(made)} uses latent frame {made.start} of a reference that has {frames}")
        first = start if frames == 1 else max(start, 0)
        length = min(stop - first, total - target)
        taken = [min(max(first + number, 0), frames - 1) for number in range(length)]
        z[:, target : target + length] = source[:, taken]
        mask[target : target + length] = made.edit
    return z, mask


def _said(made: Insertion) -> str:
    *whole, edit = made
    return f"mask_strategy group {','.join(map(str, whole))},{edit:g}"
