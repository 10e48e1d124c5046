"""Texts to token IDs, offline, with the files that come with released text encoders.

    t5      tokenizer.json with the tokenizers package, or spiece.model with sentencepiece (extra `text`)
    clip    tokenizer.json, or vocab.json and merges.txt, with the tokenizers package

The truncation and padding settings in these files are ignored: both are done here, the same way for all.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mg.plain_text import one_line

_CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>")  # start, end, padding


class Tokens(NamedTuple):
    """A text's token IDs, cut or padded to a length, (L,) int32; and how many are not padding."""

    ids: np.ndarray
    used: int


class Tokenizer:
    """Texts to `Tokens`.

    Args:
        encode: a text -> its token IDs, without start and end tokens.
        size: vocabulary size.
        start: ID of the start token; None for none.
        end: ID of the end token, which also ends texts that were cut.
        padding: ID of the padding token.

    Attributes:
        file: the file it was read from.
    """

    file: Path

    def __init__(self, encode: Callable[[str], list[int]], size: int, start: int | None, end: int, padding: int):
        self._encode, self.size = encode, size
        self.start, self.end, self.padding = start, end, padding

    def __call__(self, text: str, length: int) -> Tokens:
        """A text as at most `length` tokens including the end token, padded to `length`."""
        before = [] if self.start is None else [self.start]
        # A lone surrogate, which is not a character, would make either package fail.
        numbers = self._encode(text.encode("utf-8", "replace").decode())
        found = [*before, *numbers[: length - len(before) - 1], self.end]
        return Tokens(np.array(found + [self.padding] * (length - len(found)), np.int32), len(found))


class _Reader(NamedTuple):
    """A tokenizer's files, the package that reads them, and the function that does."""

    files: tuple[str, ...]
    package: str
    read: Callable[[Path], Tokenizer]


def open_tokenizer(kind: str, path: str | Path) -> Tokenizer:
    """Open the tokenizer of a text encoder.

    Args:
        kind: t5 | clip.
        path: a file, or a folder: the files are looked for in it, in its subfolder `tokenizer`, and in `tokenizer` next
            to it, as in a diffusers pipeline.

    Raises:
        ValueError: there are no such files, they cannot be read, or the package that reads them is not installed.
    """
    found = _find(Path(path), _READERS[kind])
    if not found:
        wanted = " or ".join(" with ".join(reader.files) for reader in _READERS[kind])
        raise ValueError(f"{path}: there is no tokenizer; put {wanted}, which the weights come with, there")
    file, reader = next((pair for pair in found if find_spec(pair[1].package)), found[0])
    if find_spec(reader.package) is None:
        raise ValueError(f"{file}: reading it needs the {reader.package} package: pip install {reader.package}")
    try:
        tokenizer = reader.read(file)
    except Exception as error:  # these packages raise all kinds of exceptions
        said = one_line(error)[:200]
        raise ValueError(f"{file}: not a tokenizer for {kind} that can be read ({said})") from None
    tokenizer.file = file
    return tokenizer


def _find(path: Path, readers: list[_Reader]) -> list[tuple[Path, _Reader]]:
    """The tokenizer files that a path refers to, each with its reader."""
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
    """Byte-pair encoding of lower-case words; a word's last piece has other tokens than pieces inside it."""
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
