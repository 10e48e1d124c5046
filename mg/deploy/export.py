"""A model's networks as files that other engines run, in a folder:

    deploy.json            the model, its config and the SHA-256 of its checkpoint; tiles; files and shapes of networks
    encoder.onnx, decoder.onnx      or, for a two-stage model, spatial_encoder.onnx, temporal_encoder.onnx, ...

Each network accepts the shape of one tile. deploy.json is deleted first and written last, so that a half-written folder
is not mistaken for an export. An .onnx file contains its weights; above 2 GB they are next to it, in NAME.onnx.data.
For a MindIR file above 1 GB they are in NAME_variables, next to NAME_graph.mindir.
"""

import json
import logging
import shutil
import tempfile
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
        target: a folder; it must contain nothing but an earlier export.
        checkpoint: the SHA-256 of the weights.
        format: onnx | mindir.
        others: as in `ExportConfig`.

    Returns:
        The contents of deploy.json.

    Raises:
        ValueError: tiles don't fit the model, an operator has no converter, or the folder contains other things.
    """
    if format not in _WRITERS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(_WRITERS)}")
    tiling, frames, size = tiling_of(model, frames, size, encode_overlap, decode_overlap, spatial_overlap)
    target = Path(target)
    _clear(target)
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
    try:
        for name, (network, shape) in networks_of(model, frames, size).items():
            network.set_train(False)
            wanted = target / f"{name}.{format}"
            with naming(wanted):
                file, output = _WRITERS[format](network, shape, wanted)
                sync(file)
            described["networks"][name] = {"file": file.name, "input": shape, "output": output}
            _logger.info("%s: %s -> %s", file, tuple(shape), tuple(output))
    finally:
        for parameter, before in names:  # a network around the model has prefixed them with its own name
            parameter.name = before
    with atomic_write(target / SETTINGS_FILE) as partial:
        partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


def _clear(target: Path) -> None:
    """Prepare the folder: delete an earlier export, deploy.json first."""
    target.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in target.iterdir())
    suffixes = (".onnx", ".onnx.data", ".mindir", "_variables")
    others = [name for name in there if name != SETTINGS_FILE and not name.endswith(suffixes)]
    if others:
        raise ValueError(
            f"--target {target}: contains something other than an export, {others[0]}; give an empty folder"
        )
    (target / SETTINGS_FILE).unlink(missing_ok=True)
    for name in there:
        if name.endswith("_variables"):
            shutil.rmtree(target / name)
        else:
            (target / name).unlink(missing_ok=True)


def _write_onnx(network: nn.Cell, shape: tuple[int, ...], file: Path) -> tuple[Path, tuple[int, ...]]:
    """Write a network as ONNX -> its file, and the shape of its output"""
    from mg.deploy.converters import convert
    from mg.deploy.mindir import read_graph
    from mg.deploy.onnx_graph import write_model

    with tempfile.TemporaryDirectory(prefix=".export-", dir=file.parent) as folder:
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
