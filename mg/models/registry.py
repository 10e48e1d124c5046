"""The known models, and which of them a weights file holds: by the config next to it, else by its tensors."""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from mg.checkpoints import CheckpointError, StateDict, open_state_dict, read_config
from mg.models.config import StoredConfig

if TYPE_CHECKING:
    from mg.models.autoencoder import VideoAutoencoder
    from mg.models.stored import StoredModel

Model = TypeVar("Model", bound="StoredModel")
Config = TypeVar("Config", bound=Mapping[str, Any])


def merge_config(defaults: Config, given: Mapping, name: str) -> Config:
    """`defaults`, a `StoredConfig` or a dict, overridden by `given`.

    Raises:
        ValueError: an unknown key, with the nearest one, or a config that cannot be built.
    """
    check_keys(defaults, given, name)
    if isinstance(defaults, StoredConfig):
        try:
            return replace(defaults, **given)  # type: ignore[type-var]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return cast(Config, {**defaults, **given})


def check_keys(defaults: Mapping, given: Mapping, name: str) -> None:
    """Raise ValueError, suggesting the nearest key, if `given` has one that `defaults` hasn't."""
    for key in given:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(defaults)}"
            raise ValueError(f"{name} has no config key {key!r}; {hint}")


class Registry(Generic[Model]):
    """Models of one kind, by name.

    Args:
        others: registries whose models are included too, even those added later.
    """

    def __init__(self, *others: "Registry[Any]"):
        self._own: dict[str, type[Model]] = {}
        self._others = others

    @property
    def _models(self) -> dict[str, type[Model]]:
        """All models, in the order they were added."""
        models = dict(self._own)
        for other in self._others:
            models |= other._models
        return models

    def add(self, model: type[Model]) -> type[Model]:
        """Register a model under its `name`.

        Raises:
            ValueError: it has no `name` or `default_config`, or the name is taken.
        """
        for attribute, kind in (("name", str), ("default_config", Mapping)):
            if not isinstance(getattr(model, attribute, None), kind):
                raise ValueError(f"{model.__name__} cannot be registered; its class must have a {attribute}")
        if self._own.setdefault(model.name, model) is not model:
            raise ValueError(f"{model.__name__} cannot be registered; a model {model.name!r} already exists")
        return model

    def names(self) -> list[str]:
        """The names of the models here, sorted, then those of each other registry."""
        return sorted(self._own) + [name for other in self._others for name in other.names()]

    def model_class(self, name: str) -> type[Model]:
        """The class of a model; its static methods work without building one.

        Raises:
            ValueError: an unknown name.
        """
        if name not in self._models:
            raise ValueError(f"there is no model {name!r}; the models are {', '.join(self.names())}")
        return self._models[name]

    def model_name(self, path: str | os.PathLike | StateDict) -> str:
        """The name of the model whose weights are at `path`, from the config next to them, else from their tensors'
        names and shapes.

        Raises:
            CheckpointError: the model cannot be determined, is ambiguous, or is not one of these.
        """
        with open_state_dict(path) as state:
            described = self._described(state)
            if described:
                return described
            alike, tensors = self.recognise(state.shapes), f"{next(iter(state))[:64]!r} and {len(state) - 1} more"
        if len(alike) == 1:
            return alike[0]
        likeness = f"match {' or '.join(sorted(alike))}" if alike else "match no known model"
        raise CheckpointError(
            f"{path}: no config next to it says which model this is, and its tensors ({tensors}) {likeness}; give its "
            f"name, name= or on a command line --model.name or --model: one of {', '.join(self.names())}"
        )

    def recognise(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The models whose tensors have such names and shapes, at any size; a model's parts are left out if it is
        recognised itself."""
        alike = [model for model in self._models.values() if model.recognises(shapes)]
        parts = {part for model in alike for part in model.parts}
        return [model.name for model in alike if model.name not in parts]

    def stored_config(self, pretrained: str | os.PathLike | StateDict, model: str | type[Model]) -> dict:
        """The config stored next to weights or inside them, with our keys; {} if there is none.

        Args:
            model: the model that it should describe, by name or class.

        Raises:
            CheckpointError: it describes another model, or cannot be read.
        """
        model = self.model_class(model) if isinstance(model, str) else model
        with open_state_dict(pretrained) as state:
            described, why = self._described(state, model), f"see {state.config_file}"
            if described is None:
                alike = self.recognise(state.shapes)
                described = model.name if model.name in alike or not alike else alike[0]
                why = f"its tensors are those of {described!r}"
            whole = self._models.get(described)
            if described != model.name and (whole is None or model.name not in whole.parts):
                raise CheckpointError(f"{pretrained} holds a model other than {model.name!r}: {why}")
            config = read_config(state.config_file) if state.config_file else {}
            config.pop("model", None)
            try:
                if whole is not None and model.name in whole.parts:
                    config = whole.parts[model.name](
                        merge_config(whole.default_config, whole.translate_config(config), whole.name)
                    )
                config = model.translate_config(config)
                check_keys(model.default_config, config, model.name)
            except ValueError as error:
                raise CheckpointError(f"{state.config_file or pretrained}: {error}") from error
            return config | model.config_in_weights(state)

    def create(
        self,
        name: str,
        pretrained: str | Path | StateDict | None,
        config: dict,
        dtype: str = "fp32",
        use_recompute: bool = False,
    ) -> Model:
        """Build a model.

        Args:
            pretrained: file or folder to load weights from. A config stored next to them becomes the default.
            config: overrides of the model's config.
            dtype, use_recompute: as in the models' constructors.

        Raises:
            ValueError: an unknown name or config key.
            CheckpointError: weights that cannot be read or do not fit.
        """
        build: Callable[..., Model] = self.model_class(name)
        if pretrained is None:
            return build(config, pretrained=None, dtype=dtype, use_recompute=use_recompute)
        with open_state_dict(pretrained) as state:
            stored = self.stored_config(state, name)
            try:
                return build({**stored, **config}, pretrained=state, dtype=dtype, use_recompute=use_recompute)
            except (TypeError, ValueError) as error:
                if config or not stored or isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{state.config_file}: cannot build {name} from it: {error}") from error

    def _described(self, state: StateDict, model: type[Model] | None = None) -> str | None:
        """The name of the model that the config next to weights describes, in our format or an original's; None if it
        doesn't say.

        Args:
            model: a model to accept although it is not registered.

        Raises:
            CheckpointError: it describes an unknown model.
        """
        if state.config_file is None:
            return None
        config = read_config(state.config_file)
        said = config.get("model")
        if isinstance(said, str):
            if said not in self._models and (model is None or said != model.name):
                raise CheckpointError(f"{state.config_file}: there is no model {said!r}; {self._what_is_read()}")
            return said
        named = next((model.name for model in self._models.values() if model.is_original_config(config)), None)
        architectures = config.get("architectures")
        classes = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
        stranger = next((name for name in [*classes, config.get("model_type")] if isinstance(name, str)), None)
        if named is None and stranger is not None:
            raise CheckpointError(
                f"{state.config_file}: describes {'an' if stranger[:1] in 'AEIOU' else 'a'} {stranger[:64]}, "
                f"which isn't one of the models here; {self._what_is_read()}"
            )
        return named

    def _what_is_read(self) -> str:
        """All models, with the class names that the originals' configs use."""
        models = [(name, self._models[name]) for name in self.names()]
        names = [f"{name} ({', '.join(model.originals)})" if model.originals else name for name, model in models]
        return f"the models are {', '.join(names)}"


AUTOENCODERS: "Registry[VideoAutoencoder]" = Registry()  # filled by `mg.models`
