"""Load the model and the clips of a CSV: what every evaluation has in common.

    model = load_model(config)
    for batch, x in batches(rows, config, on_error):    # x (B, 3, T, H, W)
        for clips, y in spared(compute, batch, x, on_error):
            ...

A clip that fails, in any way, is reported to `on_error`, and the others continue.
"""

import contextlib
import json
import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.config import PATH_ALIASES, require
from mg.data.buckets import REASONS, Assignment, Place, Sources, read_buckets
from mg.data.decoding import VideoReader
from mg.data.errors import NoRoom, VideoError, reading
from mg.data.index import IndexRow
from mg.data.timeline import Timeline
from mg.data.transforms import center_crop, covering_size, resize, to_video_tensor
from mg.data.video import is_image, open_video, read_image
from mg.memory import available_memory
from mg.models import VideoAutoencoder, from_pretrained
from mg.plain_text import name_bytes
from mg.sampling import clips_noise
from mg.tiling import TilingConfig

T = TypeVar("T")

_logger = logging.getLogger(__name__)

GRID = 32  # pixels: a multiple that every model accepts without padding
_BYTES_READ = 3 * (1 + 4)  # per pixel: uint8 as read plus float32 as the model sees it


@dataclass
class ModelConfig:
    """The autoencoder.

    Args:
        from_pretrained: checkpoint: a file, or a folder that `save_pretrained` wrote.
        name: dc_ae | hunyuan_vae | image_vae | tae | temporal_vae; by default read from the config next to the
            checkpoint or from its tensors.
        config: keys that override that config.
        dtype: precision of convolutions and matrix products.
        use_spatial_tiling: run frames larger than a tile in tiles, which bounds the memory.
        use_temporal_tiling: run videos longer than a tile in tiles.
        spatial_tile_size: height and width of a tile in pixels: the size of the clips that the model was trained on.
        temporal_tile_size: frames of a tile, likewise.
        tile_overlap_factor: fraction of a tile that overlaps the next one; overlaps are blended linearly.
    """

    from_pretrained: str
    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    spatial_tile_size: int = 256
    temporal_tile_size: int = 32
    tile_overlap_factor: float = 0.25


@dataclass
class TileFields:
    """Tile sizes and overlaps for enable_tile; any that is not given keeps the model's default.

    Args:
        encode_tile: frames of a tile to encode; 0 encodes all frames at once.
        encode_overlap: frames shared by neighbouring tiles when encoding.
        decode_tile: frames that a tile decodes to; 0 decodes all frames at once.
        decode_overlap: frames shared by neighbouring tiles when decoding.
        spatial_tile: height and width of a tile in pixels; 0 leaves frames whole.
        spatial_overlap: pixels shared by neighbouring tiles.
        last: shift moves the last tile back until it is full, short cuts it off.
    """

    encode_tile: int | None = None
    encode_overlap: int | None = None
    decode_tile: int | None = None
    decode_overlap: int | None = None
    spatial_tile: int | None = None
    spatial_overlap: int | None = None
    last: Literal["shift", "short"] | None = None

    def given(self) -> dict[str, int | str]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(kw_only=True)
class ClipOptions:
    """How clips are read, and which device they run on.

    Args:
        video_folder: folder that the paths in the CSV are relative to; by default the CSV's folder.
        device: auto picks the first available of ascend, gpu and cpu.
        mode: graph compiles once per shape, pynative runs op by op; auto is pynative on a CPU, graph elsewhere.
        num_frames: frames of a clip, from the beginning; by default the whole video. Images are accepted at any value.
        frame_stride: take every n-th frame.
        fps_max: frame rate above which a video is first thinned, to every ceil(fps / fps_max)-th frame. With a variable
            frame rate, this and frame_stride count in seconds.
        image_size: short side after resizing, in pixels; 0 keeps the size of the video.
        crop: crop the middle to a square; otherwise the aspect ratio is kept.
        buckets: resolution -> frames -> [keep_prob, batch_size], see mg.data.buckets: each clip gets its bucket's
            frames (from the beginning), size and batch size instead of num_frames, image_size, crop and batch_size. A
            file that fits no bucket counts as unreadable. The keep_prob draw depends only on the file's path.
        square_pixels: scale videos with non-square pixels (anamorphic ones) to square pixels, as players do.
        allow_partial: use the frames that decode from a truncated or damaged video; otherwise it is unreadable.
        num_workers: threads that read ahead.
        max_memory: GB that running a clip may use; by default what is free when clips of its size first come.

    Raises:
        ValueError: a setting is out of range.
    """

    video_folder: str | None = None
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"
    num_frames: int | None = None
    frame_stride: int = 1
    fps_max: float | None = None
    image_size: int = 256
    crop: bool = True
    buckets: dict[str, Any] | None = None
    square_pixels: bool = True
    allow_partial: bool = False
    num_workers: int = 2
    max_memory: float | None = None

    def __post_init__(self):
        for name in ("num_frames", "frame_stride", "num_workers"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        require(self.fps_max is None or self.fps_max > 0, self, "fps_max", "above 0")
        require(self.image_size >= 0, self, "image_size", "at least 1, or 0")
        require(self.max_memory is None or self.max_memory > 0, self, "max_memory", "above 0")
        if self.buckets is not None:
            read_buckets(self.buckets)

    def describe(self) -> dict[str, Any]:
        """All settings that the clips depend on, as JSON values."""
        names = ["frame_stride", "fps_max", "square_pixels", "allow_partial"]
        names += ["num_frames", "image_size", "crop"] if self.buckets is None else ["buckets"]
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))


@dataclass
class ClipsConfig(ClipOptions):
    """A model, the clips to run through it, and how they are read.

    Args:
        model: the autoencoder.
        csv_path: CSV with a column `video` or `path`.
        output_path: folder to write to.
        seed: for sampling.
        sample_posterior: sample the posterior; by default its mean is used. Without a posterior (Video DC-AE) there
            is nothing to sample. A clip's sample depends only on the seed and its name.
        batch_size: clips of equal shape to run at once.
        enable_tile: run in tiles, which bounds the memory: true always, auto only if a clip doesn't fit into memory
            whole, in the largest tiles that do. Replaces model.use_spatial_tiling and model.use_temporal_tiling,
            which always tile.
        tiling: tile sizes and overlaps for enable_tile.

    Raises:
        ValueError: a setting is out of range.
    """

    aliases: ClassVar[dict[str, str]] = {
        **PATH_ALIASES,
        "dataset.data_path": "csv_path",
        "ckpt_path": "model.from_pretrained",
        "ckpt-path": "model.from_pretrained",
    }

    model: ModelConfig
    csv_path: str
    output_path: str = "samples"
    seed: int = 42
    sample_posterior: bool = False
    batch_size: int = 1
    enable_tile: bool | Literal["auto"] = "auto"
    tiling: TileFields = field(default_factory=TileFields)

    def __post_init__(self):
        super().__post_init__()
        require(self.batch_size >= 1, self, "batch_size", "at least 1")
        if self.enable_tile is True and (self.model.use_spatial_tiling or self.model.use_temporal_tiling):
            raise ValueError(
                "enable_tile and model.use_spatial_tiling or model.use_temporal_tiling are two ways to set up tiles; "
                "turn one of them off"
            )


@dataclass
class Clip:
    """A video as the model sees it, `x` (3, T, H, W) in [-1, 1]. `index` is the number of its row; `batch_size` is its
    bucket's, if there are buckets."""

    index: int
    x: np.ndarray
    fps: float
    still: bool
    batch_size: int | None = None


def load_model(config: ClipsConfig, path: str | None = None) -> VideoAutoencoder:
    """The model of `config.model`, with the weights of the checkpoint at `path` if given, and with tiling set up."""
    settings = config.model
    model = from_pretrained(path or settings.from_pretrained, settings.name, settings.dtype, **settings.config)
    if config.enable_tile:
        model.enable_tiling(**config.tiling.given())
    if config.enable_tile == "auto":  # keep the sizes; `Fitting` decides when to use them
        model.disable_tiling()
    if settings.use_spatial_tiling or settings.use_temporal_tiling:
        tiling = TilingConfig.from_tile_sizes(
            model.temporal_compression,
            model.spatial_compression,
            settings.use_spatial_tiling,
            settings.use_temporal_tiling,
            settings.spatial_tile_size,
            settings.temporal_tile_size,
            settings.tile_overlap_factor,
        )
        model.enable_tiling(**vars(tiling))
    return model


def noise_for(model: VideoAutoencoder, x: np.ndarray, names: Sequence[str], config: ClipsConfig) -> np.ndarray | None:
    """Noise for sampling the posterior of a batch of clips, x (B, 3, T, H, W), by their `names`; None if the mean is
    used or there is nothing to sample."""
    if not (config.sample_posterior and model.geometry.has_posterior):
        return None
    return clips_noise(config.seed, names, model.latent_shape(x.shape))


def load_clip(path: Path, config: ClipOptions) -> tuple[np.ndarray, float]:
    """Read a video or image as the model sees it.

    Returns:
        x (3, T, H, W), float32 in [-1, 1], and its frame rate.

    Raises:
        VideoError: the file cannot be decoded or has too few frames.
    """
    with open_clip(path, config) as clip:
        return clip.read(0, clip.num_frames), clip.fps


@contextlib.contextmanager
def open_clip(path: Path, config: ClipOptions, grid: int = GRID) -> Iterator["ClipReader"]:
    """Open a video or image to be read in pieces, as the model sees it; raises the same errors as `load_clip`.

    Args:
        grid: bucket sizes are multiples of this: the model's `spatial_compression`.
    """
    if is_image(path):
        image = read_image(path)  # (H, W, C)
        height, width, _ = image.shape
        place = _place(path, config, grid, 1, height, width, still=True)
        size = _covering(config, place, height, width)
        yield ClipReader(path, lambda: iter([resize(image, *size)]), 1, 1.0, size, True, config, place)
        return
    with open_video(path, square_pixels=config.square_pixels, allow_partial=config.allow_partial) as video:
        length = 0 if config.buckets is None else video.listed().length(config.fps_max, config.frame_stride)
        place = _place(path, config, grid, length, video.height, video.width, still=False)
        timeline = _timeline(video, config, place.bucket.num_frames if place else config.num_frames)
        num_frames, fps = timeline.from_start(
            place.bucket.num_frames if place else config.num_frames, config.fps_max, config.frame_stride
        )
        size = _covering(config, place, video.height, video.width)
        step = timeline.step(config.fps_max, config.frame_stride)
        yield ClipReader(path, lambda: video.clip(timeline, 0, step, size), num_frames, fps, size, False, config, place)


def _timeline(video: VideoReader, config: ClipOptions, num_frames: int | None) -> Timeline:
    """The frames as far as they have to be known: all that decode, or just enough for a clip of `num_frames`."""
    if num_frames is None:
        return video.decoded()
    for timeline in video.timelines():
        if timeline.starts(num_frames, timeline.step(config.fps_max, config.frame_stride)):
            return timeline
    found, needed = timeline.shortage(num_frames, config.fps_max, config.frame_stride)
    raise VideoError(f"{video.path}: the video has {found}; {needed} are needed")


def _covering(config: ClipOptions, place: Place | None, height: int, width: int) -> tuple[int, int]:
    """The size that frames are scaled to before cropping."""
    if place:
        return covering_size(height, width, *place.size)
    return covering_size(height, width, config.image_size, config.image_size) if config.image_size else (height, width)


def _place(
    path: Path, config: ClipOptions, grid: int, length: int, height: int, width: int, still: bool
) -> Place | None:
    """The bucket and size of a file; None without buckets."""
    if config.buckets is None:
        return None
    assignment = Assignment(
        config.buckets, grid, Sources(*(np.array([each]) for each in (length, height, width, still)))
    )
    (number,) = assignment.draw(np.random.default_rng(zlib.crc32(name_bytes(path.as_posix()))))
    if number < 0:
        raise VideoError(f"{path}: no bucket takes its {length} frames of {height} x {width}: {REASONS[int(number)]}")
    return assignment.places[number]


class ClipReader:
    """An open clip: `num_frames`, `fps`, whether it is `still`, its bucket's `batch_size`, the `size` of its frames as
    the model sees them, and `read`.

    Args:
        path: the file.
        begin: returns an iterator over the clip's frames from the first on, uint8 (H, W, C), already scaled.
        num_frames, fps: of the clip.
        scaled: height and width of the frames from `begin`.
        config: how they are cropped.
        place: the clip's bucket and size, if there are buckets.
    """

    def __init__(
        self,
        path: Path,
        begin: Callable[[], Iterator[np.ndarray]],
        num_frames: int,
        fps: float,
        scaled: tuple[int, int],
        still: bool,
        config: ClipOptions,
        place: Place | None = None,
    ):
        self.num_frames, self.fps, self.still = num_frames, fps, still
        self.batch_size = place.bucket.batch_size if place else None
        self.size = place.size if place else (min(scaled),) * 2 if config.crop else scaled
        self._path, self._begin, self._num_workers = path, begin, config.num_workers
        self._frames = begin()
        self._next = 0  # number of the next frame in it
        self._last: np.ndarray | None = None  # the frames returned last
        self._end = 0  # end of their range

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) -> (3, stop - start, H, W), float32 in [-1, 1].

        Frames shared with the previous piece are not decoded again. When reading in order, only one piece is held.

        Raises:
            VideoError: frames do not decode, or (as NoRoom) do not fit into memory.
        """
        self._check_memory(stop - start)
        kept = self._end - start if self._last is not None and self._end - len(self._last) <= start < self._end else 0
        with reading(self._path):
            parts = [self._last[-kept:]] if kept else []
            if start + kept < stop:
                parts.append(self._decode(start + kept, stop))
            frames = (np.concatenate(parts) if len(parts) > 1 else parts[0])[: stop - start]
            self._last, self._end = frames, stop
            return to_video_tensor(frames)

    def _decode(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop), uint8 (T, H, W, C), each cropped as it is decoded to hold no more than the clip."""
        if start < self._next:
            self._frames, self._next = self._begin(), 0
        frames, count = np.empty((stop - start, *self.size, 3), np.uint8), 0
        for frame in islice(self._frames, start - self._next, stop - self._next):
            frames[count] = center_crop(frame[None], *self.size)[0]
            count += 1
        self._next = stop
        if start + count < stop:
            raise VideoError(f"{self._path}: the video ends after {start + count} of {self.num_frames} frames")
        return frames

    def _check_memory(self, frames: int) -> None:
        """Raise NoRoom if `frames` frames, as the model sees them, don't fit into memory with those read ahead."""
        height, width = self.size
        needed, free = frames * height * width * _BYTES_READ, available_memory()
        if free is not None and needed * (self._num_workers + 1) > free:
            raise NoRoom(
                f"{self._path}: {frames} frames of {height}x{width} take {needed / 1e9:.1f} GB before the model even "
                f"runs, and {free / 1e9:.1f} GB of memory are free: take fewer (--num_frames, --frame_stride) or "
                "smaller ones (--image_size)"
            )


@contextlib.contextmanager
def sparing(on_error: Callable[[Exception], None]) -> Iterator[None]:
    """Report any exception in the block to `on_error` and continue after it: a failure costs only one clip."""
    try:
        yield
    except Exception as error:
        _logger.debug("", exc_info=True)
        on_error(error.with_traceback(None))  # the traceback would keep the clip's memory alive


def spared(
    compute: Callable[[list[Clip], np.ndarray], T],
    batch: list[Clip],
    x: np.ndarray,
    on_error: Callable[[int, Exception], None],
) -> Iterator[tuple[list[Clip], T]]:
    """The result of `compute` for a batch; if that fails, say out of memory, of each clip separately, so that one clip
    doesn't fail the others.

    Args:
        compute: function of the clips and their x (B, 3, T, H, W), which may be padded after them.
        on_error: called with the row number of a clip that fails on its own, too.
    """
    failed: list[Exception] = []
    with sparing(failed.append):
        made = compute(batch, x)
    if not failed:
        yield batch, made
    elif len(batch) == 1 == len(x):
        on_error(batch[0].index, failed[0])
    else:
        for clip in batch:
            yield from spared(compute, [clip], clip.x[None], on_error)


def batches(
    rows: list[IndexRow], config: ClipsConfig, on_error: Callable[[int, Exception], None], grid: int = GRID
) -> Iterator[tuple[list[Clip], np.ndarray]]:
    """The clips of an index in batches of one shape, with a progress bar.

    Args:
        on_error: called with the number of a row that cannot be read; the others continue.
        grid: bucket sizes are multiples of this.

    Yields:
        The clips of a batch and x (B, 3, T, H, W), in which the last clip may be repeated: see `group_by_shape`.
    """
    with tqdm(total=len(rows), desc="clips", unit="clip") as progress, runtime.CtrlC() as ctrl_c:

        def failed(index: int, error: Exception) -> None:
            on_error(index, error)
            progress.update()

        for batch, size in group_by_shape(read_clips(rows, config, failed, grid), config.batch_size):
            yield batch, np.stack([clip.x for clip in batch] + [batch[-1].x] * (size - len(batch)))
            progress.update(len(batch))
            ctrl_c.check()


def open_clips(
    rows: list[IndexRow],
    config: ClipOptions,
    first: int,
    on_error: Callable[[int, Exception], None],
    grid: int = GRID,
) -> Iterator[tuple[int, ClipReader]]:
    """Clips in the order of the index, to be read in pieces; threads open them and read their `first` frames ahead.

    Args:
        on_error: called with the number of a row that cannot be opened; the others continue.
        grid: bucket sizes are multiples of this.

    Yields:
        A row's number and its clip, which is closed when the next one is requested.
    """

    def begin(row: IndexRow) -> tuple[ClipReader, contextlib.ExitStack]:
        with contextlib.ExitStack() as stack:
            clip = stack.enter_context(open_clip(row.path, config, grid))
            clip.read(0, min(first, clip.num_frames))
            return clip, stack.pop_all()

    for index, (clip, stack) in _ahead(begin, rows, config.num_workers, on_error):
        with stack:
            yield index, clip


def read_clips(
    rows: list[IndexRow], config: ClipOptions, on_error: Callable[[int, Exception], None], grid: int = GRID
) -> Iterator[Clip]:
    """Clips in the order of the index, read ahead by threads."""

    def load(row: IndexRow) -> tuple[np.ndarray, float, bool, int | None]:
        with open_clip(row.path, config, grid) as clip:
            return clip.read(0, clip.num_frames), clip.fps, clip.still, clip.batch_size

    for index, loaded in _ahead(load, rows, config.num_workers, on_error):
        yield Clip(index, *loaded)


def _ahead(
    job: Callable[[IndexRow], T], rows: list[IndexRow], num_workers: int, on_error: Callable[[int, Exception], None]
) -> Iterator[tuple[int, T]]:
    """The results of `job` for the rows, in order, computed by threads up to `num_workers` rows ahead."""
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque = deque()
        for i in range(len(rows) + num_workers):
            if i < len(rows):
                pending.append((i, pool.submit(job, rows[i])))
            if i < num_workers:
                continue
            index, future = pending.popleft()
            try:
                done = future.result()
            except Exception as error:  # a bad file may raise anything
                on_error(index, error)
                continue
            yield index, done


def group_by_shape(clips: Iterable[Clip], batch_size: int) -> Iterator[tuple[list[Clip], int]]:
    """Batches of clips of one shape, each with the size it should be run at: `batch_size`, or that of the clips.

    A shape keeps the size of its first batch, and a smaller one later should be padded to it, so that a compiled model
    sees one batch shape per clip shape. At most 4 times the largest batch size are held back.
    """
    waiting: dict[tuple, list[Clip]] = {}
    sizes: dict[tuple, int] = {}
    largest = batch_size

    def take(kind: tuple) -> tuple[list[Clip], int]:
        batch = waiting.pop(kind)
        return batch, sizes.setdefault(kind, len(batch))

    for clip in clips:
        wanted = clip.batch_size or batch_size
        largest, kind = max(largest, wanted), (clip.x.shape, wanted)
        waiting.setdefault(kind, []).append(clip)
        if len(waiting[kind]) == sizes.get(kind, wanted):
            yield take(kind)
        elif sum(map(len, waiting.values())) >= 4 * largest:
            yield take(next(iter(waiting)))  # the shape that has waited longest
    while waiting:
        yield take(next(iter(waiting)))
