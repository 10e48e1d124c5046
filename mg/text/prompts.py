"""The syntax of lines in a prompt file, after Open-Sora 1.1 and 1.2.

a cat on a roof{"reference_path": "cat.png", "mask_strategy": "0"}     references and mask strategy at the end, as JSON
|0|a white jeep|2|a red jeep                                           a different text from loop 2 on

This is here instead of in `mg.generation`, since encoding texts needs it too, whether to generate or to store them.
"""

import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

from mg.plain_text import printable, split_lines

_KEYS = ("reference_path", "mask_strategy")


class Parts(NamedTuple):
    """A prompt without its JSON suffix, and the suffix's values; "" for missing ones."""

    text: str
    reference_path: str
    mask_strategy: str


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, one per line; blank lines are prompts, too.

    Raises:
        ValueError: a file that is missing, isn't text, or is empty.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ValueError(f"prompt_path: {path}: no such file; it must have one prompt per line")
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_path: {path}: not a text in UTF-8 ({error})") from None
    if not lines:
        raise ValueError(f"prompt_path: {path}: no prompts; there must be one per line")
    return [line.strip() for line in lines]


def split_suffix(prompt: str) -> Parts:
    """Split off a prompt's JSON suffix: everything from the first {, with keys reference_path and mask_strategy.

    Raises:
        ValueError: the suffix is not such JSON.
    """
    text, brace, _ = prompt.partition("{")
    if not brace:
        return Parts(prompt, "", "")
    suffix = prompt[len(text) :]
    wanted = 'it must be one {"reference_path": "...", "mask_strategy": "..."} at the end'
    try:
        found = json.loads(suffix)
    except ValueError:
        raise ValueError(f"the JSON after a prompt cannot be read: {_short(suffix)}; {wanted}") from None
    unknown = next((key for key in found if key not in _KEYS), None)
    if unknown is not None:
        raise ValueError(f"the JSON after a prompt has the key {unknown!r}; {wanted}")
    values = {key: "" if found.get(key) is None else found[key] for key in _KEYS}
    for key, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} in the JSON after a prompt is {value!r}; it must be a string")
    return Parts(text, **values)


def texts_from(prompt: str) -> dict[int, str]:
    """The texts of |0|text|2|text by the first loop that uses them; a prompt without |n| is used from loop 0 on.

    Raises:
        ValueError: numbers that do not start with 0 and increase.
    """
    if not re.match(r"\s*\|\s*\d+\s*\|", prompt):
        return {0: prompt}
    pieces = re.split(r"\|\s*(\d+)\s*\|", prompt)
    starts, texts = [int(number) for number in pieces[1::2]], [text.strip() for text in pieces[2::2]]
    if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        numbers = ", ".join(f"|{start}|" for start in starts)
        raise ValueError(f"prompt {_short(prompt)}: its loops are {numbers}; they must start with |0| and increase")
    return dict(zip(starts, texts))


def split_loops(prompt: str, loop: int) -> list[str]:
    """The text of each of `loop` loops, see `texts_from`."""
    texts = texts_from(prompt)
    return [texts[max(start for start in texts if start <= number)] for number in range(loop)]


def append_scores(
    text: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """Append the scores that Open-Sora 1.2 was trained with, unless the text already has one of that name.

    Args:
        aes: aesthetic score, 4 to 7; the released config uses 6.5.
        flow: motion score, the amount of motion.
        camera_motion: pan left, zoom in, static, ...
    """
    scores = {
        "aesthetic score": None if aes is None else f"{aes:.1f}",
        "motion score": None if flow is None else f"{flow:.1f}",
        "camera motion": camera_motion,
    }
    for name, value in scores.items():
        if value is not None and f"{name}:" not in text:
            text = f"{text} {name}: {value}."
    return text


def _short(text: str) -> str:
    return repr(printable(text if len(text) <= 60 else f"{text[:57]}..."))
