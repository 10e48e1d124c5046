"""`StoredModel`: what every model knows about its weights in files, ours and others'.

Names, shapes and configs of the originals; reading, writing and recognising models; the end of the constructor. This is
all that autoencoders and denoisers have in common.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn

from mg import runtime
from mg.checkpoints import (
    CheckpointError,
    LoadReport,
    StateDict,
    atomic_write,
    check_finite,
    compare_names,
    open_state_dict,
    write_state_dict,
)
from mg.models import naming
from mg.models.layers.forms import set_form
from mg.models.layers.precision import set_precision

_logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """A format in which a model's weights are written for other software.

    Attributes:
        reader: who reads it.
        file: name of the weights file in their folders.
        weights: our weights and config -> theirs.
        config: our config -> the config next to them.
        exact: names of tensors that are settings, and stay fp32 when the weights are rounded.
    """

    reader: str
    file: str
    weights: Callable[[Mapping, dict], dict]
    config: Callable[[dict], dict]
    exact: tuple[str, ...] = ()


def described_here(name: str) -> Callable[[dict], dict]:
    """The config next to weights in a format without its own: ours, so that they can be read here."""
    return lambda config: {"model": name, **config}


class StoredModel(nn.Cell):
    """A model that has a name and can be stored.

    Attributes:
        name: the model's name.
        default_config: every config key, with the released weights' values.
        config: every setting that the weights depend on.
        formats: formats in which the weights can be written for other software, by name; the first is the original's.
        originals: class names in the originals' configs.
        parts: models that can be extracted from this one's weights: name -> function that derives the part's config
            from this one's.
        settings: parameters that follow from the config: written for other software, but not loaded from its files.
    """

    name: str
    default_config: dict
    config: dict
    formats: dict[str, Format] = {}
    originals: tuple[str, ...] = ()
    parts: dict[str, Callable[[dict], dict]] = {}
    settings: tuple[str, ...] = ()

    # The original's files. These are all functions of a config, so that a conversion builds no model.

    @staticmethod
    def is_original_config(config: dict) -> bool:
        """Whether a config without our `model` key is the original's for this model."""
        return False

    @staticmethod
    def translate_config(config: dict) -> dict:
        """This model's config from the original's, as stored next to weights; one that is already ours is kept."""
        return config

    @staticmethod
    def config_in_weights(state: Mapping) -> dict:
        """The keys of this model's config that the original stores in its weights."""
        return {}

    @staticmethod
    def translate_weights(state: Mapping, config: dict) -> dict:
        """Rename the originals' parameters to this model's; our own names, and unknown ones, are kept."""
        return dict(state)

    @staticmethod
    def own_part(state: Mapping) -> dict:
        """The part of a file that may be this model's, without the other contents."""
        return dict(state)

    @staticmethod
    def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter of a model with this config."""
        raise NotImplementedError

    @classmethod
    def original_config(cls, config: dict) -> dict:
        """The config that the original reads, from ours; ours if the original has no config file."""
        return next(iter(cls.formats.values())).config(config) if cls.formats else {"model": cls.name, **config}

    @classmethod
    def original_weights(cls, state: Mapping, config: dict) -> dict:
        """This model's parameters under the original's names, in the original's shapes."""
        return next(iter(cls.formats.values())).weights(state, config) if cls.formats else dict(state)

    @classmethod
    def recognises(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file with tensors of these names and shapes holds this model, at any size: it has all parts of the
        model (encoder, decoder, ...), and in them only what a model with the default config also has, under our names,
        the original's or another format's. A model without `weight_shapes` is never recognised."""
        try:
            parts, known = _kinds(cls)  # type: ignore[arg-type]  # mypy sees an instance's __hash__
        except NotImplementedError:
            return False
        own = cls.own_part(naming.own_part(shapes, parts))
        found = {name: shape for name, shape in own.items() if _part(name) in parts}
        return _parts(found) == parts and all(naming.kind(*entry) in known for entry in found.items())

    def finish(self, dtype: str, use_recompute: bool, pretrained: str | Path | StateDict | None) -> None:
        """The end of a model's constructor, once all layers exist: form, precision, gradient checkpointing, weights."""
        runtime.block_on_cpu()
        set_form(self)
        set_precision(self, dtype)
        if use_recompute:
            self.recompute_activations()
        if pretrained is not None:
            self.load_weights(pretrained)

    def recompute_activations(self) -> None:
        """Gradient checkpointing: keep only the inputs of blocks, and compute the rest again in the backward pass."""
        raise NotImplementedError

    # Weights.

    @classmethod
    def fit(cls, state: Mapping, config: dict, wanted: Mapping[str, tuple[int, ...]]) -> tuple[Mapping, LoadReport]:
        """Match the weights of a file with the parameters of a model.

        Args:
            state: a file's weights, in our names, the original's or another format's, with any prefix.
            wanted: our name of every parameter -> its shape.

        Returns:
            The wanted weights that were found, under our names and of any shape; a report, with unused weights under
            the file's names.
        """
        own = naming.own_part(state, _parts(wanted))
        found = cls.translate_weights(own, config)
        report = compare_names(wanted, {name: tuple(value.shape) for name, value in found.items()})
        report.unexpected = [own.sources.get(name, name) for name in report.unexpected]
        inside = set(own.sources.values())
        report.unexpected += [name for name in state if name not in inside]
        return {name: found[name] for name in wanted if name in found}, report

    def load_weights(self, path: str | Path | StateDict, strict: bool = True) -> LoadReport:
        """Load weights from a file or folder in any format that `mg.checkpoints` reads, ours or the original's.

        Args:
            strict: fail unless every parameter is found with its shape; unused names are always ignored.

        Raises:
            CheckpointError: an unreadable file, or names and shapes that are not this model's.
        """
        parameters = dict(self.named_weights())
        with open_state_dict(path) as state:
            wanted = {name: tuple(p.shape) for name, p in parameters.items()}
            found, report = self.fit(state, self.config, wanted)
            if strict and not report.complete:
                raise CheckpointError(
                    f"{path} does not fit this {self.name}: {report.summary()}; "
                    "if its sizes differ, give its config (config.json, or a .json of the same name next to the file)",
                    report,
                )
            taken = naming.Renamed(found, {name: name for name in report.used if name not in self.settings})
            check_finite(str(path), taken)
            for name, array in taken.items():
                parameters[name].set_data(Tensor(array, parameters[name].dtype))
        _logger.info("%s: %s", path, report.summary())
        return report

    def save_pretrained(self, folder: str | Path, weights: dict | None = None) -> None:
        """Write config.json and model.safetensors; `weights` replace the parameters of the same names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder / "model.safetensors", folder / "config.json", weights)

    def save_weights(self, path: Path, config_path: Path | None = None, weights: dict | None = None) -> None:
        """Write the weights to one .ckpt or .safetensors file, and the config next to it (by default X.json for X)."""
        arrays = {name: p.asnumpy() for name, p in self.named_weights()}
        write_state_dict(path, {**arrays, **(weights or {})})
        with atomic_write(config_path or path.with_suffix(".json")) as partial:
            partial.write_text(json.dumps({"model": self.name, **self.config}, indent=2) + "\n")

    def named_weights(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter with its name within this model."""
        return self.parameters_and_names()


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    return name.partition(".")[0]


def _parts(names: Iterable[str]) -> set[str]:
    return {_part(name) for name in names}


@functools.cache
def _kinds(model: type[StoredModel]) -> tuple[set[str], set]:
    """The parts of a model, and the kinds of its parameters under our names and those of each format."""
    ours = model.weight_shapes(model.default_config)
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in ours.items()}  # takes no memory
    writers = [model.original_weights, *(format.weights for format in model.formats.values())]
    states = [empty, *(weights(empty, model.default_config) for weights in writers)]
    known = {
        naming.kind(name, array.shape)
        for state in states
        for name, array in naming.own_part(state, _parts(ours)).items()
    }
    return _parts(ours), known
