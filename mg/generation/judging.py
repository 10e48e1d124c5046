"""Does a denoiser follow its captions, and does it keep a given first frame? For small sets of clips.

Captions: a clip is generated for every caption from the same noise, so only the caption can make a difference. A
caption is followed if, of all known clips, the one nearest to the generated clip has that caption. A network that
ignores captions generates the same clip for all of them, and is right by chance: the share of the known clips that have
the caption. If captions consist of several parts, each part is judged separately too.

First frames: clips are generated from the first frames of other clips, with their captions. The generated first frame
is compared with the autoencoder's reconstruction of the given one, and the frames after it with the true ones. The
baseline is the first frame repeated.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mg.checkpoints import atomic_write
from mg.config import require
from mg.data.clips import ClipOptions, load_clip
from mg.data.index import IndexRow, read_index
from mg.data.transforms import center_crop, to_uint8_frames
from mg.diffusion.schedules import SampleNoise
from mg.evaluation.metrics import PSNR_CEILING
from mg.generation.codec import LatentCodec
from mg.generation.config import GenerateConfig, check_paths
from mg.generation.generate import encode_reference, load_pipeline
from mg.generation.masks import parse_mask_strategy
from mg.generation.pipeline import Item, Pipeline
from mg.generation.requests import Request
from mg.text import clean_caption

FILE = "judged.json"
PARTS = ", "  # separates the parts of a caption


@dataclass(kw_only=True)
class JudgeConfig(GenerateConfig):
    """Measure how often a denoiser follows captions, and how well it keeps a given first frame.

    Args:
        csv_path: the clips the denoiser was trained on, a CSV with columns `video` and `caption`.
        test_csv_path: clips whose first frames are given, by default those of csv_path.
        noises: clips to generate for each caption; the n-th clips of all captions start from the same noise.
        captions: the largest number of captions to judge, from the first.
        first_frames: the largest number of first frames to give, from the first clip; 0 gives none.
        validation: validation.jsonl of the training runs that led to this denoiser, starting with the untrained
            network; all of them measured on the same clips.
    """

    csv_path: str
    test_csv_path: str | None = None
    noises: int = 2
    captions: int | None = None
    first_frames: int = 16
    validation: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        require(self.loop == 1, self, "loop", "1: clips are compared with known ones of their length")
        require(self.noises >= 1, self, "noises", "at least 1")
        require(self.captions is None or self.captions >= 2, self, "captions", "at least 2, or null")
        require(self.first_frames >= 0, self, "first_frames", "at least 0")
        if self.first_frames and self.frames < 2:
            raise ValueError("first_frames must be 0 if num_frames is 1: no frame comes after the first")
        if self.first_frames and self.refuses_masks:
            raise ValueError(f"first_frames is {self.first_frames}; {self.refuses_masks}, or set it to 0")


class Heeded(NamedTuple):
    """How often captions, or a part of them, are followed.

    Attributes:
        share: of generated clips whose nearest known clip has their caption.
        chance: the share to expect if captions are ignored.
        own: PSNR in dB to the nearest known clip with their caption, mean over generated clips.
        others: PSNR in dB to the nearest known clip with another caption, mean over generated clips.
    """

    share: float
    chance: float
    own: float
    others: float


def heeded(distances: np.ndarray, captions: Sequence[str], known: Sequence[str]) -> Heeded:
    """How often captions are followed.

    Args:
        distances: PSNR of each generated clip to each known one, (generated, known).
        captions: of the generated clips.
        known: captions of the known clips.

    Raises:
        ValueError: a caption that none or all of the known clips have.
    """
    found = []
    for near, caption in zip(distances, captions):
        same = np.array([other == caption for other in known])
        if same.all() or not same.any():
            raise ValueError(f"{caption!r} is the caption of {'all' if same.any() else 'none'} of {len(known)} clips")
        found.append((near[same].max(), near[~same].max(), same.mean()))
    own, others, chance = np.array(found).T
    return Heeded(*(float(value.mean()) for value in (own > others, chance, own, others)))


class FirstFrames(NamedTuple):
    """How well given first frames are kept and continued; PSNR in dB, means over clips.

    Attributes:
        kept: the first frame against the autoencoder's reconstruction of the given one; 100 if they are equal.
        after: the frames after it against the true ones.
        still: that reconstruction, repeated, against the same true frames.
        nearer: share of clips for which `after` is higher than `still`.
    """

    kept: float
    after: float
    still: float
    nearer: float


def first_frames(
    clips: Sequence[np.ndarray], true: Sequence[np.ndarray], reconstructed: Sequence[np.ndarray]
) -> FirstFrames:
    """Compare generated clips with those whose first frames were given.

    Args:
        clips: generated clips, uint8 (T, H, W, 3), T at least 2.
        true: the clips whose first frames were given, of the same shapes.
        reconstructed: the autoencoder's reconstruction of each first frame, uint8 (1, H, W, 3).
    """
    found = []
    for clip, other, first in zip(clips, true, reconstructed):
        still = np.broadcast_to(first, (len(other) - 1, *first.shape[1:]))
        pairs = ((clip[:1], first), (clip[1:], other[1:]), (still, other[1:]))
        found.append([psnrs(a[None], b[None]).item() for a, b in pairs])
    kept, after, still = np.array(found).T
    return FirstFrames(*(float(value.mean()) for value in (kept, after, still, after > still)))


def psnrs(clips: Sequence[np.ndarray] | np.ndarray, known: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """PSNR in dB of each clip to each known one, uint8 (T, H, W, 3), from the mean error of all frames; at most 100."""
    a, b = (np.stack([each.reshape(-1) for each in some]).astype(np.float64) / 255 for some in (clips, known))
    errors = (np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T) / a.shape[1]
    return -10 * np.log10(np.maximum(errors, 10 ** (-PSNR_CEILING / 10)))


def judge(config: JudgeConfig, progress: Callable[[list], Iterator] = iter) -> dict:
    """Generate clips and measure; the numbers are also written to save_dir/judged.json.

    Returns:
        "captions": a `Heeded` as a dict for whole captions ("all") and, if all have the same number of parts, for each
        part ("1", "2", ...), with the number of `different` ones; "first_frames": a `FirstFrames` as a dict, with the
        number of `clips`; "validation": see `losses_of`; "generated": the number of clips generated for captions.

    Raises:
        ValueError, OSError: clips or weights that cannot be used.
    """
    check_paths(config)
    rows = read_index(config.csv_path)
    captions = list(dict.fromkeys(row.caption for row in rows))
    if len(captions) < 2:
        raise ValueError(f"{config.csv_path}: has {len(captions)} captions; at least 2 are needed, to compare")
    tested = read_index(config.test_csv_path or config.csv_path)[: config.first_frames]
    losses = losses_of(config.validation) if config.validation else None
    pipeline = load_pipeline(config)
    known, true = ([_read_clip(config, pipeline.codec, row) for row in some] for some in (rows, tested))

    wanted = [(caption, number) for number in range(config.noises) for caption in captions[: config.captions]]
    heard = [_item(config, caption, number) for caption, number in wanted]
    given = [_item(config, row.caption, number, "0") for number, row in enumerate(tested)]
    for item, row in zip(given, tested):
        item.references = [encode_reference(config, pipeline.codec, row.path, item.request.insertions)[0]]
    clips = _generate(pipeline, [*heard, *given], progress)

    found: dict = {"generated": len(heard), "captions": {}, "first_frames": None, "validation": losses}
    distances = psnrs(clips[: len(heard)], known)
    for name, reading in _readings([row.caption for row in rows] + [caption for caption, _ in wanted]).items():
        of_known, of_heard = reading[: len(rows)], reading[len(rows) :]
        if len(set(of_known)) > 1:
            result = heeded(distances, of_heard, of_known)
            found["captions"][name] = {"different": len(set(of_known)), **result._asdict()}
    if given:
        frames = pipeline.codec.frames_of(1)
        alone = [to_uint8_frames(pipeline.codec.decode(item.references[0][None, :, :1], frames)[0]) for item in given]
        result = first_frames(clips[len(heard) :], true, [each[:1] for each in alone])
        found["first_frames"] = {"clips": len(given), **result._asdict()}
    folder = Path(config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _item(config: JudgeConfig, caption: str, number: int, strategy: str = "") -> Item:
    text = clean_caption(caption, times=2) if config.clean_prompts else caption
    return Item(Request(0, caption, [text], [], strategy, parse_mask_strategy(strategy)), number)


def _generate(pipeline: Pipeline, items: Sequence[Item], progress: Callable[[list], Iterator]) -> list[np.ndarray]:
    """A clip for each item, uint8 (T, H, W, 3); the noise depends only on its number, not on its caption."""
    config, shape = pipeline.config, (pipeline.codec.in_channels, *pipeline.latent_size)

    def noise(some: Sequence[Item], loop: int) -> SampleNoise:
        return SampleNoise([(config.seed, item.sample) for item in some], shape)

    clips: list[np.ndarray] = []
    starts = range(0, len(items), config.batch_size)
    for some in progress([items[start : start + config.batch_size] for start in starts]):
        clips += map(to_uint8_frames, pipeline.generate(some, noise=noise))
    return clips


def losses_of(files: Sequence[str | Path]) -> dict[str, float]:
    """The losses "untrained", "trained" and "baseline" from the validation.jsonl of training runs, each continuing the
    one before it.

    Raises:
        ValueError: they don't begin with an untrained network.
    """
    runs = [[json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()] for path in files]
    if not all(runs) or runs[0][0]["step"] != 0:
        raise ValueError(f"{files[0]}: has no measurement before update 1; give validation.jsonl of a whole run")
    first, last = runs[0][0], runs[-1][-1]
    return {"untrained": first["loss"], "trained": last["loss"], "baseline": last["baseline"]}


def _read_clip(config: JudgeConfig, codec: LatentCodec, row: IndexRow) -> np.ndarray:
    """The frames of a clip that were encoded for training, uint8 (T, H, W, 3)."""
    height, width = codec.pixel_size(config.size)
    options = ClipOptions(
        num_frames=config.frames, frame_stride=config.frame_interval, image_size=min(height, width), crop=False
    )
    x, _ = load_clip(row.path, options)
    return center_crop(to_uint8_frames(x), height, width)


def _readings(captions: Sequence[str]) -> dict[str, Sequence[str]]:
    """What to compare of captions: "all" of each and, if all have the same number of parts, part "1", "2", ..."""
    parts = [caption.split(PARTS) for caption in captions]
    readings: dict[str, Sequence[str]] = {"all": captions}
    if len({len(each) for each in parts}) == 1 and len(parts[0]) > 1:
        readings |= {str(number): part for number, part in enumerate(zip(*parts), start=1)}
    return readings
