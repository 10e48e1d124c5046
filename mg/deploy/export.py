"""A model's networks as files that other engines run, in a folder:

    deploy.json            the model, its config and the SHA-256 of its checkpoint; tiles; files and shapes of networks
    encoder.onnx, decoder.onnx      or, for a two-stage model, spatial_encoder.onnx, temporal_encoder.onnx, ...

Each network accepts the shape of one tile. An .onnx file contains its weights; above 2 GB they are next to it, in
NAME.onnx.data. For a MindIR file above 1 GB they are in NAME_variables, next to NAME_graph.mindir.

An export is written to a hidden folder in its target, and replaces an earlier one when it is whole. deploy.json then
leaves first and comes last, so that a mixture of both is not mistaken for an export.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import mindspore as ms
import numpy as np
from mindspore import nn

from mg.checkpoints import atomic_write, naming, sync, where_from
from mg.checkpoints.digest import sha256
from mg.deploy.autoencoder import FORMAT, SETTINGS_FILE
from mg.deploy.networks import networks_of, tiling_of
from mg.models import VideoAutoencoder, from_pretrained
from mg.models.layers.forms import in_form

_HIDDEN = ".export-"  # how the names of folders begin in which exports are written

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ExportConfig:
    """Export a model's networks at the size of one tile.

    Args:
        ckpt_path: the checkpoint, file or folder, with its config next to it.
        model: which model the weights belong to, if neither the config nor their names tell.
        target: folder to write to.
        frames: of a tile; by default the model's own. 1 is for images.
        size: height and width of a tile in pixels; by default the model's own, or 256.
        encode_overlap, decode_overlap: frames that neighbouring tiles share.
        spatial_overlap: pixels that neighbouring tiles share, by default a quarter of a tile.
        format: onnx, for `mg.deploy.load`; mindir, for `mindspore.load`.
    """

    aliases: ClassVar[dict[str, str]] = {"ckpt-path": "ckpt_path", "from_pretrained": "ckpt_path"}

    ckpt_path: str
    target: str
    model: str | None = None
    frames: int | None = None
    size: int | None = None
    encode_overlap: int | None = None
    decode_overlap: int | None = None
    spatial_overlap: int | None = None
    format: Literal["onnx", "mindir"] = "onnx"


def export(config: ExportConfig) -> dict:
    """Write the folder that `config` describes; see `export_model`."""
    if not Path(config.ckpt_path).exists():
        raise FileNotFoundError(f"{config.ckpt_path}: no such checkpoint{where_from(config.ckpt_path)}")
    model = from_pretrained(config.ckpt_path, config.model)
    names = ("frames", "size", "encode_overlap", "decode_overlap", "spatial_overlap")
    tiles = {name: getattr(config, name) for name in names}
    return export_model(model, config.target, sha256(Path(config.ckpt_path)), config.format, **tiles)


def export_model(
    model: VideoAutoencoder,
    target: str | Path,
    checkpoint: str = "",
    format: str = "onnx",
    frames: int | None = None,
    size: int | None = None,
    encode_overlap: int | None = None,
    decode_overlap: int | None = None,
    spatial_overlap: int | None = None,
) -> dict:
    """Write the networks of a model in fp32.

    Args:
        target: a folder. It must contain nothing but an earlier export: deploy.json and the files that it names. They
            stay until the new export is whole.
        checkpoint: the SHA-256 of the weights.
        format: onnx | mindir.
        others: as in `ExportConfig`.

    Returns:
        The contents of deploy.json.

    Raises:
        ValueError: tiles don't fit the model, an operator has no converter, the folder contains other things, or onnx
            is not installed.
    """
    if format not in _WRITERS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(_WRITERS)}")
    if format == "onnx":
        _require_onnx()
    tiling, frames, size = tiling_of(model, frames, size, encode_overlap, decode_overlap, spatial_overlap)
    target = Path(target)
    described: dict[str, Any] = {
        "version": FORMAT,
        "format": format,
        "model": model.name,
        "config": dict(model.config),
        "sha256": checkpoint,
        "spatial_compression": model.spatial_compression,
        "temporal_compression": model.temporal_compression,
        "latent_channels": model.latent_channels,
        "lead": model.geometry.lead,
        "has_posterior": model.geometry.has_posterior,
        "keeps_images": model.geometry.keeps_images,
        "scaling": model.scaling,
        "frames": frames,
        "size": size,
        "tiling": asdict(tiling),
        "networks": {},
    }
    names = [(parameter, parameter.name) for parameter in model.get_parameters()]
    with _replacement(target) as folder:
        try:
            for name, (network, shape) in networks_of(model, frames, size).items():
                network.set_train(False)
                wanted = folder / f"{name}.{format}"
                with naming(target / wanted.name, wanted):
                    file, output = _WRITERS[format](network, shape, wanted)
                described["networks"][name] = {"file": file.name, "input": shape, "output": output}
                _logger.info("%s: %s -> %s", target / file.name, tuple(shape), tuple(output))
        finally:
            for parameter, before in names:  # a network around the model has prefixed them with its own name
                parameter.name = before
        settings = folder / SETTINGS_FILE
        with naming(target / SETTINGS_FILE, settings), atomic_write(settings) as partial:
            partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ValueError(f"format is 'onnx', which needs onnx ({error}): pip install onnx") from None


@contextmanager
def _replacement(target: Path) -> Iterator[Path]:
    """Yield a hidden folder in `target` for an export, which replaces an earlier one when the block succeeds."""
    target.mkdir(parents=True, exist_ok=True)
    _earlier(target)
    folder = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=target))
    settings = folder / SETTINGS_FILE
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(settings.stat().st_mode)  # MindSpore's are 0400
            with naming(target / path.relative_to(folder), path):
                sync(path)
        earlier = _earlier(target, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if (target / SETTINGS_FILE).exists():
        os.replace(target / SETTINGS_FILE, folder / "earlier.json")  # what is to be deleted, should this be killed
        earlier.remove(target / SETTINGS_FILE)
    for path in reversed(earlier):  # folders of killed exports last: they know which files are an export's
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.iterdir():
        if path.suffix != ".json":
            os.replace(path, target / path.name)
    sync(target)
    os.replace(settings, target / SETTINGS_FILE)
    sync(target)
    shutil.rmtree(folder, ignore_errors=True)


def _earlier(target: Path, folder: Path | None = None) -> list[Path]:
    """The files of an earlier export, and the hidden folders of killed ones other than `folder`.

    Raises:
        ValueError: there is anything else.
    """
    there = sorted(path for path in target.iterdir() if path != folder)
    killed = [path for path in there if path.name.startswith(_HIDDEN) and path.is_dir()]
    settings = [target / SETTINGS_FILE, *(path for each in killed for path in each.glob("*.json"))]
    known = set[str]().union(*map(_files, settings))
    others = [path.name for path in there if path.name not in known and path not in killed]
    if others:
        raise ValueError(
            f"--target {target}: contains something other than an export, {others[0]}; give an empty folder"
        )
    return there


def _files(settings: Path) -> set[str]:
    """The names of an export's files; none if `settings` is not a deploy.json of ours."""
    try:
        files = [made["file"] for made in json.loads(settings.read_text(encoding="utf-8"))["networks"].values()]
        weights = [f"{file}.data" for file in files] + [file.replace("_graph.mindir", "_variables") for file in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {SETTINGS_FILE, *files, *weights}


def _write_onnx(network: nn.Cell, shape: tuple[int, ...], file: Path) -> tuple[Path, tuple[int, ...]]:
    """Write a network as ONNX -> its file, and the shape of its output"""
    from mg.deploy.converters import convert
    from mg.deploy.mindir import read_graph
    from mg.deploy.onnx_graph import write_model

    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        with in_form(network, "export"):
            path = _export_mindir(network, shape, Path(folder) / "network")
        parameters = {parameter.name: parameter for parameter in network.get_parameters()}
        graph = read_graph(path, lambda name: parameters[name].asnumpy())
    model = convert(graph, "input", "output")
    write_model(model, file)
    return file, tuple(dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim)


def _write_mindir(network: nn.Cell, shape: tuple[int, ...], file: Path) -> tuple[Path, tuple[int, ...]]:
    """Write a network as MindIR -> its file, and the shape of its output"""
    from mg.deploy.mindir import output_shape

    file = _export_mindir(network, shape, file.with_suffix(""))
    return file, output_shape(file)


def _export_mindir(network: nn.Cell, shape: tuple[int, ...], path: Path) -> Path:
    """`mindspore.export` to `path`.mindir; above 1 GB MindSpore stores weights separately from `path`_graph.mindir."""
    ms.export(network, ms.Tensor(np.zeros(shape, np.float32)), file_name=str(path), file_format="MINDIR")
    whole = path.with_name(f"{path.name}.mindir")
    return whole if whole.exists() else path.with_name(f"{path.name}_graph.mindir")


_WRITERS = {"onnx": _write_onnx, "mindir": _write_mindir}
