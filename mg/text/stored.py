"""A folder of stored text embeddings, read instead of running a text encoder:

    embeddings.json                          shared settings: encoder, checkpoint and its hash, lengths, cleaning
    index.jsonl                              one line per text, also for those that failed
    embeddings-RRRRR-NNNNN.safetensors       shard N of rank R: the embeddings of many texts

In a shard the embedding of a text is stored as (1, tokens, D) under a hash of the text. Padding is not stored, since
its embeddings are meaningless. `mg.text.store` writes such a folder; see `mg.data.shards` for the general format.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mg.checkpoints.state_dict import read_config
from mg.data.errors import DataError
from mg.data.shards import ERROR, OK, ShardReader, read_rows
from mg.plain_text import name_bytes, printable
from mg.text.captions import clean_caption
from mg.text.encoders import TextEncoder

SETTINGS_FILE, PREFIX, TENSOR = "embeddings.json", "embeddings", "y"
_SHOWN = 80  # characters of a text shown in a message


@dataclass
class TextRow:
    """One text: a line of the folder's index.

    Attributes:
        name: the text, as the encoder received it.
        status: ok or error; `error` is then the reason, in one line, and the rest is empty.
        shard: the file with its embedding.
        tensors: y -> its key in the shard.
        shape: (1, tokens, D).
        again: with an error, whether the next run retries it automatically: it was not the text's fault.
    """

    name: str
    status: str = OK
    error: str = ""
    shard: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    again: bool = False

    @property
    def key(self) -> str:
        return hashlib.sha256(name_bytes(self.name)).hexdigest()

    def failed(self, error: str, again: bool) -> "TextRow":
        return TextRow(self.name, ERROR, error, again=again)


def open_embeddings(folder: str | Path) -> "StoredEmbeddings":
    """Open a folder of embeddings that `mg-encode-text` wrote.

    Raises:
        DataError, CheckpointError: no such folder, or one without a readable index.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise DataError(f"{folder}: no text embeddings here, {SETTINGS_FILE} is missing")
    return StoredEmbeddings(folder)


class StoredEmbeddings(TextEncoder):
    """Replaces the text encoder that the embeddings were made with, for the stored texts.

    Attributes:
        settings: the contents of embeddings.json.
        failed: texts that could not be encoded -> the reason.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = settings = read_config(folder / SETTINGS_FILE)
        try:
            self.type, self.config = settings["encoder"]["type"], settings["encoder"]["config"]
            self.output_dim, self.model_max_length = int(settings["output_dim"]), int(settings["model_max_length"])
            self.has_mask, self._cleaned = bool(settings["has_mask"]), int(settings["cleaned"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / SETTINGS_FILE}: does not describe text embeddings ({error})") from None
        rows = read_rows(folder, TextRow)
        self.failed = {row.name: row.error for row in rows.values() if row.status != OK}
        self._rows = {row.name: row for row in rows.values() if row.status == OK}
        self._shards = ShardReader(folder)

    def __contains__(self, text: str) -> bool:
        return self._row(text) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, text: str) -> np.ndarray:
        """The embedding of one text -> (tokens, D), float32.

        Raises:
            DataError: the text is not stored.
            CheckpointError: a missing or damaged shard; the message is one line that names it and the key.
        """
        row = self._row(text)
        if row is None:
            shown = printable(text[:_SHOWN]) + "..." * (len(text) > _SHOWN)
            reason = self.failed.get(text, "store it with mg-encode-text, or give a text encoder")
            raise DataError(f"{self.folder}: there is no embedding of {shown!r}; {reason}")
        return self._shards.read(row.shard, row.tensors[TENSOR], row.shape, 0, row.shape[1])[0]

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Like the encoder's own; a text that is not stored is an error, see `read`."""
        length = self.model_max_length if self.has_mask else 1
        y = np.zeros((len(prompts), 1, length, self.output_dim), np.float32)
        mask = np.zeros((len(prompts), length), bool)
        for number, prompt in enumerate(prompts):
            states = self.read(prompt)
            y[number, 0, : len(states)] = states
            mask[number, : len(states)] = True
        return y, mask if self.has_mask else None

    def _row(self, text: str) -> TextRow | None:
        """The row of the text itself or, if the stored texts are cleaned, of the cleaned text."""
        row = self._rows.get(text)
        return row if row or not self._cleaned else self._rows.get(clean_caption(text, self._cleaned))
