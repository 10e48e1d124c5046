"""`DenoiserTask`: what a run does that trains a denoiser.

All that is drawn for a clip, its noise, its frame mask, whether it loses its caption, and its sample of the posterior,
is drawn from (seed, step, place in the global batch) alone; the times of a step are drawn for the global batch at once.
Workers that share tokens (`sp_size`) have one place, and so the same clips and draws.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mg import runtime
from mg.collectives import Group
from mg.data.errors import DataError
from mg.data.index import IndexRow, read_index
from mg.data.loader import Batch, ClipLoader
from mg.diffusion.mask_generator import MaskGenerator
from mg.diffusion.networks import Denoiser, create_denoiser, network_of
from mg.diffusion.networks.denoiser import SizedDenoiser
from mg.diffusion.schedules import create_schedule
from mg.generation.codec import load_codec
from mg.generation.config import NOT_OF_NETWORK, given
from mg.generation.generate import load_text_encoder
from mg.generation.pipeline import IMAGE_FPS
from mg.generation.training.config import DenoiserTrainConfig, ValidationSection, check_paths
from mg.generation.training.latents import EncodedLatents, StoredLatents
from mg.generation.training.step import DenoiserStep
from mg.generation.training.validation import OF_POSTERIOR, Clip, Validation, epoch, one_by_one
from mg.latents import open_latents
from mg.text import StoredEmbeddings
from mg.training.checkpoint import list_checkpoints
from mg.training.step import StepResult
from mg.training.task import Task, TrainingError, freeze

_logger = logging.getLogger(__name__)

# Tails of seeds that tell these draws from those of the loader and of an autoencoder's training, which end in 1 to 3.
_OF_CLIP, _OF_POSTERIOR, _OF_TIMES = (0, 4), (0, 5), (0, 0, 6)


class DenoiserTask(Task):
    """Trains a diffusion transformer to denoise latents."""

    config: DenoiserTrainConfig
    model: Denoiser
    step: DenoiserStep

    def __init__(self, config: DenoiserTrainConfig):
        super().__init__(config)
        check_paths(config)
        self.source = str(config.csv_path or config.latents_path)
        self.masks = None if config.mask_ratios is None else MaskGenerator(config.mask_ratios)
        self.schedule = create_schedule(config.scheduler.type, **given(config.scheduler, "type"))
        if not self.schedule.trains:
            raise TrainingError(f"scheduler.type is {config.scheduler.type}, which only samples; train with iddpm")
        self.validation: Validation | None = None
        self._null: np.ndarray | None = None
        self._losses: list[float] = []

    def find_checkpoint(self):
        config, own = self.config, list_checkpoints(Path(self.config.output_path) / "checkpoints")
        if config.load is None or config.start_from_scratch or (own and config.resume):
            return super().find_checkpoint()
        checkpoint = _checkpoint_at(Path(config.load))
        if own and checkpoint.resolve() != own[-1].resolve():
            raise TrainingError(
                f"load is {config.load}, but {config.output_path} holds checkpoints of a run, and the newest is "
                f"{own[-1].name}; continue it with --resume, or choose another folder as --outputs"
            )
        return checkpoint

    def read_rows(self):
        validation = self.config.validation
        self._stored, rows = self._open(self.config)
        if validation.source is not None:
            self._stored_validation, found = self._open(validation)
            self._validation_rows = found[: validation.clips]
        return rows

    def build(self, rows: Sequence[IndexRow], worker, newest):
        config, validation = self.config, self.config.validation
        if worker.world_size % config.sp_size:
            raise TrainingError(
                f"sp_size is {config.sp_size}; it must divide the number of workers, {worker.world_size}"
            )
        self.worker = worker = replace(worker, sp_size=config.sp_size)
        encoded: Any = None
        if config.latents_path is None or validation.csv_path is not None:
            encoded = EncodedLatents(load_codec(config.vae, config.vae.dtype or config.dtype))
        self.latents = self._stored or encoded
        self.loader = self.latents.loader(rows, config.data, config.seed, worker.dp_rank, worker.dp_size)
        self.text_encoder = load_text_encoder(config.text_encoder, config.model.type)
        self._check_captions(rows, self.source)

        settings = given(config.model, *NOT_OF_NETWORK, "freeze_y_embedder")
        settings["in_channels"] = self.latents.in_channels
        if issubclass(network_of(config.model.type)[0], SizedDenoiser):
            settings["input_size"] = list(self._only_size(rows))
        if self.text_encoder.output_dim:
            settings["caption_channels"] = self.text_encoder.output_dim
            settings["model_max_length"] = self.text_encoder.model_max_length
        start = newest or config.model.from_pretrained
        if config.start_from_scratch:
            start = newest or _checkpoint_at(Path(str(config.load)))
        runtime.set_seed(config.seed)  # whatever was loaded before: the network starts from the same parameters
        self.model = create_denoiser(config.model.type, start, config.dtype, config.grad_checkpoint, **settings)
        if config.sp_size > 1:
            self.model.share_tokens(Group.of(worker, config.sp_size))
        if self.masks is not None and self.model.patch_size[0] != 1:
            raise TrainingError(f"mask_ratios must be null: a token of {self.model.name} is of several frames here")
        if validation.source is not None:
            clips = self._validation_clips(self._stored_validation or encoded)
            self.validation = Validation(validation, self.schedule, clips, config.seed, worker)

    def begin(self, total, resumed):
        config, self._total = self.config, total
        freeze(self.model, ["y_embedder"] if config.model.freeze_y_embedder else [])
        workers, sharers = self.worker.world_size, config.sharers(self.worker)
        self.step = DenoiserStep(self.model, self.schedule, config.optim, total, config.dtype, workers, sharers)

    def prepare(self, batch: Batch):
        config, count = self.config, len(batch.x)
        first = self.worker.dp_rank * count
        at = [(config.seed, batch.step, place) for place in range(first, first + count)]
        seeds = [(*each, *_OF_POSTERIOR) for each in at] if config.sample_posterior else None
        x0 = self.latents(batch, seeds)  # (B, C, T, H, W)
        frames = x0.shape[2]

        generators = [np.random.default_rng((*each, *_OF_CLIP)) for each in at]
        noise = np.stack([each.standard_normal(x0.shape[1:], np.float32) for each in generators])
        dropped = np.array([each.random() < config.caption_dropout for each in generators])
        x_mask = None if self.masks is None else np.stack([self.masks(each, frames) for each in generators])

        together = count * self.worker.dp_size
        times = np.random.default_rng((config.seed, batch.step, *_OF_TIMES))
        t = self.schedule.draw_t(times, together, (*batch.size, frames))[first : first + count]

        y, mask = self.text_encoder.encode([row.caption for row in batch.rows])
        if self._null is None:
            self._null = self.model.null_caption  # it is not trained
        y[dropped] = self._null
        return x0, t, noise, x_mask, y, mask, *self._sizes(batch, self.loader)

    def remark(self, step: int, result: StepResult):
        self._losses.append(result.loss)
        if step % self.config.log_every:
            return None
        losses, self._losses = self._losses, []
        return f"update {step}: loss {np.mean(losses):.4f}, the mean of the last {len(losses)}"

    def validate(self, step: int):
        if self.validation is None or (step % self.config.validation.every and step != self._total):
            return None
        return self.validation.measure(self.step)

    def _open(self, section: DenoiserTrainConfig | ValidationSection) -> tuple[StoredLatents | None, list[IndexRow]]:
        """The rows of the clips that are named, and their latents if these are stored."""
        if section.latents_path is not None:
            scaling = {"scaling_factor": self.config.vae.scaling_factor, "shift_factor": self.config.vae.shift_factor}
            scaling = {name: value for name, value in scaling.items() if value is not None}
            stored = StoredLatents(open_latents(section.latents_path), scaling)
            source, rows = section.latents_path, stored.rows
        else:
            stored, source = None, str(section.csv_path)
            rows = read_index(source, section.video_folder)
        if not any(row.caption for row in rows):
            raise TrainingError(f"{source}: no row has a caption; it needs a column 'caption' or 'text'")
        return stored, rows

    def _validation_clips(self, latents: EncodedLatents | StoredLatents) -> list[Clip]:
        """What the network sees of the clips to validate on, in each worker of all of them."""
        config, source = self.config, str(self.config.validation.source)
        if latents.in_channels != self.latents.in_channels:
            raise TrainingError(
                f"{source}: its latents have {latents.in_channels} channels, those that are trained on "
                f"{self.latents.in_channels}; give latents of one autoencoder"
            )
        self._check_captions(self._validation_rows, source)
        try:
            loader = latents.loader(self._validation_rows, one_by_one(config.data), config.seed, 0, 1)
            batches = list(epoch(loader))
        except DataError as error:
            raise TrainingError(f"validation: {error}") from error
        clips = []
        for batch in batches:
            seed = (config.seed, batch.step, *OF_POSTERIOR)
            x0 = latents(batch, [seed] if config.sample_posterior else None)  # (1, C, T, H, W)
            if isinstance(self.model, SizedDenoiser) and list(x0.shape[2:]) != self.model.config["input_size"]:
                raise TrainingError(
                    f"{source}: {batch.names[0]} has latents of {x0.shape[2:]}, and model.type {config.model.type} is "
                    f"for those of {tuple(self.model.config['input_size'])}; validate on clips of that size"
                )
            y, mask = self.text_encoder.encode([row.caption for row in batch.rows])
            clips.append(Clip(x0, y, mask, self._sizes(batch, loader)))
        return clips

    def _sizes(self, batch: Batch, loader: ClipLoader) -> list[np.ndarray]:
        """What the network is told of each clip, as `mg.generation.pipeline` tells it."""
        height, width = batch.size
        known = {"height": height, "width": width, "ar": height / width, "num_frames": batch.num_frames}
        values = []
        for name in self.model.extra_inputs:
            each = [known[name]] * len(batch.x) if name in known else [_rate(row, batch, loader) for row in batch.rows]
            values.append(np.array(each, np.float32))
        return values

    def _only_size(self, rows: Sequence[IndexRow]) -> tuple[int, int, int]:
        """The one size of all latents, which some networks are made for."""
        data = self.config.data
        if isinstance(self.latents, StoredLatents):
            sizes = {self.latents.latent_size(row) for row in rows}
        elif data.buckets is not None:
            sizes = {self.latents.codec.latent_size((t, h, w)) for _, _, t, h, w in self.loader.shapes}
        else:
            sizes = {self.latents.codec.latent_size((data.sample_n_frames, *data.size))}
        if len(sizes) > 1:
            shown = ", ".join(map(str, sorted(sizes)[:3]))
            raise TrainingError(
                f"model.type {self.config.model.type} is for latents of one size, and there are {len(sizes)} ({shown} "
                "...); train STDiT2 or STDiT3, or on one size"
            )
        return sizes.pop()

    def _check_captions(self, rows: Sequence[IndexRow], source: str) -> None:
        """Raise ValueError where captions are not there, or no classes, before anything is trained."""
        encoder = self.text_encoder
        if encoder.type == "classes":
            encoder.encode([row.caption for row in rows])
        if isinstance(encoder, StoredEmbeddings):
            missing = [row.caption for row in rows if row.caption not in encoder]
            if missing:
                raise TrainingError(
                    f"{encoder.folder}: has no embeddings of {len(missing)} of {len(rows)} captions of {source}, "
                    f"such as {missing[0][:80]!r}; store them with mg-encode-text --csv_path"
                )


def _rate(row: IndexRow, batch: Batch, loader: ClipLoader) -> float:
    return IMAGE_FPS if batch.num_frames == 1 else loader.frame_rate(row)


def _checkpoint_at(path: Path) -> Path:
    """A checkpoint of a run, or the newest of a run's folder."""
    if (path / "state.json").is_file():
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise TrainingError(f"load is {path}; it must be a checkpoint of a run, step_000500 say, or a run's folder")
    return found[-1]
