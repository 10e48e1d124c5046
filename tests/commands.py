"""Scripts and tools run in the tests' own process."""

import runpy
import sys
from pathlib import Path

import pytest

from mg.runtime import Runtime

ROOT = Path(__file__).parents[1]


def run_here(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """The exit code of a command, by its path in the repository; MindSpore lets the device be chosen only once."""
    monkeypatch.setattr("mg.runtime.setup", lambda *_: Runtime("cpu"))
    monkeypatch.setattr(sys, "argv", [Path(script).name, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stopped.value.code
