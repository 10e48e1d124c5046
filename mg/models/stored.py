"""`StoredModel`: what every model, whatever it does, knows of its weights in files, ours and others'.

Names, shapes and configs of the originals; reading, writing and telling models apart; the end of its constructor. An
autoencoder and a denoiser have this in common, and nothing else.
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
    """Names in which a model's weights are written for others.

    Attributes:
        reader: who reads them.
        file: the weights' file in their folders.
        weights: our weights and config -> theirs.
        config: our config -> what stands beside them.
        exact: names of tensors that are settings, and stay fp32 where the weights are rounded.
    """

    reader: str
    file: str
    weights: Callable[[Mapping, dict], dict]
    config: Callable[[dict], dict]
    exact: tuple[str, ...] = ()


def described_here(name: str) -> Callable[[dict], dict]:
    """What stands beside weights in a format that has no config of its own: ours, so that they are read here."""
    return lambda config: {"model": name, **config}


class StoredModel(nn.Cell):
    """A model that is known by its name and can be stored.

    Attributes:
        name: by which it is known.
        default_config: every key of its config; the values are those of the released weights.
        config: every setting that the weights depend on.
        formats: what the weights can be written as for others, by name; the first is the original's.
        originals: the classes that the originals' configs name.
        parts: models that can be taken out of this one's weights, by name, each with what makes its config of this
            one's.
        settings: parameters that follow from the config: written for others, and not taken from what they wrote.
    """

    name: str
    default_config: dict
    config: dict
    formats: dict[str, Format] = {}
    originals: tuple[str, ...] = ()
    parts: dict[str, Callable[[dict], dict]] = {}
    settings: tuple[str, ...] = ()

    # What files of the original hold. All are functions of a config: nothing is built for a conversion.

    @staticmethod
    def is_original_config(config: dict) -> bool:
        """Whether a config without our `model` key is what the original writes for this model."""
        return False

    @staticmethod
    def translate_config(config: dict) -> dict:
        """This model's config from the original's, as it stands beside weights; one that is already ours passes."""
        return config

    @staticmethod
    def config_in_weights(state: Mapping) -> dict:
        """The keys of this model's config that the original keeps among its weights."""
        return {}

    @staticmethod
    def translate_weights(state: Mapping, config: dict) -> dict:
        """Rename the originals' parameters to this model's; names that are already ours, and others, pass."""
        return dict(state)

    @staticmethod
    def own_part(state: Mapping) -> dict:
        """What of a file may be this model's: without what lies beside it there."""
        return dict(state)

    @staticmethod
    def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter of a model of this config."""
        raise NotImplementedError

    @classmethod
    def original_config(cls, config: dict) -> dict:
        """The config that the original reads, from ours; ours, where the original has no file for it."""
        return next(iter(cls.formats.values())).config(config) if cls.formats else {"model": cls.name, **config}

    @classmethod
    def original_weights(cls, state: Mapping, config: dict) -> dict:
        """This model's parameters under the original's names, in the original's shapes."""
        return next(iter(cls.formats.values())).weights(state, config) if cls.formats else dict(state)

    @classmethod
    def recognises(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file with tensors of these names and shapes holds this model, of whatever size: it has all parts of
        the model (encoder, decoder, ...), and in them nothing but what is also in a model of the default config, under
        our names, the original's or those of another format. A model without `weight_shapes` is never recognised."""
        try:
            parts, known = _kinds(cls)  # type: ignore[arg-type]  # the __hash__ that mypy sees is an instance's
        except NotImplementedError:
            return False
        own = cls.own_part(naming.own_part(shapes, parts))
        found = {name: shape for name, shape in own.items() if _part(name) in parts}
        return _parts(found) == parts and all(naming.kind(*entry) in known for entry in found.items())

    def finish(self, dtype: str, use_recompute: bool, pretrained: str | Path | StateDict | None) -> None:
        """The end of a model's constructor: its layers' form, precision, recompute and weights, once all are there."""
        runtime.block_on_cpu()
        set_form(self)
        set_precision(self, dtype)
        if use_recompute:
            self.recompute_activations()
        if pretrained is not None:
            self.load_weights(pretrained)

    def recompute_activations(self) -> None:
        """Gradient checkpointing: keep the inputs of blocks for the backward pass, and compute the rest again there."""
        raise NotImplementedError

    # Weights.

    @classmethod
    def fit(cls, state: Mapping, config: dict, wanted: Mapping[str, tuple[int, ...]]) -> tuple[Mapping, LoadReport]:
        """The weights of a file in our names, and which of those that a model wants are there.

        Args:
            state: a file's, in our names, the original's or another format's, with whatever prefix.
            wanted: our name of every parameter -> its shape.

        Returns:
            Those that are wanted and found, of whatever shape; the report, what is left over being in the file's names.
        """
        own = naming.own_part(state, _parts(wanted))
        found = cls.translate_weights(own, config)
        report = compare_names(wanted, {name: tuple(value.shape) for name, value in found.items()})
        report.unexpected = [own.sources.get(name, name) for name in report.unexpected]
        inside = set(own.sources.values())
        report.unexpected += [name for name in state if name not in inside]
        return {name: found[name] for name in wanted if name in found}, report

    def load_weights(self, path: str | Path | StateDict, strict: bool = True) -> LoadReport:
        """Take the weights of a file or folder in any format that `mg.checkpoints` reads, ours or the original's.

        Args:
            strict: fail unless every parameter is found with its shape; names left over never matter.

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
                    "if its sizes differ, give its config (config.json, or a .json of the file's name beside it)",
                    report,
                )
            taken = naming.Renamed(found, {name: name for name in report.used if name not in self.settings})
            check_finite(str(path), taken)
            for name, array in taken.items():
                parameters[name].set_data(Tensor(array, parameters[name].dtype))
        _logger.info("%s: %s", path, report.summary())
        return report

    def save_pretrained(self, folder: str | Path, weights: dict | None = None) -> None:
        """Write config.json and model.safetensors; `weights` replace parameters of their name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder / "model.safetensors", folder / "config.json", weights)

    def save_weights(self, path: Path, config_path: Path | None = None, weights: dict | None = None) -> None:
        """Write the weights as one file, .ckpt or .safetensors, and the config beside it (by default X.json for X)."""
        arrays = {name: p.asnumpy() for name, p in self.named_weights()}
        write_state_dict(path, {**arrays, **(weights or {})})
        with atomic_write(config_path or path.with_suffix(".json")) as partial:
            partial.write_text(json.dumps({"model": self.name, **self.config}, indent=2) + "\n")

    def named_weights(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter, by its name within this model."""
        return self.parameters_and_names()


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    return name.partition(".")[0]


def _parts(names: Iterable[str]) -> set[str]:
    return {_part(name) for name in names}


@functools.cache
def _kinds(model: type[StoredModel]) -> tuple[set[str], set]:
    """The parts of a model, and the kinds of its parameters in our names and in those of each format."""
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
