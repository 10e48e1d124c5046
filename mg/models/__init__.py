"""The models by name.

    create_model("tae")                                    # Movie Gen TAE, untrained
    create_model("tae", pretrained="tae.ckpt", ch=64)      # keywords override the config
    from_pretrained("outputs/tae/checkpoints/step_000100") # config and weights from a folder or file

All of them share the interface of `mg.models.autoencoder`.
"""

from pathlib import Path

from mg.checkpoints import CheckpointError, find_config, open_state_dict, read_config
from mg.models.autoencoder import VideoAutoencoder, merge_config
from mg.models.dc_ae.dc_ae import VideoDCAE
from mg.models.hunyuan_vae.hunyuan_vae import HunyuanVAE
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.tae.tae import TemporalAutoencoder
from mg.models.temporal_vae.temporal_vae import OpenSoraVAE

_MODELS = {model.name: model for model in (TemporalAutoencoder, VideoDCAE, OpenSoraVAE, HunyuanVAE, ImageAutoencoder)}


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
    """Build the model whose weights lie at `path`, a file or folder; `name` says which where its config does not."""
    stored = find_config(path)
    return create_model(name or (stored and _described(read_config(stored))) or "tae", path, dtype, **config)


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
    whole = _MODELS.get(_described(config) or name)
    config.pop("model", None)
    if whole is not None and name in whole.parts:
        config = whole.parts[name](merge_config(whole.default_config, whole.translate_config(config), whole.name))
    elif whole is not model:
        raise CheckpointError(f"{pretrained} holds another model than {name!r}: see {path}")
    config = model.translate_config(config)
    if not model.keeps_config_in_weights:
        return config
    with open_state_dict(pretrained) as state:
        return config | model.config_in_weights(state)


def _described(config: dict) -> str | None:
    """The name of the model that a config is of, ours or an original's; None where it does not say."""
    originals = (model.name for model in _MODELS.values() if model.is_original_config(config))
    return config.get("model") or next(originals, None)
