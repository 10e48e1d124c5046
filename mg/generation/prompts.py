"""What a line of a prompt file says, after Open-Sora 1.1 and 1.2, and what its sample is called.

a cat on a roof{"reference_path": "cat.png", "mask_strategy": "0"}     references and strategy at the end, as JSON
|0|a white jeep|2|a red jeep                                           another text from loop 2 on
"""

import itertools
import json
import re
from typing import NamedTuple

from mg.plain_text import file_name, printable

_KEYS = ("reference_path", "mask_strategy")


class Parts(NamedTuple):
    """A prompt without its JSON suffix, and what stood there; "" where nothing did."""

    text: str
    reference_path: str
    mask_strategy: str


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
        raise ValueError(f"the JSON behind a prompt cannot be read: {_short(suffix)}; {wanted}") from None
    unknown = next((key for key in found if key not in _KEYS), None)
    if unknown is not None:
        raise ValueError(f"the JSON behind a prompt has the key {unknown!r}; {wanted}")
    values = {key: "" if found.get(key) is None else found[key] for key in _KEYS}
    for key, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} in the JSON behind a prompt is {value!r}; it must be a text")
    return Parts(text, **values)


def split_loops(prompt: str, loop: int) -> list[str]:
    """The text of each of `loop` loops: |0|text|2|text has one from loop 2 on; a prompt without |n| is that of all.

    Raises:
        ValueError: numbers that do not begin with 0 and rise.
    """
    if not re.match(r"\s*\|\s*\d+\s*\|", prompt):
        return [prompt] * loop
    pieces = re.split(r"\|\s*(\d+)\s*\|", prompt)
    starts, texts = [int(number) for number in pieces[1::2]], [text.strip() for text in pieces[2::2]]
    if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        numbers = ", ".join(f"|{start}|" for start in starts)
        raise ValueError(f"prompt {_short(prompt)}: its loops are {numbers}; they must begin with |0| and rise")
    return [texts[max(i for i, start in enumerate(starts) if start <= number)] for number in range(loop)]


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


def sample_name(
    index: int, prompt: str, sample: int = 0, num_sample: int = 1, name: str | None = None, prompt_as_path: bool = False
) -> str:
    """What a sample's file is called, without suffix: sample_0003, of several samples of a prompt sample_0003-1.

    Args:
        index: the prompt's number in its list or file.
        name: in place of "sample"; with `prompt_as_path` it stands in front of the prompt.
        prompt_as_path: the prompt is the name, as far as one can be.
    """
    suffix = f"-{sample}" if num_sample > 1 else ""
    if prompt_as_path:
        return file_name(f"{name or ''}{prompt}") + suffix
    return f"{file_name(name or 'sample')}_{index:04d}{suffix}"


def _short(text: str) -> str:
    return repr(printable(text if len(text) <= 60 else f"{text[:57]}..."))
