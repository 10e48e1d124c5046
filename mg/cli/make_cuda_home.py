"""Build the CUDA_HOME that MindSpore's CUDA plugin looks for from NVIDIA's wheels on PyPI: no toolkit, no root.

    mg-make-cuda-home --target ~/cuda-11.8
    export CUDA_HOME=~/cuda-11.8 LD_LIBRARY_PATH=~/cuda-11.8/lib64:$LD_LIBRARY_PATH
    mg-check-device --device gpu

The machine must have the driver (libcuda.so.1); all else comes from the wheels, 1.7 GB to download and 2.8 GB unpacked:
cuBLAS, cuDNN 8, cuFFT, cuRAND, cuSOLVER, cuSPARSE, NVRTC and the runtime of CUDA 11.8, for x86-64 Linux. MindSpore
runs $CUDA_HOME/bin/nvcc only to get its version before it loads the plugin. No wheel has nvcc, so here that file is a
script that prints the version of the runtime next to it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mg.config import parse_config, run_command_line

PACKAGES = {  # with the library that the plugin links to
    "nvidia-cublas-cu11": "libcublas.so.11",
    "nvidia-cuda-nvrtc-cu11": "libnvrtc.so.11.2",
    "nvidia-cuda-runtime-cu11": "libcudart.so.11.0",
    "nvidia-cudnn-cu11<9": "libcudnn.so.8",
    "nvidia-cufft-cu11": "libcufft.so.10",
    "nvidia-curand-cu11": "libcurand.so.10",
    "nvidia-cusolver-cu11": "libcusolver.so.11",
    "nvidia-cusparse-cu11": "libcusparse.so.11",
}
DRIVER = "libcuda.so.1"
NVCC = """#!/bin/sh
# Stands in for nvcc, which NVIDIA's wheels lack, and compiles nothing: MindSpore only asks it for its version, and
# reads that from the first line if this is on the PATH.
echo "Cuda compilation tools, release {release}, V{version}"
"""


@dataclass
class Options:
    """What to build.

    Args:
        target: folder to make; it must not exist yet.
        wheels: folder with NVIDIA's wheels; by default pip downloads them.
    """

    target: Path
    wheels: Path | None = None


def main() -> None:
    options = parse_config(Options, __doc__.splitlines()[0])
    target = options.target.absolute()
    if target.exists():
        raise ValueError(f"--target {target} exists already; remove it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        wheels = options.wheels or download(Path(work) / "wheels")
        home = make_home(wheels, Path(work) / "home")
        missing = missing_libraries(home / "lib64")
        if missing:
            raise ValueError(f"MindSpore's CUDA plugin needs {', '.join(missing)} too, which none of the wheels has")
        os.rename(home, target)
    print(f"{target}: all libraries that MindSpore's CUDA plugin needs but the driver's own, {DRIVER}. Before a run:")
    print(f"    export CUDA_HOME={target} LD_LIBRARY_PATH={target}/lib64:$LD_LIBRARY_PATH")


def download(folder: Path) -> Path:
    """Download NVIDIA's wheels from the package index that pip is configured with."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    if subprocess.run([*command, *PACKAGES]).returncode:
        raise ValueError("pip could not download NVIDIA's wheels; fetch them elsewhere and name their folder: --wheels")
    return folder


def make_home(wheels: Path, home: Path) -> Path:
    """Unpack the libraries of a folder of wheels to `home`/lib64 and write `home`/bin/nvcc.

    Raises:
        ValueError: a wheel is missing, damaged, or not the version that the plugin needs.
    """
    (home / "lib64").mkdir(parents=True)
    (home / "bin").mkdir()
    for package, library in PACKAGES.items():
        unpack(find_wheel(wheels, package), home / "lib64")
        if not (home / "lib64" / library).exists():
            raise ValueError(f"{find_wheel(wheels, package)} has no {library}, to which MindSpore's plugin is linked")
    version = find_wheel(wheels, "nvidia-cuda-runtime-cu11").name.split("-")[1]
    # MindSpore's own check finds the runtime by its full version, and reports that it was not built with 11.8.
    (home / "lib64" / f"libcudart.so.{version}").symlink_to("libcudart.so.11.0")
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(version=version, release=".".join(version.split(".")[:2])))
    nvcc.chmod(0o755)
    return home


def find_wheel(wheels: Path, package: str) -> Path:
    name = package.split("<")[0].replace("-", "_")
    found = sorted(wheels.glob(f"{name}-*.whl"))
    if len(found) != 1:
        raise ValueError(f"{wheels}: holds {len(found) or 'no'} wheels of {package}; one is needed")
    return found[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Extract the shared libraries of a wheel to `folder`, without their paths."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                name = Path(info.filename).name
                if re.search(r"\.so(\.\d+)*$", name):
                    with archive.open(info) as source, open(folder / name, "wb") as file:
                        shutil.copyfileobj(source, file, 2**20)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel}: not a wheel, or cut short ({error})") from error


def missing_libraries(folder: Path) -> list[str]:
    """The direct and indirect dependencies of the plugin that the linker does not find with `folder` in
    LD_LIBRARY_PATH, except the driver's library. Without MindSpore, only those of the libraries in `folder`."""
    mindspore = find_spec("mindspore")
    found = mindspore and mindspore.origin
    plugins = Path(found).parent.glob("lib/plugin/libmindspore_gpu.so.11.6") if found else []
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    missing = set()
    for binary in [*plugins, *folder.glob("*.so*")]:
        listed = subprocess.run(["ldd", str(binary)], env=environment, capture_output=True, text=True).stdout
        missing |= set(re.findall(r"(\S+) => not found", listed))
    return sorted(missing - {DRIVER})


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
