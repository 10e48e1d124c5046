"""`StoredModel`: what every model knows about its weights in files, ours and others'.

Names, shapes and configs of the originals; reading, writing and recognising models; the end of the constructor. This is
all that autoencoders and denoisers have in common.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.nn.utils import no_init_parameters

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
        config: our config -> the config next to them.
        rules: our config -> the rules that turn our names of parameters into theirs; None for files with our names.
        attention_axes: axes of the weights of spatial attention, which are 2 in linear layers, and 4 or 5 in 1x1
            convolutions; None for as many as here.
        tensors: our config -> tensors that hold part of it; they stay fp32 when the weights are rounded.
    """

    reader: str
    file: str
    config: Callable[[Mapping], dict]
    rules: Callable[[Mapping], Sequence[naming.Rule]] | None = None
    attention_axes: int | None = None
    tensors: Callable[[Mapping], dict[str, np.ndarray]] = lambda config: {}

    def names(self, names: Iterable[str], config: Mapping) -> dict[str, str]:
        """Our name of every parameter -> theirs."""
        rules = None if self.rules is None else self.rules(config)
        return {name: name if rules is None else naming.original_name(name, rules) for name in names}

    def weights(self, state: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
        """Our weights -> theirs."""
        found = self.tensors(config)
        for name, theirs in self.names(state, config).items():
            value = state[name]
            if self.attention_axes is not None and ".attn_1." in name and value.ndim > 1:
                value = value.reshape(value.shape[:2] + (1,) * (self.attention_axes - 2))
            found[theirs] = value
        return found


def described_here(name: str) -> Callable[[Mapping], dict]:
    """The config next to weights in a format without its own: ours, so that they can be read here."""
    return lambda config: {"model": name, **config}


class StoredModel(nn.Cell):
    """A model that has a name and can be stored.

    Attributes:
        name: the model's name.
        default_config: every config key, with the released weights' values; a `StoredConfig`, or a plain dict.
        config: every setting that the weights depend on.
        formats: formats in which the weights can be written for other software, by name; the first is the original's.
        originals: class names in the originals' configs.
        parts: models that can be extracted from this one's weights: name -> function that derives the part's config
            from this one's.
        shallow: overrides of the config for a model with all kinds of layers but fewer of each.
        spellings: rules for names that some files spell differently; applied to their names first.
        settings: parameters that follow from the config: written for other software, but not loaded from its files.
    """

    name: str
    default_config: Mapping[str, Any]
    config: Mapping[str, Any]
    formats: dict[str, Format] = {}
    originals: tuple[str, ...] = ()
    parts: dict[str, Callable[[Mapping], dict]] = {}
    shallow: dict[str, Any] = {}
    spellings: tuple[naming.Rule, ...] = ()
    settings: tuple[str, ...] = ()

    # The original's files.

    @staticmethod
    def is_original_config(config: Mapping) -> bool:
        """Whether a config without our `model` key is the original's for this model."""
        return False

    @staticmethod
    def translate_config(config: Mapping) -> dict:
        """This model's config from the original's, as stored next to weights; one that is already ours is kept."""
        return dict(config)

    @staticmethod
    def config_in_weights(state: Mapping) -> dict:
        """The keys of this model's config that the original stores in its weights."""
        return {}

    @classmethod
    def our_names(cls, names: Iterable[str], config: Mapping, shapes: Iterable[str]) -> dict[str, str]:
        """A file's names of parameters -> ours, `shapes`; our own names, and unknown ones, are kept."""
        ours = {naming.torch_name(name): name for name in shapes}
        for format in cls.formats.values():
            ours |= {
                naming.renamed(theirs, cls.spellings): name for name, theirs in format.names(shapes, config).items()
            }
        ours |= {name: name for name in shapes}
        return {name: ours.get(naming.renamed(name, cls.spellings), name) for name in names}

    @classmethod
    def translate_weights(
        cls, state: Mapping, config: Mapping, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict:
        """Rename the originals' parameters to this model's, and give them its shapes: a linear layer may be stored as a
        1x1 convolution. Tensors that hold part of the config are left out; unknown names are kept.

        Args:
            shapes: the model's, see `weight_shapes`; by default those of the config.
        """
        shapes = cls.weight_shapes(config) if shapes is None else shapes
        left_out = {name for format in cls.formats.values() for name in format.tensors(config)}
        found = {}
        for source, name in cls.our_names(state, config, shapes).items():
            if source not in left_out:
                value, shape = state[source], tuple(shapes.get(name, ()))
                found[name] = value.reshape(shape) if _alike(tuple(value.shape), shape) else value
        return found

    @classmethod
    def own_part(cls, state: Mapping) -> dict:
        """The part of a file that may be this model's, without the other contents."""
        return {naming.renamed(name, cls.spellings): value for name, value in state.items()}

    @classmethod
    def weight_shapes(cls, config: Mapping) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter of a model with this config.

        Raises:
            ValueError: a config that cannot be built.
        """
        with no_init_parameters():  # so that they use no memory
            return {name: tuple(p.shape) for name, p in cls(config).named_weights()}

    @classmethod
    def original_config(cls, config: Mapping) -> dict:
        """The config that the original reads, from ours; ours if the original has no config file."""
        return next(iter(cls.formats.values())).config(config) if cls.formats else {"model": cls.name, **config}

    @classmethod
    def original_weights(cls, state: Mapping, config: Mapping) -> dict:
        """This model's parameters under the original's names, in the original's shapes."""
        return next(iter(cls.formats.values())).weights(state, config) if cls.formats else dict(state)

    @classmethod
    def recognises(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file with tensors of these names and shapes holds this model, at any size: it has all parts of the
        model (encoder, decoder, ...), and in them only what a model with the default config also has, under our names,
        the original's or another format's."""
        parts, known = _kinds(cls)  # type: ignore[arg-type]  # mypy sees an instance's __hash__
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
    def fit(cls, state: Mapping, config: Mapping, wanted: Mapping[str, tuple[int, ...]]) -> tuple[Mapping, LoadReport]:
        """Match the weights of a file with the parameters of a model.

        Args:
            state: a file's weights, in our names, the original's or another format's, with any prefix.
            wanted: our name of every parameter -> its shape.

        Returns:
            The wanted weights that were found, under our names and of any shape; a report, with unused weights under
            the file's names.
        """
        own = naming.own_part(state, _parts(wanted))
        found = cls.translate_weights(own, config, wanted)
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


def _alike(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the shapes of two weights differ only in trailing axes of length 1."""
    short, long = sorted((shape, other), key=len)
    return 2 <= len(short) < len(long) and long == short + (1,) * (len(long) - len(short))


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to."""
    return name.partition(".")[0]


def _parts(names: Iterable[str]) -> set[str]:
    return {_part(name) for name in names}


@functools.cache
def _kinds(model: type[StoredModel]) -> tuple[set[str], set]:
    """The parts of a model, and the kinds of its parameters under our names and those of each format."""
    config = {**model.default_config, **model.shallow}
    ours = model.weight_shapes(config)
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in ours.items()}  # takes no memory
    states = [empty, *(format.weights(empty, config) for format in model.formats.values())]
    known = {
        naming.kind(name, array.shape)
        for state in states
        for name, array in model.own_part(naming.own_part(state, _parts(ours))).items()
    }
    return _parts(ours), known
