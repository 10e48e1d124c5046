"""The config of mg-generate: Open-Sora's, with its own field names."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mg.checkpoints import where_from
from mg.config import require
from mg.data.aspects import frame_count, image_size
from mg.diffusion.networks import network_of
from mg.inference.loading import TileFields

SAMPLERS = ("iddpm", "dpm-solver", "rflow")


@dataclass
class DenoiserSection:
    """The diffusion transformer; sizes default to those of its type.

    Args:
        type: STDiT-XL/2 (Open-Sora 1.0) | STDiT2-XL/2 (1.1) | STDiT3-XL/2 | STDiT3-3B/2 (1.2) | DiT-XL/2 | DiT-XL/2x2.
        from_pretrained: its weights, a file or folder, ours or the original's.
        input_sq_size: side in pixels of the square that spatial positions are relative to.
        space_scale: STDiT: divisor of positions within a frame.
        time_scale: STDiT: divisor of positions in time.
        no_temporal_pos_emb: DiT: no positions in time.
        condition: DiT: text, or label_N for N classes.
        qk_norm: normalise queries and keys.
        qk_norm_legacy: normalise them after the rotation, as Open-Sora 1.1's weights need.
        enable_flash_attn: flash attention, if the device has it.
        enable_layernorm_kernel: accepted, no effect: MindSpore's norms have their own kernels.
        enable_sequence_parallelism: accepted, no effect: an sp_size above 1 turns it on.
        depth: number of blocks, instead of the type's.
        hidden_size: width, instead of the type's.
        num_heads: attention heads, instead of the type's.
        patch_size: frames, rows and columns of latents per token, instead of the type's.
        config: further settings of the network.
    """

    type: str = "STDiT2-XL/2"
    from_pretrained: str | None = None
    input_sq_size: int | None = None
    space_scale: float | None = None
    time_scale: float | None = None
    no_temporal_pos_emb: bool | None = None
    condition: str | None = None
    qk_norm: bool | None = None
    qk_norm_legacy: bool | None = None
    enable_flash_attn: bool | None = None
    enable_layernorm_kernel: bool | None = None
    enable_sequence_parallelism: bool | None = None
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    patch_size: list[int] | None = None
    config: dict[str, Any] = field(default_factory=dict)


# The fields of a DenoiserSection that are not settings of the network.
NOT_OF_NETWORK = ("type", "from_pretrained", "enable_layernorm_kernel", "enable_sequence_parallelism")


@dataclass
class AutoencoderSection:
    """The autoencoder whose latents are generated.

    Args:
        type: VideoAutoencoderKL, an image VAE frame by frame | OpenSoraVAE_V1_2 | tae | dc_ae | hunyuan_vae | image_vae
            | temporal_vae | exported, a folder of mg-export; by default recognised from the weights.
        from_pretrained: its weights, a file or folder.
        micro_batch_size: frames that an image VAE, or the spatial half of OpenSoraVAE_V1_2, processes at once.
        micro_frame_size: OpenSoraVAE_V1_2: frames per chunk.
        scaling_factor: of the latents, instead of the one next to the weights.
        shift_factor: of the latents, instead of the one next to the weights.
        local_files_only: accepted, no effect: nothing is ever downloaded.
        cache_dir: accepted, no effect.
        dtype: precision of convolutions and matrix products; by default the run's.
        enable_tile: run in tiles, which bounds the memory; auto does so if a clip doesn't fit into memory whole.
        tiling: tile sizes and overlaps.
        max_memory: GB that a clip may use; by default what is free.
        engine: of an exported one: onnxruntime | openvino | torch.
        config: overrides of the config next to the weights.

    Raises:
        ValueError: settings that are out of range.
    """

    type: str | None = None
    from_pretrained: str | None = None
    micro_batch_size: int | None = None
    micro_frame_size: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    local_files_only: bool | None = None
    cache_dir: str | None = None
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    enable_tile: bool | Literal["auto"] = "auto"
    tiling: TileFields = field(default_factory=TileFields)
    max_memory: float | None = None
    engine: Literal["onnxruntime", "openvino", "torch"] = "onnxruntime"
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("micro_batch_size", "micro_frame_size"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1, or null")
        for name in ("scaling_factor", "max_memory"):
            require(getattr(self, name) is None or getattr(self, name) > 0, self, name, "above 0, or null")


@dataclass
class TextEncoderSection:
    """The text encoder for prompts.

    Args:
        type: t5 | clip | classes, for which prompts are class numbers.
        from_pretrained: its weights, a file or folder.
        tokenizer: file or folder of its tokenizer; by default where the weights are.
        embeddings: a folder of mg-encode-text, instead of the encoder.
        model_max_length: tokens per prompt; longer ones are cut.
        num_classes: the number of classes.
        dtype: fp32, as in the originals; bf16 needs half the memory. T5 overflows in fp16.
        shardformer: accepted, no effect: it only makes the original's encoder faster.
        local_files_only: accepted, no effect: nothing is ever downloaded.
        cache_dir: accepted, no effect.
        config: further settings of the encoder.
    """

    type: Literal["t5", "clip", "classes"] = "t5"
    from_pretrained: str | None = None
    tokenizer: str | None = None
    embeddings: str | None = None
    model_max_length: int | None = None
    num_classes: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    shardformer: bool | None = None
    local_files_only: bool | None = None
    cache_dir: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class SchedulerSection:
    """How noise becomes latents.

    Args:
        type: iddpm (Open-Sora 1.0 and 1.1) | dpm-solver, for images, without mask strategies | rflow (1.2).
        num_sampling_steps: more are slower and better.
        timestep_respacing: iddpm: the steps as "n", "a,b,c" or "ddimN", instead of their number.
        cfg_scale: guidance strength; 1 is none.
        cfg_channel: iddpm: number of channels to guide; null guides all.
        use_timestep_transform: rflow: the larger the clip, the more steps at high noise.
        original_masks: treat given frames as Open-Sora does: iddpm keeps them nearly but not exactly.
        config: further arguments of the schedule.
    """

    type: str = "iddpm"
    num_sampling_steps: int | None = None
    timestep_respacing: str | None = None
    cfg_scale: float | None = None
    cfg_channel: int | None = None
    use_timestep_transform: bool | None = None
    original_masks: bool | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class GenerateConfig:
    """Generate videos and images from prompts, images and videos.

    Args:
        model: the diffusion transformer.
        vae: the autoencoder.
        text_encoder: the text encoder for prompts.
        scheduler: how noise becomes latents.
        dtype: precision of matrix products: bf16 | fp16 | fp32; on a CPU bf16 is emulated.
        prompt: prompts; they override prompt_path. A prompt may end with {"reference_path": ..., "mask_strategy": ...},
            and may have a text for each loop: "|0|first|2|from loop 2 on".
        prompt_path: file with one prompt per line.
        start_index: number of the first prompt to use, counted from 0.
        end_index: number of the first prompt not to use; null uses all.
        num_sample: samples per prompt; their names end in -0, -1, ...
        batch_size: prompts at once.
        seed: a sample depends only on the seed, its prompt, its number and its settings.
        num_frames: of a clip, 1 for an image; or 1x, 2x, 4x, 8x, 16x, 2s, 4s, 8s, 16s, 32s, based on 51 frames.
        image_size: height and width in pixels; overrides the next two.
        resolution: 144p | 240p | 360p | 480p | 720p | 1080p | 2k | 4k | 256 | 512 | 1024 | 2048 | 2880.
        aspect_ratio: height to width: 9:16 is landscape, 16:9 portrait.
        fps: frame rate of the source that a clip's frames are taken from, a condition of the network.
        frame_interval: a clip has every n-th frame of the source: it plays at fps / frame_interval.
        save_fps: frame rate of the written videos, instead of that.
        multi_resolution: STDiT2, or null; networks conditioned on sizes get them in any case.
        loop: clips per sample, each continuing the one before.
        condition_frame_length: latent frames that neighbouring clips share.
        condition_frame_edit: how freely those may change, from 0, not at all, to 1.
        reference_path: images or videos for each prompt, several joined by ";"; null or "" for none.
        mask_strategy: for each prompt: groups loop,reference,start,target,length,edit joined by ";".
        align: move starts and targets of mask strategies to multiples of this many latent frames.
        repeat_images: an image fills all frames of its group, as in Open-Sora 1.1; otherwise one.
        sample_posterior: encode references to a sample of the posterior, as the originals do; otherwise to its mean.
        aes: aesthetic score to append to prompts, 4 to 7; Open-Sora 1.2 was trained with these three.
        flow: motion score to append to prompts.
        camera_motion: camera motion to append to prompts: pan left, zoom in, static, ...
        clean_prompts: clean prompts as Open-Sora 1.x does before they are encoded.
        save_dir: folder to write to; the same command again makes what is missing.
        sample_name: how names begin, instead of with sample.
        prompt_as_path: name samples by their prompts; those whose file exists are skipped.
        gallery: write index.html, with all samples of save_dir.
        beside: a CSV of clips, such as the training clips, that the gallery shows next to samples of their captions.
        verbose: 0 no bars | 1 a bar over samples | 2 also one over steps.
        llm_refine: must be false; Open-Sora 1.2 asks a service to refine prompts.
        watermark: must be false; Open-Sora 1.2 puts its name on videos.
        prompt_generator: must be null; Open-Sora 1.2 asks a service to make prompts.
        sp_size: must be 1: devices divide the samples, not the tokens of one.
        device: auto picks the first available of ascend, gpu and cpu.
        mode: graph compiles once per shape, pynative runs op by op; auto is pynative on a CPU, graph elsewhere.

    Raises:
        ValueError: settings that are out of range or conflict.
    """

    aliases: ClassVar[dict[str, str]]

    model: DenoiserSection = field(default_factory=DenoiserSection)
    vae: AutoencoderSection = field(default_factory=AutoencoderSection)
    text_encoder: TextEncoderSection = field(default_factory=TextEncoderSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16"
    prompt: list[str] | None = None
    prompt_path: str | None = None
    start_index: int = 0
    end_index: int | None = None
    num_sample: int = 1
    batch_size: int = 1
    seed: int = 42
    num_frames: int | str = 16
    image_size: list[int] | None = None
    resolution: str | None = None
    aspect_ratio: str | None = None
    fps: float = 24
    frame_interval: int = 1
    save_fps: float | None = None
    multi_resolution: Literal["STDiT2"] | None = None
    loop: int = 1
    condition_frame_length: int | None = None
    condition_frame_edit: float = 0.0
    reference_path: list[str | None] | None = None
    mask_strategy: list[str | None] | None = None
    align: int | None = None
    repeat_images: bool = False
    sample_posterior: bool = False
    aes: float | None = None
    flow: float | None = None
    camera_motion: str | None = None
    clean_prompts: bool = True
    save_dir: str = "samples"
    sample_name: str | None = None
    prompt_as_path: bool = False
    gallery: bool = True
    beside: str | None = None
    verbose: Literal[0, 1, 2] = 2
    llm_refine: bool = False
    watermark: bool = False
    prompt_generator: str | None = None
    sp_size: int = 1
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"

    def __post_init__(self):
        for name in ("num_sample", "batch_size", "frame_interval", "loop"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("fps", "save_fps"):
            require(getattr(self, name) is None or getattr(self, name) > 0, self, name, "above 0")
        require(self.seed >= 0, self, "seed", "at least 0")
        require(self.start_index >= 0, self, "start_index", "at least 0")
        after = self.end_index is None or self.end_index > self.start_index
        require(after, self, "end_index", f"above start_index, {self.start_index}")
        require(self.align is None or self.align >= 1, self, "align", "at least 1, or null")
        require(0 <= self.condition_frame_edit <= 1, self, "condition_frame_edit", "from 0 to 1")
        require(self.sp_size == 1, self, "sp_size", "1: devices share samples out here, and not the tokens of one")
        require(not self.llm_refine, self, "llm_refine", "false: refine prompts beforehand, no service is asked here")
        require(not self.watermark, self, "watermark", "false: no watermark comes with this project")
        nothing = "null: generate prompts beforehand, no service is asked here"
        require(self.prompt_generator is None, self, "prompt_generator", nothing)
        if self.loop > 1:
            given = self.condition_frame_length is not None and self.condition_frame_length >= 1
            require(given, self, "condition_frame_length", f"at least 1 where loop is above 1; it is {self.loop}")
        self._check_scheduler()
        if self.text_encoder.embeddings is None:
            check_captions(self.model.type, self.text_encoder.type)
        _ = self.frames, self.size

    def _check_scheduler(self) -> None:
        chosen = self.scheduler
        if chosen.type == "iddpm-speed":
            raise ValueError(
                "scheduler.type is iddpm-speed, which only trains; sample with iddpm: one network fits both"
            )
        if chosen.type not in SAMPLERS and chosen.type != "dmp-solver":
            near = difflib.get_close_matches(chosen.type, SAMPLERS, 1, cutoff=0)[0]
            raise ValueError(f"there is no schedule {chosen.type!r}, scheduler.type; did you mean {near!r}?")
        if chosen.num_sampling_steps is not None and chosen.timestep_respacing:
            raise ValueError(
                f"scheduler.num_sampling_steps is {chosen.num_sampling_steps} and scheduler.timestep_respacing is "
                f"{chosen.timestep_respacing!r}, which choose the steps both; leave one of them out"
            )
        steps = chosen.num_sampling_steps
        if steps is not None and steps < 1:
            raise ValueError(f"scheduler.num_sampling_steps is {steps}; it must be at least 1")

    @property
    def frames(self) -> int:
        """Of a clip."""
        return frame_count(self.num_frames)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if self.image_size is not None:
            if len(self.image_size) != 2 or min(self.image_size) < 1:
                raise ValueError(f"image_size is {self.image_size}; it must be height and width, such as [240, 426]")
            return self.image_size[0], self.image_size[1]
        if self.resolution is None or self.aspect_ratio is None:
            raise ValueError("image_size must be given, or resolution and aspect_ratio both")
        return image_size(self.resolution, self.aspect_ratio)

    @property
    def rate(self) -> float:
        """Frames per second of what is written."""
        return self.save_fps or self.fps / self.frame_interval

    @property
    def refuses_masks(self) -> str | None:
        """Why no mask strategy can be used; None if one can."""
        if self.scheduler.type in ("dpm-solver", "dmp-solver"):
            return "scheduler.type dpm-solver generates all frames of a clip and can keep none; use iddpm"
        if not network_of(self.model.type)[0].takes_frame_mask:
            return f"model.type {self.model.type} has no frame masks; use an STDiT"
        return None


def given(section: Any, *without: str) -> dict[str, Any]:
    """The fields of a section that are not null, and the keys of its `config`, except those in `without`."""
    values = {entry.name: getattr(section, entry.name) for entry in fields(section)} | section.config
    return {name: value for name, value in values.items() if value is not None and name not in ("config", *without)}


def _other_names() -> dict[str, str]:
    """Every option with - instead of _, and the guide's short names of options in sections."""
    names = {
        "ckpt_path": "model.from_pretrained",
        "num_sampling_steps": "scheduler.num_sampling_steps",
        "cfg_scale": "scheduler.cfg_scale",
        "flash_attn": "model.enable_flash_attn",
        "layernorm_kernel": "model.enable_layernorm_kernel",
        "model.enable_flashattn": "model.enable_flash_attn",
        "frame_stride": "frame_interval",
    }
    dashed = {alias.replace("_", "-"): option for alias, option in names.items() if "." not in alias}
    own = {entry.name.replace("_", "-"): entry.name for entry in fields(GenerateConfig) if not is_dataclass(entry.type)}
    return names | dashed | {alias: option for alias, option in own.items() if alias != option}


GenerateConfig.aliases = _other_names()


def check_captions(model_type: str, encoder_type: str) -> None:
    """Raise ValueError if a network is unknown or takes no captions of that type."""
    taken = network_of(model_type)[0].text_encoders
    if encoder_type not in taken:
        raise ValueError(f"text_encoder.type is {encoder_type}; model.type {model_type} takes {' or '.join(taken)}")


def check_paths(config: GenerateConfig) -> None:
    """Raise ValueError if weights are missing; nothing is loaded."""
    check_weights(
        {
            "model.from_pretrained": config.model.from_pretrained,
            "vae.from_pretrained": config.vae.from_pretrained,
            **caption_paths(config.text_encoder),
        }
    )


def caption_paths(section: TextEncoderSection) -> dict[str, str | None]:
    """Where captions come from, by option: stored embeddings or weights; nothing for classes."""
    if section.embeddings is not None:
        return {"text_encoder.embeddings": section.embeddings}
    return {} if section.type == "classes" else {"text_encoder.from_pretrained": section.from_pretrained}


def check_weights(wanted: Mapping[str, str | None]) -> None:
    """Raise ValueError if an option names no weights, or missing ones."""
    for name, path in wanted.items():
        if path is None:
            raise ValueError(f"{name} must be given: weights, a file or a folder")
        if not Path(path).exists():
            hint = where_from(path) or "; download the weights, and give where they lie"
            raise ValueError(f"{name}: {path}: no such file or folder{hint}")
