"""A run of mg-generate. Under its folder:

    sample_0000.mp4     a sample of each prompt (.png where it is one frame), there whole or not at all
    references/         what the samples were given, to look at, and what URLs were downloaded to
    samples.jsonl       a line for each sample, failed ones too
    index.html          all of them to look at

The same command again makes what is missing, or what was made with other settings.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.data.errors import sparing
from mg.data.index import read_index
from mg.data.transforms import resize, to_uint8_frames, to_video_tensor
from mg.data.video import write_image, write_video
from mg.diffusion.networks import Denoiser, create_denoiser
from mg.diffusion.schedules import create_schedule
from mg.generation.codec import LatentCodec, load_codec
from mg.generation.config import (
    NOT_OF_NETWORK,
    GenerateConfig,
    TextEncoderSection,
    check_captions,
    check_paths,
    given,
)
from mg.generation.gallery import write_gallery
from mg.generation.masks import Insertion
from mg.generation.pipeline import Item, Pipeline, shared_frames
from mg.generation.references import find_reference, read_reference
from mg.generation.requests import Request, check_names, name_of, read_requests
from mg.generation.samples import ERROR, OK, SampleRow, read_rows, record
from mg.plain_text import file_name, one_line, printable
from mg.sampling import clip_seed
from mg.text import clean_caption, create_text_encoder, open_embeddings

_logger = logging.getLogger(__name__)

REFERENCES = "references"
PICTURE_HEIGHT = 160  # of a reference in the gallery
MOST_BESIDE = 2  # clips of the caption that the gallery shows beside a sample
# What a run is told that changes no sample.
_BESIDES = {"prompt", "prompt_path", "start_index", "end_index", "batch_size", "save_dir", "sample_name", "verbose"}
_BESIDES |= {"prompt_as_path", "gallery", "beside", "device", "mode", "reference_path", "mask_strategy", "num_sample"}
_BESIDES |= {"seed"}


@dataclass
class Report:
    """What a worker did: numbers of samples made and of those that were there, and the failed ones by name, with the
    reason."""

    made: int = 0
    there: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Todo:
    """A sample to be made, and its row."""

    request: Request
    sample: int
    row: SampleRow
    paths: Sequence[Path]


def generate(config: GenerateConfig, rank: int = 0, world_size: int = 1) -> Report:
    """Make this worker's share of the samples of a config.

    A prompt that fails, because a reference cannot be read or a clip does not fit into memory, costs its row.

    Raises:
        ValueError, OSError: prompts, references, strategies or weights that cannot be used, before any sample is made;
            most of it before anything is loaded.
    """
    requests = read_requests(config)
    beside = clips_by_caption(config.beside) if config.beside and config.gallery else {}
    check_names(config, requests)
    check_paths(config)
    folder = Path(config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found = {path: find_reference(path, folder / REFERENCES) for request in requests for path in request.references}
    report, todo, before = Report(), [], read_rows(folder)
    names: set[str] = set()
    for request in requests[rank::world_size]:
        for sample in range(config.num_sample):
            name = name_of(config, request, sample)
            suffix = ".png" if config.frames * config.loop == 1 else ".mp4"
            row = SampleRow(name, request.prompt, settings=_settings(config, request, sample), file=f"{name}{suffix}")
            known = config.prompt_as_path or _is_same(before.get(name), row)
            if name in names or (known and (folder / row.file).is_file()):  # a prompt that comes again has its sample
                report.there += 1
            else:
                names.add(name)
                todo.append(_Todo(request, sample, row, [found[path] for path in request.references]))
    if report.there:
        _logger.info("%d samples are there already, and stay", report.there)
    if todo:
        _make(config, load_pipeline(config), todo, folder, report)
    if config.gallery:
        rows = read_rows(folder)
        write_gallery(folder, [rows[name] for name in rows], beside)
    return report


def clips_by_caption(csv_path: str) -> dict[str, list[Path]]:
    """A few clips of a CSV for each of its captions, by caption.

    Raises:
        ValueError, OSError: a CSV that cannot be read.
    """
    clips: dict[str, list[Path]] = {}
    for row in read_index(csv_path):
        clips.setdefault(row.caption, []).append(row.path)
    return {caption: paths[:MOST_BESIDE] for caption, paths in clips.items()}


def load_pipeline(config: GenerateConfig) -> Pipeline:
    """All that samples take, with its weights; the autoencoder first, which says what a clip's latents are.

    Raises:
        ValueError, OSError: weights that cannot be read or do not fit, settings that do not go together.
    """
    schedule = create_schedule(config.scheduler.type, **given(config.scheduler, "type"))
    codec = load_codec(config.vae, config.vae.dtype or config.dtype)
    height, width = codec.pixel_size(config.size)
    size = codec.latent_size((config.frames, *config.size))
    shared_frames(config, codec)
    if schedule.cfg_channel is not None and not 1 <= schedule.cfg_channel <= codec.in_channels:
        raise ValueError(
            f"scheduler.cfg_channel is {schedule.cfg_channel}; latents of {codec.model.name} have {codec.in_channels} "
            "channels"
        )
    if (height, width) != config.size:
        _logger.info("whole latents of %s make frames of %d x %d", codec.model.name, height, width)
    encoder = load_text_encoder(config.text_encoder, config.model.type)
    settings = given(config.model, *NOT_OF_NETWORK)
    settings |= {"input_size": list(size), "in_channels": codec.in_channels}
    if encoder.output_dim:
        settings |= {"caption_channels": encoder.output_dim, "model_max_length": encoder.model_max_length}
    denoiser = create_denoiser(config.model.type, config.model.from_pretrained, config.dtype, **settings)
    denoiser.set_train(False)
    _check_classes(encoder, denoiser)
    return Pipeline(config, codec, encoder, denoiser, schedule)


def load_text_encoder(section: TextEncoderSection, network: str) -> Any:
    """The text encoder of a config, or the stored embeddings that stand for it.

    Args:
        network: the type of the network that takes its captions.

    Raises:
        ValueError, OSError: weights or embeddings that cannot be read, settings that do not go together.
    """
    if section.embeddings is not None:
        stored = open_embeddings(section.embeddings)
        check_captions(network, stored.type)
        return stored
    unused = ("type", "embeddings", "shardformer", "local_files_only", "cache_dir")
    return create_text_encoder(section.type, **given(section, *unused))


def _check_classes(encoder: Any, denoiser: Denoiser) -> None:
    """Raise ValueError where prompts are classes and the network knows others, or none."""
    counts = (encoder.num_classes if encoder.type == "classes" else None, denoiser.num_classes)
    if counts[0] != counts[1]:
        given, wanted = ("texts" if count is None else f"one of {count} classes" for count in counts)
        raise ValueError(
            f"prompts are {given}, but the network takes {wanted}; see text_encoder.num_classes and model.condition"
        )


def _make(config: GenerateConfig, pipeline: Pipeline, todo: Sequence[_Todo], folder: Path, report: Report) -> None:
    """Make samples in batches, those of a prompt that fails one by one."""
    with (
        tqdm(total=len(todo), desc="samples", unit="sample", disable=config.verbose < 1) as bar,
        runtime.CtrlC() as ctrl_c,
    ):

        def finish(one: _Todo, error: Exception | None = None) -> None:
            if error is not None:
                one.row.status, one.row.error, one.row.file = ERROR, one_line(error), ""
                report.failed.append((one.row.name, one.row.error))
                _logger.warning("%s: %s", printable(one.row.name), one.row.error)
            else:
                report.made += 1
            record(folder, [one.row])
            bar.update()

        for batch in _batches(todo, config.batch_size):
            items = []
            for one in batch:
                with sparing(partial(finish, one)):
                    items.append(
                        (one, Item(_cleaned(one.request, config), one.sample, _references(one, pipeline, folder)))
                    )
            steps = partial(_progress, config, len(items), ctrl_c)
            for one, video, seconds in _generate(pipeline, items, steps, finish):
                with sparing(partial(finish, one)):
                    _write(one.row, video, config, folder)
                    one.row.seconds = round(seconds, 3)
                    finish(one)


def _batches(todo: Sequence[_Todo], size: int) -> Iterator[list[_Todo]]:
    """The first sample of so many prompts, then the second, as the originals take them."""
    numbers = sorted({one.request.index for one in todo})
    for start in range(0, len(numbers), size):
        together = set(numbers[start : start + size])
        of_these = [one for one in todo if one.request.index in together]
        for sample in sorted({one.sample for one in of_these}):
            yield [one for one in of_these if one.sample == sample]


def _generate(
    pipeline: Pipeline,
    items: Sequence[tuple[_Todo, Item]],
    steps: Callable[[range], Iterable[int]],
    finish: Callable[[_Todo, Exception], None],
) -> Iterator[tuple[_Todo, np.ndarray, float]]:
    """What the pipeline makes of a batch and in how many seconds each; where it fails, of each sample alone."""
    if not items:
        return
    failed: list[Exception] = []
    start = time.perf_counter()
    with sparing(failed.append):
        videos = pipeline.generate([item for _, item in items], steps)
    seconds = (time.perf_counter() - start) / len(items)
    if not failed:
        for (one, _), video in zip(items, videos):
            yield one, video, seconds
    elif len(items) == 1:
        finish(items[0][0], failed[0])
    else:
        for item in items:
            yield from _generate(pipeline, [item], steps, finish)


def _progress(config: GenerateConfig, batch: int, ctrl_c: runtime.CtrlC, steps: range) -> Iterator[int]:
    """The steps of a loop behind a bar; Ctrl-C comes through between them."""
    for step in tqdm(steps, desc=f"steps of {batch}", unit="step", leave=False, disable=config.verbose < 2):
        yield step
        ctrl_c.check()


def _cleaned(request: Request, config: GenerateConfig) -> Request:
    """With the texts that are encoded."""
    if not config.clean_prompts or config.text_encoder.type == "classes":
        return request
    texts = [clean_caption(text, times=2) for text in request.texts]
    return Request(**{**vars(request), "texts": texts})


def _references(one: _Todo, pipeline: Pipeline, folder: Path) -> list[np.ndarray]:
    """The latents (C, t, h, w) of a sample's references; zero where no strategy takes them."""
    latents = []
    for number, path in enumerate(one.paths):
        taken = [made for made in one.request.insertions if made.reference == number]
        z, frames = encode_reference(pipeline.config, pipeline.codec, path, taken)
        latents.append(z)
        picture = Path(REFERENCES) / f"{file_name(f'{one.row.name}_{number}')}.png"
        write_image(folder / picture, _strip(frames))
        one.row.pictures.append(str(picture))
    return latents


def encode_reference(
    config: GenerateConfig, codec: LatentCodec, path: Path, insertions: Sequence[Insertion]
) -> tuple[np.ndarray, np.ndarray]:
    """A reference's latents (C, t, h, w), zero where nothing takes them, and the frames that were read, uint8.

    Raises:
        VideoError: a file that cannot be read.
    """
    size = codec.pixel_size(config.size)
    frames, first, total = read_reference(path, size, insertions, codec, config.align)
    seed = clip_seed(config.seed, str(path)) if config.sample_posterior else None
    z = codec.encode(to_video_tensor(frames)[None], seed)[0]
    before = codec.latent_size((first, *size))[0] if first else 0
    behind = codec.latent_size((total, *size))[0] - before - z.shape[1]
    return np.pad(z, ((0, 0), (before, behind), (0, 0), (0, 0))), frames


def _strip(frames: np.ndarray) -> np.ndarray:
    """Up to four frames side by side, (H, W, 3)"""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), 4)).astype(int)
    height = min(PICTURE_HEIGHT, frames.shape[1])
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    return np.concatenate([resize(frames[number], height, width) for number in chosen], axis=1)


def _write(row: SampleRow, video: np.ndarray, config: GenerateConfig, folder: Path) -> None:
    frames = to_uint8_frames(video)
    row.frames, row.height, row.width = frames.shape[:3]
    row.fps = config.rate
    if row.file.endswith(".png"):
        write_image(folder / row.file, frames[0])
    else:
        write_video(folder / row.file, frames, config.rate)


def _settings(config: GenerateConfig, request: Request, sample: int) -> dict[str, Any]:
    """All that a sample depends on."""
    told = {name: value for name, value in asdict(config).items() if name not in _BESIDES}
    own = {"seed": config.seed, "sample": sample, "texts": request.texts}
    return {**own, "reference_path": request.references, "mask_strategy": request.mask_strategy, **told}


def _is_same(before: SampleRow | None, row: SampleRow) -> bool:
    return before is not None and before.status == OK and before.settings == row.settings
