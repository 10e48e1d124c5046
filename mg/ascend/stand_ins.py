"""Empty stand-ins for CANN's libraries, so that MindSpore's Ascend plugin can be loaded without them.

The plugin is linked to CANN's libraries and looks up more of their functions when it starts. One library has all of
these as functions that do nothing, and libraries with CANN's names link to it.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

# The release whose log and saved graphs `mg.ascend.kernels` can read.
MINDSPORE = "2.10.0"
# The libraries that the plugin is linked to or opens, without "lib" and ".so".
_LIBRARIES = (
    "acl_op_compiler acl_tdt_channel acl_tdt_queue ascend_hal ascendcl c_sec ge_runner graph hccl msprofiler nnopbase "
    "opapi platform profapi runtime"
)
_ALL = "libstand_ins.so"
# Functions that report success by 0; others, including constructors, return their argument.
_SUCCESS = re.compile("acl|Acl|PTA|Can|Init|UnInit|Release|Set|rt|Hccl|hal|Msprof")
_STATUS = "_ZN2ge13StatusFactory8InstanceEv"  # needs a real definition
_WRITTEN_OUT = """
#include <map>
#include <string>
namespace ge {
struct StatusFactory {
  std::map<unsigned, std::string> texts;
  static StatusFactory *Instance();
};
StatusFactory *StatusFactory::Instance() {
  static StatusFactory factory;
  return &factory;
}
}
"""


# CANN's Python package for collectives, of which MindSpore only reads the version.
_HCCL = """
class sys_version:
    __sys_version__ = "8.1.0"
"""


def missing() -> str | None:
    """What the check needs but this machine lacks, in one line; None if nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it only runs on x86-64 Linux, and this is {platform.system()} on {platform.machine()}"
    try:
        found = version("mindspore")
    except PackageNotFoundError:
        found = "none"
    if found != MINDSPORE:
        return f"it reads the log of MindSpore {MINDSPORE}, and this is {found}"
    for tool, package in (("g++", "g++"), ("nm", "binutils")):
        if shutil.which(tool) is None:
            return f"it needs {tool}; on Debian and Ubuntu: apt install {package}"
    return None


def make(folder: Path) -> Path:
    """Build the stand-ins.

    Args:
        folder: where they go, into a subfolder with the name that the plugin looks for.

    Returns:
        The stand-in for CANN's own folder, for `environment`.

    Raises:
        ValueError: this machine cannot build or use them.
    """
    lacking = missing()
    if lacking is not None:
        raise ValueError(f"the static check for Ascend cannot run here: {lacking}")
    home = folder / "cann"
    libraries = home / "lib64"
    libraries.mkdir(parents=True)
    (home / "opp").mkdir()
    (home / "python").mkdir()
    (home / "python" / "hccl.py").write_text(_HCCL)
    functions, source = libraries / "functions.c", libraries / "written_out.cc"
    functions.write_text("".join(_definition(number, symbol) for number, symbol in enumerate(_wanted())))
    source.write_text(_WRITTEN_OUT)
    old_strings = "-D_GLIBCXX_USE_CXX11_ABI=0"  # MindSpore is compiled for the older layout of std::string
    _compile(["-x", "c", functions, "-x", "c++", old_strings, source], libraries / _ALL)
    empty = libraries / "empty.c"
    empty.touch()
    for name in _LIBRARIES.split():
        _compile(["-x", "c", empty, "-Wl,--no-as-needed", f"-L{libraries}", f"-l:{_ALL}"], libraries / f"lib{name}.so")
    return home


def environment(home: Path, workers: int = 1) -> dict[str, str]:
    """Environment variables for a process to load the stand-ins instead of CANN, and simulate a device.

    Args:
        workers: simulated processes, of which this is the first.
    """
    plugin = _plugin()
    shared = plugin / "ascend" / "ms_kernels_symmetric_memory" / "shmem"
    paths = [home / "lib64", plugin / "ascend", shared / "memfabric_hybrid" / "lib", shared / "shmem" / "lib"]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, paths)),
        "LD_PRELOAD": str(home / "lib64" / _ALL),
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        "PYTHONPATH": os.pathsep.join([str(home / "python"), os.environ.get("PYTHONPATH", "")]),
        "MS_SIMULATION_LEVEL": "1",
        "RANK_SIZE": str(workers),
        "RANK_ID": "0",
    }


def _plugin() -> Path:
    spec = find_spec("mindspore")
    assert spec is not None and spec.origin is not None  # checked by `missing`
    return Path(spec.origin).parent / "lib" / "plugin"


def _wanted() -> list[str]:
    """Every symbol that the stand-ins must define."""
    plugin = _plugin()
    linked = [
        plugin.parent / "libmindspore_ge_backend.so",
        plugin / "libmindspore_ops_ascend.so",
        plugin / "libmindspore_ascend.so.2",
        plugin / "ascend" / "libmindspore_ascend_res_manager.so",
        plugin / "ascend" / "libmindspore_graph_ir.so",
        plugin / "ascend" / "libd_collective.so",
        *(plugin / "ascend" / "ms_kernels_symmetric_memory").rglob("*.so"),
    ]
    asked = set().union(*(_symbols(library, "--undefined-only") for library in linked))
    there = set().union(*(_symbols(library, "--defined-only") for library in [*linked, *plugin.parent.glob("*.so*")]))
    opened = Path(__file__).with_name("symbols.txt").read_text().split()  # looked up at startup, not linked
    process = [ctypes.CDLL(None), ctypes.CDLL("libstdc++.so.6")]  # Python's own and the system's
    wanted = asked - there - {_STATUS} | set(opened)
    return sorted(symbol for symbol in wanted if not any(hasattr(library, symbol) for library in process))


def _symbols(library: Path, which: str) -> set[str]:
    """The symbols of a library, except versioned ones, which are the system's."""
    listing = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {row[-1] for row in rows if row[-2] not in "wv" and "@" not in row[-1]}


def _definition(number: int, symbol: str) -> str:
    """C code for a symbol that does nothing."""
    if symbol.startswith(("_ZTV", "_ZTI", "_ZTS", "_ZTT")):  # C++'s tables of a class
        return f'char object{number}[512] __asm__("{symbol}") __attribute__((aligned(16))) = {{0}};\n'
    value = "0" if _SUCCESS.match(symbol) else "self"
    return f'long f{number}(long self) __asm__("{symbol}");\nlong f{number}(long self) {{ return {value}; }}\n'


@cache
def _compiler() -> str:
    return shutil.which("g++") or "g++"


def _compile(sources: list, library: Path) -> None:
    options = ["-shared", "-fPIC", "-o", library, f"-Wl,-soname,{library.name}"]
    made = subprocess.run([_compiler(), *map(str, [*options, *sources])], capture_output=True, text=True)
    if made.returncode:
        said = made.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"g++ could not build the stand-ins for CANN: {said[-1]}")
