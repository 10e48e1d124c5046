"""Prompts to a denoiser's text input: T5's states, CLIP's pooled state, or a class number.

Prompts are encoded one at a time and padded to the same length, so that only one graph is compiled and the result
doesn't depend on other prompts.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from mg import runtime
from mg.checkpoints import CheckpointError, StateDict, check_finite, compare_names, open_state_dict, read_config
from mg.models.naming import own_part
from mg.models.registry import merge_config
from mg.text.clip import CLIPTextTower, pooled_positions
from mg.text.t5 import T5Encoder
from mg.text.tokenizers import Tokenizer, open_tokenizer

_logger = logging.getLogger(__name__)


class TextEncoder:
    """Base class of the text encoders.

    Attributes:
        type: t5 | clip | classes.
        output_dim: D, the output width; 0 for class numbers.
        model_max_length: L, the maximum number of tokens in a prompt.
        has_mask: whether prompts are padded, with a mask.
        config: all settings that the weights depend on.
        tokenizer: not set for classes.
    """

    type: str
    output_dim: int
    model_max_length: int
    has_mask = False
    config: Mapping[str, Any]
    tokenizer: Tokenizer

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Encode prompts to a denoiser's y and mask.

        Returns:
            y: (B, 1, L, D) float32, with zeros after a prompt's tokens; (B, 1, 1, D) for CLIP, and (B,) int32, the
                class numbers, for classes.
            mask: (B, L) bool, True at tokens; None if there is no padding.

        Raises:
            ValueError: a prompt that cannot be encoded; the message names it.
        """
        raise NotImplementedError


class T5TextEncoder(TextEncoder):
    """See `create_text_encoder`."""

    type = "t5"
    has_mask = True

    def __init__(self, network: T5Encoder, tokenizer: Tokenizer, model_max_length: int):
        self.network, self.tokenizer, self.model_max_length = network, tokenizer, model_max_length
        self.output_dim, self.config = network.output_dim, network.config

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        length = self.model_max_length
        y = np.zeros((len(prompts), 1, length, self.output_dim), np.float32)
        mask = np.zeros((len(prompts), length), bool)
        for row, prompt in enumerate(prompts):
            ids, used = self.tokenizer(prompt, length)
            mask[row, :used] = True
            states = self.network(Tensor(ids[None]), Tensor(mask[row : row + 1].astype(np.float32)))  # (1, L, D)
            y[row, 0, :used] = _finite(prompt, states.asnumpy()[0, :used])
        return y, mask


class CLIPTextEncoder(TextEncoder):
    """See `create_text_encoder`."""

    type = "clip"

    def __init__(self, network: CLIPTextTower, tokenizer: Tokenizer, model_max_length: int):
        self.network, self.tokenizer, self.model_max_length = network, tokenizer, model_max_length
        self.output_dim, self.config = network.output_dim, network.config

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        y = np.zeros((len(prompts), 1, 1, self.output_dim), np.float32)
        for row, prompt in enumerate(prompts):
            ids = self.tokenizer(prompt, self.model_max_length).ids[None]
            states = self.network(Tensor(ids)).asnumpy()  # (1, L, D)
            y[row, 0, 0] = _finite(prompt, states[0, pooled_positions(ids, self.config["eos_token_id"])[0]])
        return y, None


class ClassLabels(TextEncoder):
    """Prompts that are class numbers; `num_classes` itself stands for no class.

    Args:
        num_classes: number of classes; 1000 for ImageNet, which DiT was trained on.
    """

    type = "classes"
    output_dim = 0
    model_max_length = 1

    def __init__(self, num_classes: int = 1000):
        self.num_classes = num_classes
        self.config = {"num_classes": num_classes}

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        for prompt in prompts:
            if not (prompt.strip().isdecimal() and int(prompt) <= self.num_classes):
                raise ValueError(
                    f"the prompt is {prompt!r}; it must be a class number, 0 to {self.num_classes - 1}, or "
                    f"{self.num_classes} for none"
                )
        return np.array([int(prompt) for prompt in prompts], np.int32), None


def _finite(prompt: str, states: np.ndarray) -> np.ndarray:
    if not np.isfinite(states).all():
        raise ValueError(f"the embedding of {prompt!r} is not finite; with dtype fp16, try bf16 or fp32")
    return states


# Creating them.

_NETWORKS: dict[str, type[T5Encoder] | type[CLIPTextTower]] = {"t5": T5Encoder, "clip": CLIPTextTower}
_ENCODERS = {"t5": T5TextEncoder, "clip": CLIPTextEncoder}
_LENGTHS = {"t5": 120, "clip": 77}
_PARTS = {"t5": ("shared", "encoder"), "clip": ("text_model",)}  # first parts of parameter names
_MODEL_TYPES = {"t5": ("t5", "mt5"), "clip": ("clip", "clip_text_model")}
TYPES = (*_ENCODERS, "classes")


def create_text_encoder(
    type: str,
    from_pretrained: str | Path | None = None,
    model_max_length: int | None = None,
    dtype: str = "fp32",
    tokenizer: str | Path | None = None,
    **config,
) -> TextEncoder:
    """Build a text encoder; the default config is that of the released one: T5 v1.1 XXL, CLIP ViT-B/32.

    Args:
        type: t5 | clip | classes.
        from_pretrained: folder or file of the weights, in any format that `mg.checkpoints` reads; the config.json next
            to them is the default config then. Without it the weights are random.
        model_max_length: tokens that a prompt is padded to; by default 120 for T5 and 77 for CLIP.
        dtype: fp32 | fp16 | bf16, of matrix products and, also in memory, of their weights.
        tokenizer: file or folder of the tokenizer; by default it is looked for next to the weights.
        config: overrides of the config, under transformers' names; for classes: num_classes.

    Raises:
        ValueError: an unknown type or key, or a tokenizer that is missing, cannot be read or does not fit.
        CheckpointError: weights that cannot be read or do not fit.
    """
    if type not in TYPES:
        raise ValueError(f"the text encoder's type is {type!r}; it must be one of {', '.join(TYPES)}")
    if type == "classes":
        return ClassLabels(**merge_config({"num_classes": 1000}, config, type))
    length = _LENGTHS[type] if model_max_length is None else model_max_length
    if length < 2:
        raise ValueError(f"model_max_length is {length}; it must be at least 2: a token, and the end token")
    if from_pretrained is None and tokenizer is None:
        raise ValueError(f"a text encoder of type {type} needs from_pretrained, or at least a tokenizer")
    runtime.block_on_cpu()
    with contextlib.ExitStack() as stack:
        state = None
        if from_pretrained is not None:
            state = stack.enter_context(open_state_dict(_folder_of_weights(Path(from_pretrained))))
        words = open_tokenizer(type, tokenizer or _place_of_tokenizer(Path(from_pretrained or "")))
        network = _network(type, state, length, dtype, config)
    if words.size > network.config["vocab_size"]:
        raise ValueError(
            f"the tokenizer has {words.size} tokens and the text encoder {network.config['vocab_size']}: they do not "
            "belong together"
        )
    return _ENCODERS[type](network, words, length)


def _folder_of_weights(path: Path) -> Path:
    """In a pipeline's folder, the text encoder's subfolder."""
    return path / "text_encoder" if (path / "text_encoder").is_dir() else path


def _place_of_tokenizer(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _network(type: str, state: StateDict | None, length: int, dtype: str, config: dict) -> nn.Cell:
    network = _NETWORKS[type]
    stored = _stored_config(type, state) if state is not None else {}
    try:
        merged = merge_config(network.default_config, {**stored, **config}, type)
    except ValueError as error:
        if state is None or config or not stored:
            raise
        raise CheckpointError(f"{state.config_file}: {error}") from error
    # Initialising the large one randomly would take as long as reading its weights.
    with contextlib.nullcontext() if state is None else no_init_parameters():
        built = network(merged, length, dtype)
    if state is not None:
        _load(type, built, state)
    built.set_train(False)
    for parameter in built.get_parameters():
        parameter.requires_grad = False
    return built


def _stored_config(type: str, state: StateDict) -> dict:
    """The keys we know in the config next to the weights."""
    if state.config_file is None:
        return {}
    stored = read_config(state.config_file)
    if "text_config" in stored and isinstance(stored["text_config"], dict):  # the config of both halves of CLIP
        stored = {**stored["text_config"], "model_type": stored.get("model_type")}
    kind = stored.get("model_type")
    if kind is not None and kind not in _MODEL_TYPES[type]:
        raise CheckpointError(
            f"{state.config_file}: describes a model of type {kind!r}; a text encoder of type {type} needs weights of "
            f"{' or '.join(_MODEL_TYPES[type])}"
        )
    older = {"feed_forward_proj": "relu"} if type == "t5" else {}  # not stated in version 1.0's config
    return {key: value for key, value in {**older, **stored}.items() if key in _NETWORKS[type].default_config}


def _load(type: str, network: nn.Cell, state: StateDict) -> None:
    """Load the weights tensor by tensor, so that the whole file is never in memory.

    Raises:
        CheckpointError: names or shapes that do not match the network's, or values that are not finite.
    """
    parameters = dict(network.parameters_and_names())
    sources = _sources(type, state)
    shapes = {name: state.shapes[source] for name, source in sources.items()}
    report = compare_names({name: tuple(p.shape) for name, p in parameters.items()}, shapes)
    if not report.complete:
        raise CheckpointError(
            f"{state} does not fit this text encoder: {report.summary()}; if its sizes differ, give its config.json",
            report,
        )
    for name, parameter in parameters.items():
        array = state[sources[name]]
        check_finite(str(state), {name: array})
        parameter.set_data(Tensor(array, parameter.dtype))
        del array
    _logger.info("%s: %s", state, report.summary())


def _sources(type: str, state: Mapping) -> dict[str, str]:
    """Our name of each parameter -> the file's."""
    sources = dict(own_part(state, _PARTS[type]).sources)
    if type == "t5" and "encoder.embed_tokens.weight" in sources:  # the same table under its other name
        sources.setdefault("shared.weight", sources["encoder.embed_tokens.weight"])
    if type == "clip" and not any(name.startswith("text_model.") for name in sources):  # newer files of transformers
        inner = own_part(state, ("embeddings", "encoder", "final_layer_norm"))
        sources |= {f"text_model.{name}": source for name, source in inner.sources.items()}
    return sources
