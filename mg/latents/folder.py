"""A folder of latents:

    latents.json                           what all of them share: model, checkpoint and its hash, scaling, clips, tiles
    index.jsonl                            one line per video, those that could not be encoded too, in the CSV's order
    latents-RRRRR-NNNNN.safetensors        shard N of rank R: the latents of many short videos, or of one long one

In a shard the latents of a video stand under its name, followed by `.z`, or by `.mean` and `.logvar`, as (z, t, h, w).
A shard is there whole or not at all, and its lines come into the index together, once it is. So what the index names is
complete, whenever a run was killed, and whatever other ranks are doing.
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
class Row:
    """One video of a folder: a line of its index.

    Attributes:
        name: as the CSV has it.
        caption: "" if there is none.
        status: ok, or error: then `error` says why, in one line, and the rest is empty.
        shard: the file that holds its latents.
        tensors: what is stored -> its key in the shard: `z`, or `mean` and `logvar`.
        shape: of each, (z, t, h, w).
        frames, height, width, fps: of the clip that was encoded.
        still: it is an image.
        tiles: whether frames were encoded whole or in which tiles.
        again: with an error, that the next run tries it by itself: it was not the video's fault.
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

    def failed(self, error: str, again: bool) -> "Row":
        return Row(self.name, self.caption, ERROR, error, again=again)


def read_rows(folder: Path) -> dict[str, Row]:
    """The lines of a folder's index by name; none where there is no index."""
    return shards.read_rows(Path(folder), Row)


def record(folder: Path, rows: Iterable[Row], order: Mapping[str, int]) -> None:
    """Put rows into a folder's index, all of them at once, in place of those of their names."""
    shards.record(folder, rows, order, Row)


class ShardWriter(shards.ShardWriter[Row]):
    """Fills the shards of one rank with latents; see `mg.data.shards.ShardWriter`."""

    def __init__(self, folder: Path, order: Mapping[str, int], dtype: str, shard_size: int, rank: int, world_size: int):
        super().__init__(folder, Row, "latents", order, dtype, shard_size, rank, world_size)


# Reading.


def open_latents(folder: str | Path) -> "LatentFolder":
    """The latents of a folder that `mg-encode-latents` wrote, by the names of the videos.

    Raises:
        DataError, CheckpointError: no such folder, or one without an index that can be read.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise DataError(f"{folder}: holds no latents, there is no {SETTINGS_FILE}")
    return LatentFolder(folder)


class LatentFolder(ShardReader, Mapping):
    """Names of videos -> `Latents`, in the order of the CSV, read when they are asked for.

    Attributes:
        settings: what latents.json holds.
        failed: names of the videos that could not be encoded -> why.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.settings = read_config(folder / SETTINGS_FILE)
        rows = read_rows(folder)
        self.failed = {row.name: row.error for row in rows.values() if row.status != OK}
        self._rows = {row.name: row for row in rows.values() if row.status == OK}

    def __getitem__(self, name: str) -> "Latents":
        if name not in self._rows:
            reason = self.failed.get(name, "there is no video of this name")
            raise DataError(f"{self.folder}: no latents of {name}: {reason}")
        return Latents(self, self._rows[name])

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class Latents:
    """The latents of one video, yet to be read; with the attributes of its `Row`: name, caption, shape, frames ..."""

    def __init__(self, folder: LatentFolder, row: Row):
        self._folder, self._row = folder, row

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._row, name)

    def read(self, tensor: str | None = None, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Latent frames [start, stop), by default all -> (z, t, h, w), float32.

        Args:
            tensor: z, or mean or logvar, whichever the folder holds; by default z or mean.

        Raises:
            DataError: a tensor that the folder does not hold, or frames that the video does not have.
            CheckpointError: a shard that is missing or damaged, in one line that names it and the key.
        """
        row = self._row
        tensor = tensor or next(iter(row.tensors))
        if tensor not in row.tensors:
            raise DataError(f"{row.name}: {tensor} was not stored; {', '.join(row.tensors)} can be read")
        stop = row.shape[1] if stop is None else stop
        if not 0 <= start <= stop <= row.shape[1]:
            raise DataError(f"{row.name}: has {row.shape[1]} latent frames; {start} to {stop} were asked for")
        return self._folder.read(row.shard, row.tensors[tensor], row.shape, start, stop)
