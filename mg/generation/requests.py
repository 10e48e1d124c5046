"""A run's requests, one per prompt, parsed and checked before anything is loaded."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mg.generation.config import GenerateConfig
from mg.generation.masks import Insertion, parse_mask_strategy
from mg.plain_text import file_name, one_line, printable
from mg.text.prompts import append_scores, read_prompts, split_loops, split_suffix

_logger = logging.getLogger(__name__)


@dataclass
class Request:
    """One prompt.

    Attributes:
        index: its number in the list or file.
        prompt: the prompt without its JSON suffix.
        texts: the text to encode for each loop, with scores.
        references: paths or URLs.
        mask_strategy: as given.
        insertions: the parsed mask strategy.
    """

    index: int
    prompt: str
    texts: list[str]
    references: list[str]
    mask_strategy: str
    insertions: list[Insertion]


def read_requests(config: GenerateConfig) -> list[Request]:
    """The prompts of a config from start_index to end_index.

    Raises:
        ValueError, OSError: a file that cannot be read, lists whose length differs from the prompts', or a prompt with
            an invalid suffix, loops, references or mask strategy; the message says which.
    """
    prompts = _prompts(config)
    references = _beside_prompts("reference_path", config.reference_path, len(prompts))
    strategies = _beside_prompts("mask_strategy", config.mask_strategy, len(prompts))
    requests = []
    for index in range(len(prompts))[config.start_index : config.end_index]:
        try:
            requests.append(_read_request(config, index, prompts[index], references[index], strategies[index]))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {one_line(error)}") from None
    if not requests:
        raise ValueError(f"start_index is {config.start_index}; there are {len(prompts)} prompts, counted from 0")
    return requests


def sample_name(
    index: int, prompt: str, sample: int = 0, num_sample: int = 1, name: str | None = None, prompt_as_path: bool = False
) -> str:
    """A sample's file name without suffix: sample_0003, or sample_0003-1 with several samples per prompt.

    Args:
        index: the prompt's number in its list or file.
        name: used instead of "sample"; with `prompt_as_path` it precedes the prompt.
        prompt_as_path: use the prompt as the name, as far as possible.
    """
    suffix = f"-{sample}" if num_sample > 1 else ""
    if prompt_as_path:
        return file_name(f"{name or ''}{prompt}") + suffix
    return f"{file_name(name or 'sample')}_{index:04d}{suffix}"


def name_of(config: GenerateConfig, request: Request, sample: int) -> str:
    """A sample's file name without suffix."""
    named = (config.num_sample, config.sample_name, config.prompt_as_path)
    return sample_name(request.index, request.prompt, sample, *named)


def check_names(config: GenerateConfig, requests: Sequence[Request]) -> None:
    """Raise ValueError if prompt_as_path would give samples of two different requests the same name."""
    named: dict[str, Request] = {}
    for request in requests:
        name = name_of(config, request, 0)
        other = named.setdefault(name, request)
        if replace(request, index=other.index) != other:
            raise ValueError(
                f"prompts {other.index} and {request.index} would both be named {printable(name)!r}; leave "
                "prompt_as_path out"
            )


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompt is not None:
        if not config.prompt:
            raise ValueError("prompt is an empty list; it must have prompts, or be null to use prompt_path")
        return config.prompt
    if config.prompt_path is None:
        raise ValueError("prompt or prompt_path must be given")
    return read_prompts(config.prompt_path)


def _beside_prompts(name: str, values: Sequence[str | None] | None, count: int) -> list[str]:
    """A list parallel to the prompts; "" for missing values."""
    if values is None:
        return [""] * count
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries for {count} prompts; it must have one per prompt, or be null"
        )
    return [value or "" for value in values]


def _read_request(config: GenerateConfig, index: int, prompt: str, reference: str, strategy: str) -> Request:
    parts = split_suffix(prompt)
    reference, strategy = parts.reference_path or reference, parts.mask_strategy or strategy
    paths = [path.strip() for path in reference.split(";") if path.strip()]
    insertions = parse_mask_strategy(strategy)
    if paths and not insertions:
        raise ValueError(f"reference_path is {reference!r} without a mask_strategy to place it")
    if config.refuses_masks and (insertions or config.loop > 1):
        asked = "a mask_strategy is given" if insertions else f"loop is {config.loop}, which needs frame masks"
        raise ValueError(f"{asked}, but {config.refuses_masks}")
    for made in insertions:
        if made.loop >= config.loop:
            loops = "the only loop is 0" if config.loop == 1 else f"the last loop is {config.loop - 1}"
            _logger.warning(
                "prompt %d: mask_strategy %r has a group for loop %d, but %s", index, strategy, made.loop, loops
            )
        there = len(paths) + made.loop * (config.loop > 1)  # earlier clips are references, too
        if made.reference >= there:
            listed = f"are {len(paths)} references" if len(paths) != 1 else "is 1 reference"
            raise ValueError(
                f"mask_strategy {strategy!r} uses reference {made.reference}, but there {listed}, counted from 0"
            )
    if config.text_encoder.type == "classes":
        texts = [_checked_class(parts.text, config)] * config.loop
    else:
        scores = (config.aes, config.flow, config.camera_motion)
        texts = [append_scores(text, *scores) for text in split_loops(parts.text, config.loop)]
    return Request(index, parts.text, texts, paths, strategy, insertions)


def _checked_class(text: str, config: GenerateConfig) -> str:
    count = config.text_encoder.num_classes
    if not text.strip().isdecimal() or (count is not None and int(text) >= count):
        last = "" if count is None else f", from 0 to {count - 1}"
        raise ValueError(f"it is {text!r}; with text_encoder.type classes, prompts are class numbers{last}")
    return text.strip()
