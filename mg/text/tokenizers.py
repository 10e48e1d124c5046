"""Texts to numbers of tokens, offline, by the files that released text encoders come with.

    t5      tokenizer.json, by the tokenizers package, or spiece.model, by sentencepiece (extra `text`)
    clip    tokenizer.json, or vocab.json and merges.txt, by the tokenizers package

What these files say of cutting and filling up is not used: it is done here, alike for all.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mg.plain_text import one_line

_CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>")  # what begins a text, ends it and fills it up


class Tokens(NamedTuple):
    """Numbers of a text's tokens, cut and filled up to a length, (L,) int32; and how many are the text's."""

    ids: np.ndarray
    used: int


class Tokenizer:
    """Texts to `Tokens`.

    Args:
        encode: a text -> the numbers of its tokens, without any that begin or end a text.
        size: how many tokens there are.
        start: the number that begins a text; None for none.
        end: the number that ends a text, also one that was cut.
        padding: the number that fills up what is left after a text.

    Attributes:
        file: what it was read from.
    """

    file: Path

    def __init__(self, encode: Callable[[str], list[int]], size: int, start: int | None, end: int, padding: int):
        self._encode, self.size = encode, size
        self.start, self.end, self.padding = start, end, padding

    def __call__(self, text: str, length: int) -> Tokens:
        """A text in at most `length` tokens, the last of which ends it."""
        before = [] if self.start is None else [self.start]
        # A lone surrogate, which is no letter, would stop either package.
        numbers = self._encode(text.encode("utf-8", "replace").decode())
        found = [*before, *numbers[: length - len(before) - 1], self.end]
        return Tokens(np.array(found + [self.padding] * (length - len(found)), np.int32), len(found))


class _Reader(NamedTuple):
    """Files that a tokenizer is made of, the package that it takes, and what makes it."""

    files: tuple[str, ...]
    package: str
    read: Callable[[Path], Tokenizer]


def open_tokenizer(kind: str, path: str | Path) -> Tokenizer:
    """The tokenizer of a text encoder.

    Args:
        kind: t5 | clip.
        path: a file, or a folder: the files are looked for in it, in `tokenizer` below it, and in `tokenizer` beside
            it, as a pipeline of diffusers has them.

    Raises:
        ValueError: there are no such files, they cannot be read, or the package that they take is not installed.
    """
    found = _find(Path(path), _READERS[kind])
    if not found:
        wanted = " or ".join(" with ".join(reader.files) for reader in _READERS[kind])
        raise ValueError(f"{path}: there is no tokenizer; put {wanted}, which the weights come with, there")
    file, reader = next((pair for pair in found if find_spec(pair[1].package)), found[0])
    if find_spec(reader.package) is None:
        raise ValueError(f"{file}: takes the {reader.package} package to be read: pip install {reader.package}")
    try:
        tokenizer = reader.read(file)
    except Exception as error:  # these packages raise whatever they like
        said = one_line(error)[:200]
        raise ValueError(f"{file}: not a tokenizer for {kind} that can be read ({said})") from None
    tokenizer.file = file
    return tokenizer


def _find(path: Path, readers: list[_Reader]) -> list[tuple[Path, _Reader]]:
    """The first files of tokenizers that a path means, with what reads them."""
    if path.is_file():
        named = [reader for reader in readers if path.name in reader.files]
        like = [reader for reader in readers if path.suffix == Path(reader.files[0]).suffix]
        return [(path, reader) for reader in named or like][:1]
    return [
        (folder / reader.files[0], reader)
        for folder in (path, path / "tokenizer", path.parent / "tokenizer")
        for reader in readers
        if all((folder / name).is_file() for name in reader.files)
    ]


def _read_json(file: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _t5_of_json(file: Path) -> Tokenizer:
    return _of_backend(_read_json(file), None, "</s>", "<pad>")


def _t5_of_sentencepiece(file: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    return Tokenizer(model.encode, model.get_piece_size(), None, model.eos_id(), max(model.pad_id(), 0))


def _clip_of_json(file: Path) -> Tokenizer:
    return _of_backend(_read_json(file), *_CLIP_MARKS)


def _clip_of_vocabulary(file: Path) -> Tokenizer:
    """Byte-pair encoding of lower-case words, of which the last part is another than the same in the middle."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    start, end, _ = _CLIP_MARKS
    merges = str(file.with_name("merges.txt"))
    model = BPE.from_file(str(file.with_name("vocab.json")), merges, unk_token=end, end_of_word_suffix="</w>")
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens([start, end])
    return _of_backend(backend, *_CLIP_MARKS)


def _of_backend(backend: Any, start: str | None, end: str, padding: str) -> Tokenizer:
    def number(mark: str) -> int:
        found = backend.token_to_id(mark)
        if found is None:
            raise ValueError(f"it has no token {mark}")
        return found

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    begin = None if start is None else number(start)
    return Tokenizer(encode, backend.get_vocab_size(), begin, number(end), number(padding))


_READERS = {
    "t5": [
        _Reader(("tokenizer.json",), "tokenizers", _t5_of_json),
        _Reader(("spiece.model",), "sentencepiece", _t5_of_sentencepiece),
    ],
    "clip": [
        _Reader(("tokenizer.json",), "tokenizers", _clip_of_json),
        _Reader(("vocab.json", "merges.txt"), "tokenizers", _clip_of_vocabulary),
    ],
}
