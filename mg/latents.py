"""A data set of latents: a folder written by `mg.inference.encode`, read here, and decoded by `mg.inference.decode`.

    from mg.latents import open_latents

    latents = open_latents("outputs/latents")
    clip = latents["a.mp4"]             # its caption, shape, frames, fps ...; nothing is read yet
    z = clip.read()                     # (z, t, h, w), float32
    z = clip.read(start=8, stop=16)     # reads only these 8 latent frames

Reading needs neither MindSpore nor a model. The folder:

    latents.json                           shared settings: model, checkpoint and its hash, scaling, clips, tiles
    index.jsonl                            one row per video, including failed ones, in the order of the CSV
    latents-RRRRR-NNNNN.safetensors        shard N of rank R: the latents of many short videos, or of one long one

In a shard, the keys of a video are its name followed by `.z`, or by `.mean` and `.logvar`; tensors are (z, t, h, w).
A shard is written atomically, and only then are its rows added to the index, together. So everything in the index is
complete, even if a run was killed or other ranks are still writing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mg.checkpoints.state_dict import read_config
from mg.data import shards
from mg.data.errors import DataError
from mg.data.shards import ERROR, OK, ShardReader

SETTINGS_FILE = "latents.json"


@dataclass
class LatentsRow:
    """One video of a folder: a row of its index.

    Attributes:
        name: as in the CSV.
        caption: "" if there is none.
        status: ok, or error: then `error` says why, in one line, and the rest is empty.
        shard: the file that holds its latents.
        tensors: maps what is stored (`z`, or `mean` and `logvar`) to its key in the shard.
        shape: of each tensor, (z, t, h, w).
        frames, height, width, fps: of the encoded clip.
        still: it is an image.
        tiles: whether frames were encoded whole or in which tiles.
        again: the error was not the video's fault, and the next run retries it automatically.
    """

    name: str
    caption: str = ""
    status: str = OK
    error: str = ""
    shard: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    still: bool = False
    tiles: str = ""
    again: bool = False

    @property
    def key(self) -> str:
        return self.name

    def failed(self, error: str, again: bool) -> "LatentsRow":
        return LatentsRow(self.name, self.caption, ERROR, error, again=again)


def read_rows(folder: Path) -> dict[str, LatentsRow]:
    """The rows of a folder's index by name; empty if there is no index."""
    return shards.read_rows(Path(folder), LatentsRow)


def record(folder: Path, rows: Iterable[LatentsRow], order: Mapping[str, int]) -> None:
    """Add rows to a folder's index, all at once, replacing rows of the same names."""
    shards.record(folder, rows, order, LatentsRow)


class ShardWriter(shards.ShardWriter[LatentsRow]):
    """Writes the shards of one rank with latents; see `mg.data.shards.ShardWriter`."""

    def __init__(self, folder: Path, order: Mapping[str, int], dtype: str, shard_size: int, rank: int, world_size: int):
        super().__init__(folder, LatentsRow, "latents", order, dtype, shard_size, rank, world_size)


# Reading.


def open_latents(folder: str | Path) -> "LatentFolder":
    """Open a folder that `mg-encode-latents` wrote: a mapping of video names to latents.

    Raises:
        DataError, CheckpointError: the folder does not exist or has no readable index.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise DataError(f"{folder}: has no latents, there is no {SETTINGS_FILE}")
    return LatentFolder(folder)


class LatentFolder(ShardReader, Mapping):
    """Maps names of videos to `Latents`, in the order of the CSV; tensors are read on demand.

    Attributes:
        settings: the contents of latents.json.
        failed: maps names of videos that could not be encoded to the reason.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.settings = read_config(folder / SETTINGS_FILE)
        rows = read_rows(folder)
        self.failed = {row.name: row.error for row in rows.values() if row.status != OK}
        self._rows = {row.name: row for row in rows.values() if row.status == OK}

    def __getitem__(self, name: str) -> "Latents":
        if name not in self._rows:
            reason = self.failed.get(name, "there is no video with this name")
            raise DataError(f"{self.folder}: no latents of {name}: {reason}")
        return Latents(self, self._rows[name])

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class Latents:
    """The latents of one video, read on demand, with its `LatentsRow`'s attributes: name, caption, shape, frames ..."""

    def __init__(self, folder: LatentFolder, row: LatentsRow):
        self._folder, self._row = folder, row

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._row, name)

    def read(self, tensor: str | None = None, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Latent frames [start, stop), by default all -> (z, t, h, w), float32.

        Args:
            tensor: z, or mean or logvar, whichever the folder has; by default z or mean.

        Raises:
            DataError: the folder has no such tensor, or the video no such frames.
            CheckpointError: a shard is missing or damaged; one line names it and the key.
        """
        row = self._row
        tensor = tensor or next(iter(row.tensors))
        if tensor not in row.tensors:
            raise DataError(f"{row.name}: {tensor} was not stored; {', '.join(row.tensors)} can be read")
        stop = row.shape[1] if stop is None else stop
        if not 0 <= start <= stop <= row.shape[1]:
            raise DataError(f"{row.name}: has {row.shape[1]} latent frames; {start} to {stop} were requested")
        return self._folder.read(row.shard, row.tensors[tensor], row.shape, start, stop)
