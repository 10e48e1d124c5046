"""What a line of a prompt file says, after Open-Sora 1.1 and 1.2.

a cat on a roof{"reference_path": "cat.png", "mask_strategy": "0"}     references and strategy at the end, as JSON
|0|a white jeep|2|a red jeep                                           another text from loop 2 on

Here and not in `mg.generation`, since a text is encoded without all that, whether now or to be stored.
"""

import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

from mg.plain_text import printable, split_lines

_KEYS = ("reference_path", "mask_strategy")


class Parts(NamedTuple):
    """A prompt without its JSON suffix, and what stood there; "" where nothing did."""

    text: str
    reference_path: str
    mask_strategy: str


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, one in each line; blank lines are prompts, too.

    Raises:
        ValueError: a file that is not there, is no text, or is empty.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ValueError(f"prompt_path: {path}: no such file; it must hold a prompt in each line")
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_path: {path}: not a text in UTF-8 ({error})") from None
    if not lines:
        raise ValueError(f"prompt_path: {path}: holds no prompt; there must be one in each line")
    return [line.strip() for line in lines]


def split_suffix(prompt: str) -> Parts:
    """Take the JSON suffix off a prompt: all from the first { on, with the keys reference_path and mask_strategy.

    Raises:
        ValueError: what stands there is no such JSON.
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
            raise ValueError(f"{key} in the JSON after a prompt is {value!r}; it must be a text")
    return Parts(text, **values)


def texts_from(prompt: str) -> dict[int, str]:
    """The texts of |0|text|2|text by the loop from which on they hold; a prompt without |n| holds from 0 on.

    Raises:
        ValueError: numbers that do not begin with 0 and rise.
    """
    if not re.match(r"\s*\|\s*\d+\s*\|", prompt):
        return {0: prompt}
    pieces = re.split(r"\|\s*(\d+)\s*\|", prompt)
    starts, texts = [int(number) for number in pieces[1::2]], [text.strip() for text in pieces[2::2]]
    if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        numbers = ", ".join(f"|{start}|" for start in starts)
        raise ValueError(f"prompt {_short(prompt)}: its loops are {numbers}; they must begin with |0| and rise")
    return dict(zip(starts, texts))


def split_loops(prompt: str, loop: int) -> list[str]:
    """The text of each of `loop` loops, see `texts_from`."""
    texts = texts_from(prompt)
    return [texts[max(start for start in texts if start <= number)] for number in range(loop)]


def append_scores(
    text: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """Add the scores that Open-Sora 1.2 was trained with, where the text has none of that name yet.

    Args:
        aes: aesthetic score, 4 to 7; 6.5 is what the released config asks for.
        flow: how much moves.
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
