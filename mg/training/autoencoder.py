"""Autoencoder training: the config, and what is specific to these runs."""

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mg.config import require
from mg.data.index import IndexRow, read_index
from mg.data.loader import DATA_ALIASES, Batch, ClipLoader
from mg.losses.adversarial import DiscriminatorLossConfig, GeneratorLossConfig
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model, model_name
from mg.models.autoencoder import VideoAutoencoder
from mg.models.discriminator import DiscriminatorConfig, NLayerDiscriminator3D
from mg.training.optim import OptimizerConfig
from mg.training.previews import Previews
from mg.training.step import Adversary, TrainStep
from mg.training.task import RunConfig, Task, TrainingError, freeze

_logger = logging.getLogger(__name__)


@dataclass
class TrainedModelSection:
    """The autoencoder.

    Args:
        name: which model, see `mg.models.list_models`; by default the one the weights belong to, else tae.
        from_pretrained: weights to start from, a file or folder; null starts from random ones.
        spatial_from_pretrained: weights for the spatial stage of a two-stage model, an image VAE's file or folder;
            they replace those of from_pretrained.
        linear_start: clips from the first batches that the initial weights of a TAE, a DC-AE or the temporal half of a
            temporal VAE are fitted to, if it has none to start from, see `mg.models.tae.linear_start`; 0 starts from
            random ones.
        freeze: parts of the model whose parameters are not trained, e.g. [spatial_vae].
        config: overrides of the model's config.
        dtype: precision of convolutions and matrix products; parameters, norms and losses stay in fp32.
        disc_off_grad_ckpt: exclude the norm before the decoder's last convolution from grad_checkpoint.
    """

    name: str | None = None
    from_pretrained: str | None = None
    spatial_from_pretrained: str | None = None
    linear_start: int = 0
    freeze: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    disc_off_grad_ckpt: bool = False

    def __post_init__(self):
        require(self.linear_start >= 0, self, "linear_start", "at least 0")
        given = self.linear_start and self.from_pretrained
        require(not given, self, "linear_start", f"0 if the weights start from {self.from_pretrained}")


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """A training run of an autoencoder.

    Args:
        csv_path: the videos and images to train on, a CSV with a column `video` or `path`.
        video_folder: folder that the CSV's paths are relative to, by default the one the CSV is in.
        model: the autoencoder.
        loss: the autoencoder's loss.
        discriminator: the discriminator of adversarial training, stage 2; null trains without, stage 1.
        gen_loss_config: the autoencoder's generator loss; only with a discriminator.
        disc_loss_config: the discriminator's loss.
        optim_discriminator: the discriminator's optimizer.
        preview_clips: how many clips are drawn along with their reconstructions at every checkpoint, in previews/;
            by default 2 with wandb, which shows them, else none.
    """

    aliases: ClassVar[dict[str, str]] = {
        "data_path": "csv_path",
        "data-path": "csv_path",
        "dataset.data_path": "csv_path",
        **DATA_ALIASES,
    }

    csv_path: str
    video_folder: str | None = None
    model: TrainedModelSection = field(default_factory=TrainedModelSection)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig | None = None
    gen_loss_config: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    disc_loss_config: DiscriminatorLossConfig = field(default_factory=DiscriminatorLossConfig)
    optim_discriminator: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, beta2=0.98))
    preview_clips: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require((self.preview_clips or 0) >= 0, self, "preview_clips", "at least 0")
        require(
            self.plugin != "zero2-seq", self, "plugin", "zero2 or null: devices cannot share an autoencoder's clips"
        )

    def _optimizers(self):
        return [self.optim, self.optim_discriminator]

    def task(self) -> "AutoencoderTask":
        return AutoencoderTask(self)


class AutoencoderTask(Task):
    """Trains an autoencoder to reconstruct its input, with or without a discriminator."""

    config: TrainConfig
    model: VideoAutoencoder
    step: TrainStep

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.source = config.csv_path
        self._previews: Previews | None = None

    def read_rows(self):
        return read_index(self.config.csv_path, self.config.video_folder)

    def build(self, rows: Sequence[IndexRow], worker, newest):
        config, settings, self.worker = self.config, self.config.model, worker
        start = newest or settings.from_pretrained
        name = settings.name or (model_name(start) if start else "tae")
        self.model = create_model(name, start, settings.dtype, **settings.config)
        grid = self.model.spatial_compression
        self.loader = ClipLoader(rows, config.data, config.seed, worker.rank, worker.world_size, grid)
        if settings.spatial_from_pretrained is not None:
            _load_spatial(self.model, settings.spatial_from_pretrained, bool(newest))
        if settings.linear_start and not newest:
            _start_linear(self.model, rows, config)

    def begin(self, total, resumed):
        config, model, settings = self.config, self.model, self.config.model
        _check_loss(config, model)
        freeze(model, settings.freeze)
        if config.grad_checkpoint:
            model.recompute_activations(output=not settings.disc_off_grad_ckpt)
        loss, workers = AutoencoderLoss(config.loss), self.worker.world_size
        adversary = _adversary(config, resumed, workers)
        # Lengths are not aligned with a discriminator, which judges every frame.
        self._aligned = model.two_stages and config.data.random_frames and adversary is None
        sharers = config.sharers(self.worker)
        self.step = TrainStep(model, loss, config.optim, total, settings.dtype, workers, adversary, sharers)

    def prepare(self, batch: Batch):
        model = self.model
        x, valid = model.align_frames(batch.x) if self._aligned else (batch.x, None)
        generators = _generators(self.config.seed, batch.step, self.worker.rank * len(x), len(x))
        shape = model.latent_shape(x.shape)[1:]
        noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        return x, noise, generators, valid

    def draw(self, step):
        if self._previews is None:
            given = self.config.preview_clips
            count = given if given is not None else 2 * self.config.wandb
            self._previews = Previews(Path(self.config.output_path) / "previews", self.loader, count)
        return self._previews.draw(self.model, step)


def _generators(seed: int, step: int, first: int, count: int) -> Sequence[np.random.Generator]:
    """One for each clip of a batch; the first clip has index `first` in the global batch."""
    # The last number keeps the seeds distinct from the loader's, which have four numbers or another last one.
    return [np.random.default_rng((seed, step, place, 0, 3)) for place in range(first, first + count)]


def _check_loss(config: TrainConfig, model: VideoAutoencoder) -> None:
    """Raise TrainingError if the model lacks what the loss compares."""

    def require_model(holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise TrainingError(f"loss.{name} is {getattr(config.loss, name)}; it must be {wanted}")

    loss = config.loss
    require_model(model.geometry.has_posterior or not loss.kl_weight, "kl_weight", f"0, {model.name} has no posterior")
    for name in ("latent_weight", "identity_weight"):
        no_target = f"0, {model.name} has no first stage whose latents could be compared"
        require_model(model.two_stages or not getattr(loss, name), name, no_target)
    judged = config.discriminator is not None
    require_model(loss.pixel_weight > 0 or not judged, "pixel_weight", "above 0 with a discriminator")
    trains = loss.pixel_weight > 0 or loss.latent_weight > 0 or loss.identity_weight > 0
    require_model(trains, "pixel_weight", "above 0 if latent_weight and identity_weight are 0")


def _load_spatial(model: VideoAutoencoder, path: str, resumed: bool) -> None:
    """Load an image VAE's weights into the spatial stage; a resumed run has those of the checkpoint."""
    if not model.two_stages:
        raise TrainingError(
            f"model.spatial_from_pretrained is {path}; it must be null, {model.name} has only one stage"
        )
    if not resumed:
        model.spatial_vae.load_weights(path)


def _start_linear(model: VideoAutoencoder, rows: Sequence[IndexRow], config: TrainConfig) -> None:
    """Fit a model's straight path to clips from the first batches, the same ones on every worker."""
    if not model.starts_linear:
        raise TrainingError(
            f"model.linear_start is {config.model.linear_start}; it must be 0, {model.name} has no linear start"
        )
    whole = model.temporal_compression
    if config.data.sample_n_frames % whole:  # else no clip would ever come
        raise TrainingError(
            f"data.sample_n_frames is {config.data.sample_n_frames}; a linear start needs a multiple of {whole}"
        )
    loader = ClipLoader(rows, config.data, config.seed, grid=model.spatial_compression)
    with closing(loader.batches()) as batches:
        videos = (clip for batch in batches if batch.x.shape[2] % whole == 0 for clip in batch.x)
        clips = list(islice(videos, config.model.linear_start))
    try:
        model.start_linear(clips)
    except ValueError as error:
        raise TrainingError(f"model.linear_start is {config.model.linear_start}; {error}") from error
    _logger.info("fitted the straight path to %d clips", len(clips))


def _adversary(config: TrainConfig, resumed: bool, world_size: int) -> Adversary | None:
    """The discriminator and its settings in stage 2; in a resumed run its weights come from the checkpoint."""
    if config.discriminator is None:
        return None
    settings = replace(config.discriminator, from_pretrained=None) if resumed else config.discriminator
    discriminator = NLayerDiscriminator3D(settings, config.model.dtype, world_size)
    return Adversary(discriminator, config.gen_loss_config, config.disc_loss_config, config.optim_discriminator)
