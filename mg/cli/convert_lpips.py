"""Make the LPIPS weight file from torchvision's classifier and the `lpips` package's linear layers.

    mg-convert-lpips --backbone vgg16-397923af.pth --linear lpips/weights/v0.1/vgg.pth \
        --net vgg --target models/lpips_vgg.safetensors

Neither torch nor torchvision is needed. Without --linear, the file inside an installed `lpips` package is taken.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mg.checkpoints import write_state_dict
from mg.config import parse_config, run_command_line
from mg.losses.lpips import convert_lpips_weights


@dataclass
class ConvertLPIPSConfig:
    """Files to join.

    Args:
        backbone: torchvision's vgg16-397923af.pth, or alexnet-owt-7be5be79.pth for alex.
        target: file to write, .safetensors or .ckpt.
        net: trunk of the two files.
        linear: lpips/weights/v0.1/<net>.pth of the lpips package; by default that of the installed package.
    """

    backbone: Path
    target: Path
    net: Literal["vgg", "alex"] = "vgg"
    linear: Path | None = None


def main() -> None:
    config = parse_config(ConvertLPIPSConfig, "Make the LPIPS weight file from torchvision's and the lpips package's.")
    linear = config.linear or find_installed_linear(config.net)
    tensors, reports = convert_lpips_weights(config.backbone, linear, config.net)
    write_state_dict(config.target, tensors)

    for path, report in reports.items():
        left_over = len(report.unexpected)
        # torchvision's fully connected layers, which LPIPS does without, are counted but not listed.
        report.unexpected = [name for name in report.unexpected if not name.startswith("classifier.")]
        print(f"{path}: {report.summary()}; {left_over - len(report.unexpected)} classifier.* not needed")
        print(report.details())
    print(f"wrote {config.target}")


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
