"""The models by name.

    create_model("tae")                                    # Movie Gen TAE, untrained
    create_model("tae", pretrained="tae.ckpt", ch=64)      # keywords override the config
    from_pretrained("outputs/tae/checkpoints/step_000100") # config and weights from a folder or file

All of them share the interface of `mg.models.autoencoder`. Register your own to use it by name, in configs too:

    @register_model
    class MyAutoencoder(VideoAutoencoder):
        name = "my_autoencoder"
        default_config = {"z_channels": 16}
        ...
"""

from pathlib import Path
from typing import TypeVar

from mg.checkpoints import StateDict, open_state_dict
from mg.models.autoencoder import VideoAutoencoder
from mg.models.dc_ae.dc_ae import VideoDCAE
from mg.models.hunyuan_vae.hunyuan_vae import HunyuanVAE
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.registry import AUTOENCODERS
from mg.models.tae.tae import TemporalAutoencoder
from mg.models.temporal_vae.temporal_vae import OpenSoraVAE

__all__ = [
    "AUTOENCODERS",
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

list_models, model_class, model_name = AUTOENCODERS.names, AUTOENCODERS.model_class, AUTOENCODERS.model_name
recognise, stored_config = AUTOENCODERS.recognise, AUTOENCODERS.stored_config


def register_model(model: Model) -> Model:
    """Decorator that registers a model under its `name`.

    Raises:
        ValueError: it isn't a VideoAutoencoder, has no `name` or `default_config`, or the name is taken.
    """
    if not (isinstance(model, type) and issubclass(model, VideoAutoencoder)):
        raise ValueError(f"{model!r} cannot be registered; a model is a subclass of mg.models.VideoAutoencoder")
    AUTOENCODERS.add(model)
    return model


for _model in (TemporalAutoencoder, VideoDCAE, OpenSoraVAE, HunyuanVAE, ImageAutoencoder):
    register_model(_model)


def create_model(
    name: str,
    pretrained: str | Path | StateDict | None = None,
    dtype: str = "fp32",
    use_recompute: bool = False,
    **config,
) -> VideoAutoencoder:
    """Build a model; its default config is that of the released checkpoint.

    Args:
        pretrained: file or folder to load weights from. A config stored next to them becomes the default.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and matrix products.
        use_recompute: use gradient checkpointing.
        config: overrides of the model's config.

    Raises:
        ValueError: an unknown name or config key.
        CheckpointError: weights that cannot be read or do not fit.
    """
    return AUTOENCODERS.create(name, pretrained, config, dtype, use_recompute)


def from_pretrained(path: str | Path, name: str | None = None, dtype: str = "fp32", **config) -> VideoAutoencoder:
    """Build a model from the weights at `path`, a file or folder; `model_name` recognises which model it is.

    Args:
        name: the model's name; required if nothing else identifies it.
        config: overrides of the config stored next to the weights.

    Raises:
        CheckpointError: weights that cannot be read, belong to no known model, or do not fit.
    """
    with open_state_dict(path) as state:
        return create_model(name or model_name(state), state, dtype, **config)
