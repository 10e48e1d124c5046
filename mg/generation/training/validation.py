"""`Validation`: a denoiser's loss on clips that nothing is learnt from, by how far they are noised.

The loss of an update depends on the times that were drawn for it far more than on what was learnt since the last. Here
clips, noise and times are the same in every measurement, drawn from the seed and a clip's place alone: the network is
all that changes. Every clip is noised in each of a few equal bands of the schedule's time, from clean latents (0) to
noise (1).

Beside it stands a baseline, the loss of a network that answers the mean of what is to be predicted, whatever it sees.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor

from mg.data.loader import Batch, ClipLoader, DataConfig
from mg.diffusion.schedules import Schedule
from mg.generation.training.config import ValidationSection
from mg.generation.training.step import DenoiserStep
from mg.runtime import Runtime

# Tails of seeds, see `mg.generation.training.task`.
_OF_NOISE, OF_POSTERIOR = (0, 0, 0, 7), (0, 0, 0, 8)


class Clip(NamedTuple):
    """What a network sees of a clip: latents (1, C, T, H, W), its caption with its mask, and `extra_inputs`."""

    x0: np.ndarray
    y: np.ndarray
    mask: np.ndarray | None
    sizes: Sequence[np.ndarray]


class Validation:
    """Measures one clip, noised once, after the other: so it takes less memory than a training step, and depends on no
    batch. Workers share the clips.

    Args:
        section: bands, and times in each.
        schedule: how clips are noised, and the loss.
        clips: the same ones in all workers.
        seed: of noise and times.
        worker: this process.

    Attributes:
        baseline: see above; the mean is that of each channel of these clips.
    """

    def __init__(
        self, section: ValidationSection, schedule: Schedule, clips: Sequence[Clip], seed: int, worker: Runtime
    ):
        self.section, self.schedule, self.clips = section, schedule, clips
        self._seed, self._worker = seed, worker
        self.baseline = self._baseline()

    def measure(self, step: DenoiserStep) -> dict[str, float]:
        """The mean `loss`, the `baseline`, and the loss of each band, from "0-0.1" to "0.9-1" where they are ten; all
        workers must call it at the same time."""
        mine = range(self._worker.dp_rank, len(self.clips), self._worker.dp_size)
        found = {place: [step.losses(*batch).item() for batch in self._noised(place)] for place in mine}
        shared = [json.loads(content) for content in self._worker.gather(json.dumps(found).encode())]
        by_place = {int(place): losses for each in shared for place, losses in each.items()}
        bands, times = self.section.bands, self.section.times
        losses = np.reshape([by_place[place] for place in range(len(self.clips))], (-1, bands, times))
        by_band = losses.mean((0, 2)).tolist()
        names = [f"{band / bands:.2g}-{(band + 1) / bands:.2g}" for band in range(bands)]
        return {"loss": float(losses.mean()), "baseline": self.baseline, **dict(zip(names, by_band))}

    def _noised(self, place: int) -> Iterator[tuple[np.ndarray | None, ...]]:
        """A clip at all times of all bands, as a step's `accumulate` is given it."""
        clip, bands = self.clips[place], self.section.bands
        rng = np.random.default_rng((self._seed, place, *_OF_NOISE))
        for band in np.repeat(np.arange(bands), self.section.times):
            t = self.schedule.times_at((band + rng.random(1)) / bands)
            noise = rng.standard_normal(clip.x0.shape, np.float32)
            yield clip.x0, t, noise, None, clip.y, clip.mask, *clip.sizes

    def _baseline(self) -> float:
        mean = np.mean([clip.x0.mean((0, 2, 3, 4)) for clip in self.clips], axis=0)  # (C,)
        answer = self.schedule.mean_answer(mean).reshape(1, -1, 1, 1, 1)

        def predict(x, t):
            return Tensor(np.broadcast_to(answer, (1, answer.shape[1], *x.shape[2:])).copy())

        noised = ((x0, t, noise) for place in range(len(self.clips)) for x0, t, noise, *_ in self._noised(place))
        losses = [self.schedule.training_losses(predict, *map(Tensor, each)).asnumpy() for each in noised]
        return float(np.mean(losses, dtype=np.float64))


def one_by_one(data: DataConfig) -> DataConfig:
    """How rows become batches of one clip, read by this process."""
    buckets = data.buckets and {
        name: {frames: [kept, batch_size and 1] for frames, (kept, batch_size) in entries.items()}
        for name, entries in data.buckets.items()
    }
    alone: dict[str, Any] = {"buckets": buckets, "batch_size": 1, "image_batch_size": None, "num_workers": 0}
    return replace(data, **alone)


def epoch(loader: ClipLoader) -> Iterator[Batch]:
    """Every clip of a loader once."""
    with closing(loader.batches()) as batches:
        yield from islice(batches, loader.steps_per_epoch)
