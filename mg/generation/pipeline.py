"""Prompts and references to clips: text encoder, denoiser, schedule and autoencoder, and the loop over clips.

A sample with several loops is made clip by clip. Each clip starts with the re-encoded end of the previous one; these P
shared frames are dropped when the clips are joined, so that a sample has loop * (num_frames - P) + P frames.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mg.diffusion.schedules import SampleNoise, Schedule
from mg.generation.codec import LatentCodec
from mg.generation.config import GenerateConfig
from mg.generation.masks import apply_mask_strategy, continuation
from mg.generation.requests import Request
from mg.plain_text import name_bytes
from mg.text import TextEncoder

IMAGE_FPS = 120  # the frame rate that denoisers got for images in training


class Noise(Protocol):
    """Fresh noise for a batch of samples, see `mg.diffusion.schedules.SampleNoise`."""

    def start(self) -> np.ndarray: ...

    def __call__(self, step: int, purpose: str) -> np.ndarray: ...


@dataclass
class Item:
    """One sample to generate: a request, the sample's number, and the latents (C, t, h, w) of its references."""

    request: Request
    sample: int = 0
    references: Sequence[np.ndarray] = field(default_factory=list)


class Pipeline:
    """Generates samples.

    Args:
        config: the run's settings.
        codec: the autoencoder.
        text_encoder: encodes the prompts.
        denoiser: the denoiser.
        schedule: turns noise into latents.

    Attributes:
        latent_size: frames, height and width of a clip's latents.
        shared: frames shared by successive clips; 0 for a single loop.

    Raises:
        ValueError: a clip size that doesn't work with the autoencoder or the loop.
    """

    def __init__(
        self, config: GenerateConfig, codec: LatentCodec, text_encoder: TextEncoder, denoiser: Any, schedule: Schedule
    ):
        self.config, self.codec, self.text_encoder = config, codec, text_encoder
        self.denoiser, self.schedule = denoiser, schedule
        self.latent_size = codec.latent_size((config.frames, *config.size))
        self.shared = shared_frames(config, codec)

    @property
    def num_frames(self) -> int:
        """Frames of a sample."""
        return self.config.loop * (self.config.frames - self.shared) + self.shared

    def noise(self, items: Sequence[Item], loop: int) -> Noise:
        """The noise of a loop; a sample's noise only depends on the seed, its prompt, its number and the loop."""
        seeds = [(self.config.seed, prompt_number(item.request.prompt), item.sample, loop) for item in items]
        return SampleNoise(seeds, (self.codec.in_channels, *self.latent_size))

    def generate(
        self,
        items: Sequence[Item],
        progress: Callable[[range], Iterable[int]] | None = None,
        noise: Callable[[Sequence[Item], int], Noise] | None = None,
        on_latents: Callable[[int, np.ndarray], None] | None = None,
    ) -> list[np.ndarray]:
        """Generate a batch of samples.

        Args:
            progress: wraps the steps of each loop, such as `tqdm`.
            noise: used instead of `self.noise`.
            on_latents: called with each loop's number and latents (B, C, T, h, w).

        Returns:
            (3, num_frames, H, W) in fp32 each, about [-1, 1]: not clipped.

        Raises:
            ValueError: a mask strategy that does not fit its references, or frames that are not finite.
        """
        config, shared = self.config, self.shared
        references = [list(item.references) for item in items]
        insertions = [list(item.request.insertions) for item in items]
        videos: list[list[np.ndarray]] = [[] for _ in items]
        for loop in range(config.loop):
            draw = (noise or self.noise)(items, loop)
            starts = zip(draw.start(), references, insertions)
            settings = (loop, config.align, config.repeat_images)
            placed = [apply_mask_strategy(z, latents, groups, *settings) for z, latents, groups in starts]
            z, frame_mask = (np.stack(values) for values in zip(*placed))  # (B, C, T, h, w), (B, T)
            z = self.schedule.sample(
                self.denoiser,
                z,
                cond=self.conditions([item.request.texts[loop] for item in items]),
                null=self.null(),
                noise=draw,
                frame_mask=None if (frame_mask == 1).all() else frame_mask,
                size=(*config.size, self.latent_size[0]),
                progress=progress,
            )
            if on_latents:
                on_latents(loop, z)
            for i, latents in enumerate(z):
                clip = self.codec.decode(latents[None], config.frames)[0]
                if not np.isfinite(clip).all():
                    raise ValueError("the frames are not finite; with dtype fp16, try bf16 or fp32")
                videos[i].append(clip[:, shared:] if loop else clip)
                if loop + 1 < config.loop:
                    insertions[i].append(self._continuation(loop + 1, len(references[i])))
                    references[i].append(self.codec.encode(clip[None, :, -shared:])[0])
        return [np.concatenate(clips, axis=1) for clips in videos]

    def conditions(self, texts: list[str]) -> Mapping[str, Any]:
        """The denoiser's inputs for each sample."""
        config, (height, width) = self.config, self.config.size
        y, mask = self.text_encoder.encode(texts)
        known = {
            "height": height,
            "width": width,
            "ar": height / width,
            "num_frames": config.frames,
            "fps": IMAGE_FPS if config.frames == 1 else config.fps,
        }
        extra = {name: np.full(len(texts), known[name], np.float32) for name in self.denoiser.extra_inputs}
        return {"y": y, **({} if mask is None else {"mask": mask}), **extra}

    def null(self) -> Mapping[str, Any]:
        """The inputs that replace a caption for guidance."""
        return {"y": self.denoiser.null_caption}

    def _continuation(self, loop: int, reference: int):
        return continuation(loop, reference, self.config.condition_frame_length or 0, self.config.condition_frame_edit)


def shared_frames(config: GenerateConfig, codec: LatentCodec) -> int:
    """How many frames successive clips of a sample share; 0 for a single clip.

    Raises:
        ValueError: latent frames that are not whole chunks, or not fewer than a clip has.
    """
    if config.loop == 1:
        return 0
    length, total = config.condition_frame_length or 0, codec.latent_size((config.frames, *config.size))[0]
    if length >= total:
        raise ValueError(f"condition_frame_length is {length}; it must be below {total}, the latent frames of a clip")
    try:
        return codec.frames_of(length)
    except ValueError as error:
        raise ValueError(f"condition_frame_length: {error}") from None


def prompt_number(prompt: str) -> int:
    """The number that represents a prompt in the seeds of its noise."""
    return zlib.crc32(name_bytes(prompt))
