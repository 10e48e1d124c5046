"""A text encoder that needs no download: a T5 of one layer with random weights, and a tokenizer of given words.

It understands nothing. But the states of texts that differ in their words or word order always differ, in the same way
each time, so a denoiser trained on them learns what each word should mean. All other words are the same unknown token.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mg.checkpoints import atomic_write, write_state_dict
from mg.text.t5 import T5Config, T5Encoder

_MARKS = ("<pad>", "</s>", "<unk>")
_WORDS = r"\w+|[^\w\s]"  # splits as the tokenizer does, at spaces and punctuation
_REFERENCE_WIDTH = 4096


def words_of(texts: Iterable[str]) -> list[str]:
    """All words and punctuation marks of some texts, in lower case, sorted."""
    return sorted({word for text in texts for word in re.findall(_WORDS, text.lower())})


def make_word_encoder(folder: Path, words: Sequence[str], channels: int = 64, seed: int = 0) -> None:
    """Write tokenizer.json, config.json and model.safetensors, which `create_text_encoder("t5", folder)` reads.

    Args:
        folder: the folder to write to.
        words: the words to distinguish.
        channels: of the states.
        seed: of the weights.

    Raises:
        ValueError: there are no words.
    """
    if not words:
        raise ValueError("there are no words to make a text encoder for")
    vocabulary = {token: number for number, token in enumerate((*_MARKS, *words))}
    config = T5Config(len(vocabulary), channels, d_kv=16, d_ff=2 * channels, num_layers=1, num_heads=4)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "tokenizer.json", _tokenizer(vocabulary))
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(each.shape) for name, each in T5Encoder(config, 2).parameters_and_names()}
    write_state_dict(folder / "model.safetensors", {name: _draw(rng, name, shapes[name]) for name in sorted(shapes)})
    _write_json(folder / "config.json", {"model_type": "t5", **config})


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("norm.weight"):
        # A denoiser's caption layers start from weights of one size for any width, right for T5-XXL's 4096 channels.
        last = name.endswith("final_layer_norm.weight")
        return np.full(shape, (_REFERENCE_WIDTH / shape[0]) ** 0.5 / 2 if last else 1, np.float32)
    deviation = 1.0 if name == "shared.weight" else shape[-1] ** -0.5
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)


def _tokenizer(vocabulary: dict[str, int]) -> dict:
    """The content of a tokenizer.json for the tokenizers package: whole words, in lower case."""
    marks = [{"id": number, "content": mark, "special": True} for number, mark in enumerate(_MARKS)]
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**mark, **kept} for mark in marks],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": _MARKS[2]},
    }


def _write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
