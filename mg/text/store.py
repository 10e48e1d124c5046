"""Encodes prompts, or the captions of a CSV, to a folder of embeddings that replaces the text encoder; see
mg.text.stored.

T5-XXL's weights are 19 GB in fp32, too much to have in memory during training. Texts are encoded one by one and divided
among the workers by position. Running the same command again continues a stopped run, on any number of workers.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from tqdm import tqdm

from mg import runtime
from mg.checkpoints.digest import sha256
from mg.config import PATH_ALIASES, require
from mg.data.errors import DataError
from mg.data.index import read_index
from mg.data.shards import EncodeReport, ShardWriter, read_rows, settle
from mg.plain_text import one_line, printable
from mg.text.captions import clean_caption
from mg.text.encoders import TextEncoder, create_text_encoder
from mg.text.prompts import append_scores, read_prompts, split_suffix, texts_from
from mg.text.stored import PREFIX, SETTINGS_FILE, TENSOR, TextRow

_logger = logging.getLogger(__name__)
_SECONDS = 600  # after which a shard is finished: what a killed run loses at most


@dataclass
class TextEncoderConfig:
    """The text encoder.

    Args:
        from_pretrained: folder or file of its weights.
        type: t5 or clip.
        model_max_length: tokens per text; by default 120 for T5 and 77 for CLIP.
        dtype: precision of matrix products, and of the weights in memory.
        tokenizer: file or folder of its tokenizer; by default it is looked for next to the weights.
        config: overrides of the config next to the weights.
    """

    from_pretrained: str
    type: Literal["t5", "clip"] = "t5"
    model_max_length: int | None = None
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    tokenizer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def create(self) -> TextEncoder:
        settings = self.from_pretrained, self.model_max_length, self.dtype, self.tokenizer
        return create_text_encoder(self.type, *settings, **self.config)


@dataclass
class EncodeTextConfig:
    """Encode prompts, or the captions of a CSV, into a folder of embeddings.

    Args:
        text_encoder: the text encoder.
        prompt: prompts.
        prompt_path: a file of prompts, one per line.
        csv_path: a CSV or a parquet file with a column `caption` or `text`.
        aes: aesthetic score to append to prompts, as mg-generate does: Open-Sora 1.2 samples with 6.5.
        flow: motion score to append to prompts.
        camera_motion: camera motion to append to prompts.
        output_path: folder to write to; running the same command again continues there.
        clean: clean texts as Open-Sora cleans prompts, twice; by default prompts are cleaned and captions of a CSV are
            not, as in Open-Sora's inference and training.
        embeddings_dtype: precision of the stored embeddings.
        shard_size: size of a shard in MB; a shard is also finished after ten minutes, so that a killed run loses no
            more than that.
        retry_failed: retry texts that failed before.
        device: auto uses ascend, gpu or cpu, the first that is there.
        mode: graph compiles once, pynative runs op by op; auto uses pynative on a CPU.

    Raises:
        ValueError: a setting out of range.
    """

    aliases: ClassVar[dict[str, str]] = {
        **PATH_ALIASES,
        "prompt-path": "prompt_path",
        "ckpt_path": "text_encoder.from_pretrained",
        "ckpt-path": "text_encoder.from_pretrained",
    }

    text_encoder: TextEncoderConfig
    prompt: list[str] = field(default_factory=list)
    prompt_path: str | None = None
    csv_path: str | None = None
    aes: float | None = None
    flow: float | None = None
    camera_motion: str | None = None
    output_path: str = "outputs/embeddings"
    clean: bool | None = None
    embeddings_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    shard_size: int = 256
    retry_failed: bool = False
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"

    def __post_init__(self):
        require(self.shard_size >= 1, self, "shard_size", "at least 1")
        for name in ("aes", "flow", "camera_motion"):
            no_csv = self.csv_path is None or getattr(self, name) is None
            require(no_csv, self, name, "left out with csv_path: scores are only appended to prompts")
        given = [name for name in ("prompt", "prompt_path", "csv_path") if getattr(self, name)]
        if len(given) != 1:
            said = f"{' and '.join(given)} are" if given else "none is"
            raise ValueError(f"of prompt, prompt_path and csv_path {said} given; give one of them")

    @property
    def cleaned(self) -> int:
        """How often each text is cleaned."""
        return 2 if (self.csv_path is None if self.clean is None else self.clean) else 0


def encode_texts(config: EncodeTextConfig, rank: int = 0, world_size: int = 1) -> EncodeReport:
    """Encode this worker's texts into `config.output_path`: of the distinct texts, number i is rank i % world_size's.

    A text that cannot be encoded gets an index line with the error, and the run continues. One that failed for lack of
    memory or disk space is tried again by the next run.

    Raises:
        ValueError, OSError: texts or a checkpoint that cannot be used, or a folder that cannot be written to or was
            made with other settings.
    """
    texts = read_texts(config)
    encoder = config.text_encoder.create()
    folder = Path(config.output_path)
    settle(folder, SETTINGS_FILE, _settings(config, encoder), "encoder", TextRow)
    mine = texts[rank::world_size]
    report = EncodeReport(len(texts), len(mine))
    todo = report.to_do(mine, read_rows(folder, TextRow), config.retry_failed)
    order = {text: i for i, text in enumerate(texts)}
    size = config.shard_size * 2**20
    writer = ShardWriter(folder, TextRow, PREFIX, order, config.embeddings_dtype, size, rank, world_size, size // 512)
    with writer as shards, runtime.CtrlC() as ctrl_c:
        finished = time.monotonic()
        for text in tqdm(todo, desc="texts", unit="text"):
            try:
                states = _states(encoder, text)  # (1, tokens, D)
                shards.store(TextRow(text), states.shape[1], [{TENSOR: states}])
                report.encoded += 1
            except Exception as error:
                _logger.debug("", exc_info=True)
                shards.fail(TextRow(text), one_line(error), again=isinstance(error, OSError | MemoryError))
                report.failed.append((text, one_line(error)))
                _logger.warning("%s: %s", printable(text), one_line(error))
            if time.monotonic() > finished + _SECONDS:
                shards.finish_shard()
                finished = time.monotonic()
            ctrl_c.check()
    report.lose(shards.lost)
    return report


def read_texts(config: EncodeTextConfig) -> list[str]:
    """The distinct texts to encode, as the encoder receives them: prompts without their JSON suffix, a text for each
    |n|, with scores.

    Raises:
        ValueError, OSError: a file that cannot be read or has no texts, or a prompt with invalid JSON or loops.
    """
    if config.csv_path is not None:
        texts = [row.caption for row in read_index(config.csv_path)]
        if not any(texts):
            raise DataError(f"{config.csv_path}: no row has a caption; it needs a column 'caption' or 'text'")
    else:
        prompts = config.prompt if config.prompt_path is None else read_prompts(config.prompt_path)
        scores = (config.aes, config.flow, config.camera_motion)
        texts = []
        for number, prompt in enumerate(prompts):
            try:
                found = texts_from(split_suffix(prompt).text).values()
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            texts += [append_scores(text, *scores) for text in found]
    return list(dict.fromkeys(clean_caption(text, config.cleaned) for text in texts))


def _states(encoder: TextEncoder, text: str) -> np.ndarray:
    """A text's embedding without padding, (1, tokens, D)."""
    y, mask = encoder.encode([text])
    return y[0] if mask is None else y[0][:, mask[0]]


def _settings(config: EncodeTextConfig, encoder: TextEncoder) -> dict:
    """The settings that all embeddings of a folder share."""
    checkpoint = Path(config.text_encoder.from_pretrained)
    return {
        "encoder": {
            "type": encoder.type,
            "checkpoint": str(checkpoint),
            "sha256": sha256(checkpoint),
            "tokenizer": sha256(encoder.tokenizer.file),
            "dtype": config.text_encoder.dtype,
            "config": dict(encoder.config),
        },
        "model_max_length": encoder.model_max_length,
        "output_dim": encoder.output_dim,
        "has_mask": encoder.has_mask,
        "cleaned": config.cleaned,
        "dtype": config.embeddings_dtype,
    }
