"""The models by name.

    create_model("tae")                                    # Movie Gen TAE, untrained
    create_model("tae", pretrained="tae.ckpt", ch=64)      # keywords override the config
    from_pretrained("outputs/tae/checkpoints/step_000100") # config and weights from a folder or file

All of them share the interface of `mg.models.autoencoder`. One of your own joins them by its name, and works in
configs too:

    @register_model
    class MyAutoencoder(VideoAutoencoder):
        name = "my_autoencoder"
        default_config = {"z_channels": 16}
        ...
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from mg.checkpoints import CheckpointError, find_config, open_state_dict, read_config
from mg.models.autoencoder import VideoAutoencoder, merge_config
from mg.models.dc_ae.dc_ae import VideoDCAE
from mg.models.hunyuan_vae.hunyuan_vae import HunyuanVAE
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.tae.tae import TemporalAutoencoder
from mg.models.temporal_vae.temporal_vae import OpenSoraVAE

__all__ = [
    "VideoAutoencoder",
    "create_model",
    "from_pretrained",
    "list_models",
    "model_class",
    "model_name",
    "recognise",
    "register_model",
    "stored_config",
]

Model = TypeVar("Model", bound=type[VideoAutoencoder])

_MODELS: dict[str, type[VideoAutoencoder]] = {}


def register_model(model: Model) -> Model:
    """Make a model known by its `name`; a decorator.

    Raises:
        ValueError: it is no VideoAutoencoder, has no `name` or `default_config`, or another has its name.
    """
    if not (isinstance(model, type) and issubclass(model, VideoAutoencoder)):
        raise ValueError(f"{model!r} cannot be registered; a model is a subclass of mg.models.VideoAutoencoder")
    for attribute, kind in (("name", str), ("default_config", dict)):
        if not isinstance(getattr(model, attribute, None), kind):
            raise ValueError(f"{model.__name__} cannot be registered; its class must have a {attribute}")
    if _MODELS.setdefault(model.name, model) is not model:
        raise ValueError(f"{model.__name__} cannot be registered; there is a model {model.name!r} already")
    return model


for _model in (TemporalAutoencoder, VideoDCAE, OpenSoraVAE, HunyuanVAE, ImageAutoencoder):
    register_model(_model)


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(_MODELS)


def create_model(
    name: str, pretrained: str | Path | None = None, dtype: str = "fp32", use_recompute: bool = False, **config
) -> VideoAutoencoder:
    """Build a model; its default config is that of the released checkpoint.

    Args:
        pretrained: file or folder to take the weights from. The config that stands beside them is the default then.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and products.
        use_recompute: recompute activations in the backward pass in place of keeping them.
        config: overrides of the model's config.

    Raises:
        ValueError: an unknown name or config key.
        CheckpointError: weights that cannot be read or do not fit.
    """
    model = model_class(name)
    if pretrained is not None:
        config = {**stored_config(pretrained, name), **config}
    return model(config, pretrained=pretrained, dtype=dtype, use_recompute=use_recompute)  # type: ignore[call-arg]


def from_pretrained(path: str | Path, name: str | None = None, dtype: str = "fp32", **config) -> VideoAutoencoder:
    """Build the model whose weights lie at `path`, a file or folder; which one is as `model_name` says.

    Args:
        name: says it too, and must where nothing else does.
        config: overrides of the config that stands beside the weights.

    Raises:
        CheckpointError: weights that cannot be read, are no model's, or do not fit.
    """
    return create_model(name or model_name(path), path, dtype, **config)


def model_name(path: str | Path) -> str:
    """Which model's weights lie at `path`: the config beside them says it, else their tensors' names and shapes do.

    Raises:
        CheckpointError: neither does, or they are those of several.
    """
    stored = find_config(path)
    described = _described(read_config(stored)) if stored else None
    if described:
        return described
    with open_state_dict(path) as state:
        alike, tensors = recognise(state.shapes), f"{next(iter(state))[:64]!r} and {len(state) - 1} more"
    if len(alike) == 1:
        return alike[0]
    likeness = f"may be those of {' or '.join(alike)}" if alike else "are no known model's"
    raise CheckpointError(
        f"{path}: no config beside it says which model this is, and its tensors ({tensors}) {likeness}; give its name, "
        f"name= or on a command line --model.name or --model: one of {', '.join(list_models())}"
    )


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The models whose tensors have such names and shapes, of whatever size; of a whole and its parts, the whole."""
    alike = [model for model in _MODELS.values() if model.recognises(shapes)]
    parts = {part for model in alike for part in model.parts}
    return [model.name for model in alike if model.name not in parts]


def model_class(name: str) -> type[VideoAutoencoder]:
    """The class of a model, whose static methods need no model to be built.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _MODELS:
        raise ValueError(f"there is no model {name!r}; the models are {', '.join(list_models())}")
    return _MODELS[name]


def stored_config(pretrained: str | Path, name: str) -> dict:
    """The config that stands beside weights, or is part of them, in our keys; {} where none is.

    Raises:
        CheckpointError: it is another model's, or cannot be read.
    """
    model, path = model_class(name), find_config(pretrained)
    config = read_config(path) if path else {}
    described, why = _described(config), f"see {path}"
    if described is None:
        with open_state_dict(pretrained) as state:
            alike = recognise(state.shapes)
        described = name if name in alike or not alike else alike[0]
        why = f"its tensors are those of {described!r}"
    whole = _MODELS.get(described)
    config.pop("model", None)
    if whole is not None and name in whole.parts:
        config = whole.parts[name](merge_config(whole.default_config, whole.translate_config(config), whole.name))
    elif whole is not model:
        raise CheckpointError(f"{pretrained} holds another model than {name!r}: {why}")
    config = model.translate_config(config)
    if not model.keeps_config_in_weights:
        return config
    with open_state_dict(pretrained) as state:
        return config | model.config_in_weights(state)


def _described(config: dict) -> str | None:
    """The name of the model that a config is of, ours or an original's; None where it does not say."""
    said = config.get("model")
    if isinstance(said, str):
        return said
    return next((model.name for model in _MODELS.values() if model.is_original_config(config)), None)
