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
    """Make a model known by its `name`; a decorator.

    Raises:
        ValueError: it is no VideoAutoencoder, has no `name` or `default_config`, or another has its name.
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
        pretrained: file or folder to take the weights from. The config that stands beside them is the default then.
        dtype: fp32 | fp16 | bf16, the precision of convolutions and products.
        use_recompute: recompute activations in the backward pass in place of keeping them.
        config: overrides of the model's config.

    Raises:
        ValueError: an unknown name or config key.
        CheckpointError: weights that cannot be read or do not fit.
    """
    return AUTOENCODERS.create(name, pretrained, config, dtype, use_recompute)


def from_pretrained(path: str | Path, name: str | None = None, dtype: str = "fp32", **config) -> VideoAutoencoder:
    """Build the model whose weights lie at `path`, a file or folder; which one is as `model_name` says.

    Args:
        name: says it too, and must where nothing else does.
        config: overrides of the config that stands beside the weights.

    Raises:
        CheckpointError: weights that cannot be read, are no model's, or do not fit.
    """
    with open_state_dict(path) as state:
        return create_model(name or model_name(state), state, dtype, **config)
