"""Clips of a CSV and the model that is to see them: what every evaluation has in common.

    model = load_model(config)
    for batch, x in batches(rows, config, on_error):    # x (B, 3, T, H, W)
        for clips, y in spared(compute, batch, x, on_error):
            ...

A clip that fails, in whatever way, goes to `on_error`, and the others go on.
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
from mg.config import require
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

GRID = 32  # pixels: what every model takes whole
_BYTES_READ = 3 * (1 + 4)  # of a pixel, as it is read and as a model takes it


@dataclass
class ModelConfig:
    """The autoencoder.

    Args:
        from_pretrained: checkpoint: a file, or a folder that `save_pretrained` wrote.
        name: dc_ae | hunyuan_vae | image_vae | tae | temporal_vae; by default what the config beside the
            checkpoint or its tensors say.
        config: keys to lay over that config.
        dtype: precision of convolutions and products.
        use_spatial_tiling: run frames larger than a tile in tiles, which bounds the memory.
        use_temporal_tiling: run videos longer than a tile in tiles.
        spatial_tile_size: height and width of a tile in pixels: those of the clips that the model was trained on.
        temporal_tile_size: frames of a tile, likewise.
        tile_overlap_factor: share of a tile that it has in common with the next one, blended linearly.
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
    """Where the tiles of enable_tile lie; what is not given stays as the model has it.

    Args:
        encode_tile: frames of a tile to encode; 0 encodes all frames at once.
        encode_overlap: frames that neighbouring tiles share there.
        decode_tile: frames that a tile decodes to; 0 decodes all frames at once.
        decode_overlap: frames that neighbouring tiles share there.
        spatial_tile: height and width of a tile in pixels; 0 leaves frames whole.
        spatial_overlap: pixels that neighbours share.
        last: the last tile moves back until it is full, or is cut short.
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
    """How clips are read, and on what they run.

    Args:
        video_folder: folder that the paths in the CSV are relative to; by default the CSV's own.
        device: auto takes ascend, gpu or cpu, the first that is there.
        mode: graph compiles once per shape, pynative runs op by op; auto is pynative on a CPU, graph elsewhere.
        num_frames: frames of a clip, from the beginning; by default the whole video. Images pass at any setting.
        frame_stride: take every n-th frame.
        fps_max: frame rate above which a video is thinned first, to every ceil(fps / fps_max)-th frame. Where the rate
            varies, this and frame_stride count in seconds.
        image_size: short side after resizing, in pixels; 0 keeps the size of the video.
        crop: crop the middle to a square; otherwise the aspect is kept.
        buckets: resolution -> frames -> [keep_prob, batch_size], see mg.data.buckets: each clip goes to its bucket's
            frames, from the beginning, size and batch size, in place of num_frames, image_size, crop and batch_size. A
            file that no bucket takes is one that cannot be read. What keep_prob draws depends on the file's path alone.
        square_pixels: scale videos of other pixels (anamorphic ones) to square pixels, as players do.
        allow_partial: of a video that is cut short or damaged, take what decodes; else it cannot be read.
        num_workers: threads that read ahead.
        max_memory: GB that running a clip may take; by default what is free when clips of its size first come.

    Raises:
        ValueError: a setting out of its range.
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
        """All settings that the clips depend on, as JSON has them."""
        names = ["frame_stride", "fps_max", "square_pixels", "allow_partial"]
        names += ["num_frames", "image_size", "crop"] if self.buckets is None else ["buckets"]
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))


@dataclass
class ClipsConfig(ClipOptions):
    """A model, the clips that it is to see, and how they are read.

    Args:
        model: the autoencoder.
        csv_path: CSV with a column `video` or `path`.
        output_path: folder to write to.
        seed: for sampling.
        sample_posterior: take samples of the latents; by default their mean. Without a posterior (Video DC-AE) there
            is nothing to sample. A clip's sample depends on the seed and its name alone.
        batch_size: clips of equal shape to run at once.
        enable_tile: run in tiles, which bounds the memory: auto does where a clip does not fit into it whole, in the
            largest tiles that do. With true or auto in place of model.use_spatial_tiling and
            model.use_temporal_tiling, which are tiles in any case.
        tiling: where the tiles of enable_tile lie.

    Raises:
        ValueError: a setting out of its range.
    """

    aliases: ClassVar[dict[str, str]] = {
        "data_path": "csv_path",
        "data-path": "csv_path",
        "dataset.data_path": "csv_path",
        "save_dir": "output_path",
        "save-dir": "output_path",
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
                "enable_tile and model.use_spatial_tiling or model.use_temporal_tiling are two ways to say where the "
                "tiles lie; turn one of them off"
            )


@dataclass
class Clip:
    """A video as a model takes it, `x` (3, T, H, W) in [-1, 1], and where it came from: `index`, a row's number. Its
    `batch_size` is that of its bucket, if there are buckets."""

    index: int
    x: np.ndarray
    fps: float
    still: bool
    batch_size: int | None = None


def load_model(config: ClipsConfig, path: str | None = None) -> VideoAutoencoder:
    """The model of `config.model`, with the weights of another checkpoint if `path` names one, tiled if so asked."""
    settings = config.model
    model = from_pretrained(path or settings.from_pretrained, settings.name, settings.dtype, **settings.config)
    if config.enable_tile:
        model.enable_tiling(**config.tiling.given())
    if config.enable_tile == "auto":  # the sizes are right: when to use them is `Fitting`'s to say
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
    """The noise of a sample of the posterior for a batch of clips, x (B, 3, T, H, W), by their `names`; None where none
    is wanted, or there is nothing to sample."""
    if not (config.sample_posterior and model.has_posterior):
        return None
    return clips_noise(config.seed, names, model.latent_shape(x.shape))


def load_clip(path: Path, config: ClipOptions) -> tuple[np.ndarray, float]:
    """A video or image as the model takes it.

    Returns:
        x (3, T, H, W), float32 in [-1, 1], and its frame rate.

    Raises:
        VideoError: the file cannot be decoded or has too few frames.
    """
    with open_clip(path, config) as clip:
        return clip.read(0, clip.num_frames), clip.fps


@contextlib.contextmanager
def open_clip(path: Path, config: ClipOptions, grid: int = GRID) -> Iterator["ClipReader"]:
    """A video or image to be read by pieces, as the model takes it; raises as `load_clip` does.

    Args:
        grid: what the sizes of buckets are multiples of: the model's `spatial_compression`.
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
    """The frames as far as they have to be known: all that decode, or that there are so many for a clip."""
    if num_frames is None:
        return video.decoded()
    for timeline in video.timelines():
        if timeline.starts(num_frames, timeline.step(config.fps_max, config.frame_stride)):
            return timeline
    found, needed = timeline.shortage(num_frames, config.fps_max, config.frame_stride)
    raise VideoError(f"{video.path}: the video has {found}; {needed} are needed")


def _covering(config: ClipOptions, place: Place | None, height: int, width: int) -> tuple[int, int]:
    """The size that frames are scaled to before they are cropped."""
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
    the model takes them, and `read`.

    Args:
        path: the file.
        begin: gives the clip's frames from the first on, one by one, uint8 (H, W, C) and scaled.
        num_frames, fps: of the clip.
        scaled: height and width of what `begin` gives.
        config: how they are cropped.
        place: to which bucket and size, if there are buckets.
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
        self._next = 0  # the number of its next frame
        self._last: np.ndarray | None = None  # the frames given last
        self._end = 0  # of their range

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) -> (3, stop - start, H, W), float32 in [-1, 1].

        What this piece shares with the last one is not decoded again: read on in order, and a piece's frames are held.

        Raises:
            VideoError: frames that do not decode, or, as NoRoom, that there is no memory for.
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
        """Frames [start, stop), uint8 (T, H, W, C), each cropped as it comes: no more is held than the clip."""
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
        """Raise NoRoom where so many frames, as the model takes them, do not fit beside those read ahead."""
        height, width = self.size
        needed, free = frames * height * width * _BYTES_READ, available_memory()
        if free is not None and needed * (self._num_workers + 1) > free:
            raise NoRoom(
                f"{self._path}: {frames} frames of {height}x{width} take {needed / 1e9:.1f} GB before a model sees "
                f"them, and {free / 1e9:.1f} GB of memory are free: take fewer (--num_frames, --frame_stride), or "
                "smaller ones (--image_size)"
            )


@contextlib.contextmanager
def sparing(on_error: Callable[[Exception], None]) -> Iterator[None]:
    """Whatever fails within is of one clip: `on_error` is told, and what stands behind goes on."""
    try:
        yield
    except Exception as error:
        _logger.debug("", exc_info=True)
        on_error(error.with_traceback(None))  # which would hold what the clip took


def spared(
    compute: Callable[[list[Clip], np.ndarray], T],
    batch: list[Clip],
    x: np.ndarray,
    on_error: Callable[[int, Exception], None],
) -> Iterator[tuple[list[Clip], T]]:
    """What `compute` makes of a batch; where it fails, for want of memory say, of each clip alone, so that one costs no
    other.

    Args:
        compute: of clips and their x (B, 3, T, H, W), which may be filled up behind them.
        on_error: is told the number of a row whose clip fails alone, too.
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
    """The clips of an index in batches of one shape, behind a progress bar.

    Args:
        on_error: is told the number of a row that cannot be read; the others go on.
        grid: what the sizes of buckets are multiples of.

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
    """Clips in the order of the index, to be read by pieces; threads open them and read their `first` frames ahead.

    Args:
        on_error: is told the number of a row that cannot be opened; the others go on.
        grid: what the sizes of buckets are multiples of.

    Yields:
        A row's number and its clip, which is closed when the next one is asked for.
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
    """What `job` makes of each row, in their order, by threads that are so many rows ahead."""
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
            except Exception as error:  # whatever a file makes of its reader
                on_error(index, error)
                continue
            yield index, done


def group_by_shape(clips: Iterable[Clip], batch_size: int) -> Iterator[tuple[list[Clip], int]]:
    """Batches of clips of one shape, each with the size that it is to be run at: `batch_size`, or that of the clips.

    A shape keeps the size of its first batch, and a later one that falls short is to be filled up to it, so that a
    compiled model meets one batch shape per clip shape. At most 4 times the largest batch size wait for company.
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
