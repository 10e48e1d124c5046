"""The config of mg-train for a denoiser; the names in Open-Sora's configs are aliases of ours."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from mg.config import require
from mg.data.loader import DATA_ALIASES, OpenSoraDataConfig
from mg.diffusion.mask_generator import MaskGenerator
from mg.generation.config import (
    AutoencoderSection,
    DenoiserSection,
    SchedulerSection,
    TextEncoderSection,
    caption_paths,
    check_weights,
)
from mg.training.optim import OptimConfig
from mg.training.task import RunConfig

if TYPE_CHECKING:
    from mg.generation.training.task import DenoiserTask


@dataclass
class TrainedDenoiserSection(DenoiserSection):
    """The diffusion transformer, and which parts of it to train.

    Args:
        freeze_y_embedder: don't train the layer that projects captions to the network's width.
    """

    freeze_y_embedder: bool = False


@dataclass
class TrainingSchedulerSection(SchedulerSection):
    """How latents are noised.

    Args:
        sample_method: rflow: how times are drawn: uniform | logit-normal.
    """

    sample_method: Literal["uniform", "logit-normal"] | None = None


@dataclass
class ValidationSection:
    """Held-out clips to measure the loss on; without csv_path or latents_path there is no validation.

    Args:
        csv_path: CSV of videos and images with captions, read like those to train on.
        video_folder: folder that the CSV's paths are relative to, by default the CSV's own.
        latents_path: a folder of mg-encode-latents, instead of csv_path.
        clips: the largest number of rows to use, from the first.
        every: updates between measurements; the first is before update 1, and there is one after the last.
        bands: equal parts of the schedule's time, each with its own loss.
        times: how often each clip is noised in each band.
    """

    csv_path: str | None = None
    video_folder: str | None = None
    latents_path: str | None = None
    clips: int = 16
    every: int = 500
    bands: int = 10
    times: int = 1

    def __post_init__(self):
        both = self.csv_path is not None and self.latents_path is not None
        require(not both, self, "latents_path", "null with csv_path: give only one of the two")
        for name in ("clips", "every", "bands", "times"):
            require(getattr(self, name) >= 1, self, name, "at least 1")

    @property
    def source(self) -> str | None:
        return self.csv_path or self.latents_path


@dataclass(kw_only=True)
class DenoiserTrainConfig(RunConfig):
    """A training run of a denoiser, a diffusion transformer on an autoencoder's latents.

    Args:
        csv_path: the videos and images to train on, a CSV with columns `video` or `path`, and `caption` or `text`.
        video_folder: folder that the CSV's paths are relative to, by default the CSV's own.
        latents_path: a folder of mg-encode-latents, instead of csv_path and vae; its clips are used whole.
        dataset_type: VideoTextDataset, clips of one size | VariableVideoTextDataset, buckets; by default what fits.
        transform_name: resize_crop | center; both cover the size and crop the middle; center only for squares.
        data: clips and batches.
        optim: the denoiser's optimizer.
        model: the diffusion transformer.
        vae: the autoencoder, which is frozen.
        text_encoder: the text encoder for captions, frozen too; its `embeddings` can replace it.
        scheduler: how latents are noised.
        validation: held-out clips on which the loss is measured by the schedule's time.
        mask_ratios: shares of clips with given frames, by the mask's name; null gives none.
        caption_dropout: share of clips to train without a caption, for guidance.
        sample_posterior: use a new sample of the autoencoder's posterior every time; otherwise its mean.
        dtype: precision of matrix products: bf16 | fp16 | fp32; on a CPU bf16 is emulated.
        log_every: updates between log lines with the mean loss; log.jsonl has every update.
        load: continue from this checkpoint, or from the newest of this run, in another output_path.
        start_from_scratch: load only the weights of `load`, and begin with update 1.
        plugin: zero2 as in other runs, over all devices; zero2-seq is the same with an sp_size above 1.
        sp_size: number of devices that share the tokens of each clip; it divides that of all. Not for DiT.
        num_bucket_build_workers: accepted, no effect: num_workers measure files.
    """

    aliases: ClassVar[dict[str, str]] = {
        "data_path": "csv_path",
        "data-path": "csv_path",
        "dataset.data_path": "csv_path",
        "dataset.latents_path": "latents_path",
        "dataset.type": "dataset_type",
        **DATA_ALIASES,
        "dataset.num_frames": "data.sample_n_frames",
        "dataset.frame_interval": "data.sample_stride",
        "dataset.image_size": "data.frame_size",
        "dataset.transform_name": "transform_name",
        "bucket_config": "data.buckets",
        "batch_size": "data.batch_size",
        "batch-size": "data.batch_size",
        "num_workers": "data.num_workers",
        "ckpt_path": "model.from_pretrained",
        "ckpt-path": "model.from_pretrained",
        "model.enable_flashattn": "model.enable_flash_attn",
        "lr": "optim.lr",
        "grad_clip": "optim.clip_norm",
        "adam_eps": "optim.eps",
        "warmup_steps": "optim.warmup_steps",
        "ema_decay": "optim.ema_decay",
        "outputs": "output_path",
        "ckpt_every": "ckpt_save_steps",
    }

    csv_path: str | None = None
    video_folder: str | None = None
    latents_path: str | None = None
    dataset_type: Literal["VideoTextDataset", "VariableVideoTextDataset"] | None = None
    transform_name: Literal["resize_crop", "center"] = "resize_crop"
    model: TrainedDenoiserSection = field(default_factory=TrainedDenoiserSection)
    vae: AutoencoderSection = field(default_factory=AutoencoderSection)
    text_encoder: TextEncoderSection = field(default_factory=TextEncoderSection)
    scheduler: TrainingSchedulerSection = field(default_factory=TrainingSchedulerSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    mask_ratios: dict[str, float] | None = None
    caption_dropout: float = 0.1
    sample_posterior: bool = True
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16"
    log_every: int = 10
    load: str | None = None
    start_from_scratch: bool = False
    sp_size: int = 1
    num_bucket_build_workers: int | None = None

    # What other runs have too, and Open-Sora's values of it.
    output_path: str = "outputs"
    data: OpenSoraDataConfig = field(default_factory=OpenSoraDataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5, ema_decay=0.9999))
    epochs: int = 1000
    ckpt_save_steps: int | None = 500

    def __post_init__(self):
        super().__post_init__()
        one = (self.csv_path is None) != (self.latents_path is None)
        require(one, self, "csv_path", "given, or latents_path in its place; one of them and not both")
        require(self.log_every >= 1, self, "log_every", "at least 1")
        require(0 <= self.caption_dropout <= 1, self, "caption_dropout", "from 0 to 1")
        require(self.sp_size >= 1, self, "sp_size", "at least 1")
        require(self.sp_size > 1 or self.plugin != "zero2-seq", self, "sp_size", "above 1 with plugin zero2-seq")
        require(self.load is not None or not self.start_from_scratch, self, "load", "given with start_from_scratch")
        self._check_data()
        if self.mask_ratios is not None:
            MaskGenerator(self.mask_ratios)
        if self.model.type.lower().startswith("dit"):
            if self.mask_ratios is not None:
                raise ValueError(f"mask_ratios: model.type {self.model.type} has no frame masks; use an STDiT")
            if self.sp_size > 1:
                raise ValueError(
                    f"sp_size: devices cannot share the tokens of model.type {self.model.type}; use an STDiT"
                )

    def _check_data(self) -> None:
        buckets = self.data.buckets is not None
        if self.latents_path is not None:
            require(not buckets, self.data, "buckets", "null with latents_path, whose clips have their sizes")
        elif self.dataset_type is not None:
            wanted = "VariableVideoTextDataset with a bucket_config" if buckets else "VideoTextDataset without one"
            require((self.dataset_type == "VariableVideoTextDataset") == buckets, self, "dataset_type", wanted)
        if self.transform_name == "center" and not buckets:
            height, width = self.data.size
            require(height == width, self, "transform_name", f"resize_crop for {height} x {width}, no square")

    def task(self) -> "DenoiserTask":
        from mg.generation.training.task import DenoiserTask

        return DenoiserTask(self)


def check_paths(config: DenoiserTrainConfig) -> None:
    """Raise ValueError where what a run takes is not there; nothing is loaded. One that goes on has its own weights."""
    wanted = caption_paths(config.text_encoder)
    if config.latents_path is None or config.validation.csv_path is not None:
        wanted = {"vae.from_pretrained": config.vae.from_pretrained, **wanted}
    if config.model.from_pretrained is not None and not (config.resume or config.load):
        wanted["model.from_pretrained"] = config.model.from_pretrained
    check_weights(wanted)
