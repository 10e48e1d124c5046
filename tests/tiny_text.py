"""Text encoders small enough for tests: folders of weights, config and tokenizer, laid out like released ones."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Unigram

from mg.checkpoints import write_state_dict
from mg.text.clip import CLIPTextTower
from mg.text.t5 import T5Encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!-"
T5 = {"vocab_size": 96, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
CLIP = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def t5_tokenizer(folder: Path) -> None:
    """tokenizer.json of single letters and a few words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("cat", -3.0), ("dog", -3.0)]
    pieces += [(letter, -4.0) for letter in LETTERS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.enable_truncation(3)  # as some files have it, and nobody is to mind
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of single letters and one word."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")


def t5_folder(folder: Path, **config) -> Path:
    """A T5 encoder with random weights."""
    t5_tokenizer(folder)
    return _with_weights(folder, T5Encoder({**T5, **config}, 4), {"model_type": "t5"})


def clip_folder(folder: Path, **config) -> Path:
    """A text tower of CLIP with random weights, its config within that of both halves."""
    clip_tokenizer(folder)
    return _with_weights(folder, CLIPTextTower({**CLIP, **config}, 4), {"model_type": "clip"})


def _with_weights(folder: Path, network, described: dict) -> Path:
    rng = np.random.default_rng(0)
    shapes = {name: p.shape for name, p in network.parameters_and_names()}
    weights = {
        name: rng.normal(1.0 * ("norm" in name), 0.3, shape).astype(np.float32) for name, shape in shapes.items()
    }
    write_state_dict(folder / "model.safetensors", weights)
    both = isinstance(network, CLIPTextTower)
    config = {**described, "text_config": dict(network.config)} if both else {**described, **network.config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
