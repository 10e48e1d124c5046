"""A run's scalars and previews in Weights & Biases, https://docs.wandb.ai, through the optional package `wandb`.

Its environment variables apply: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and so on. Without an account, or if the
service cannot be reached, the run is stored in the output folder, and `wandb sync` uploads it later. Failures there
never end the training: the run continues without it.
"""

import importlib
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mg.checkpoints import atomic_write
from mg.plain_text import one_line

_logger = logging.getLogger(__name__)

# Settings that wandb reads once, unless the user has set them.
_DEFAULTS = {
    "WANDB_PROJECT": "mg",
    "WANDB_SILENT": "true",  # its output here mostly repeats our own log
    "WANDB_CONSOLE": "off",  # a copy of the terminal would be mostly progress bar
    "WANDB_INIT_TIMEOUT": "30",  # seconds to wait for a service that does not answer
    "WANDB_FINISH_TIMEOUT": "600",  # seconds for the last uploads; the rest stays on disk
}


class WandbRun:
    """A run in wandb. A resumed run continues the same one: its id is in the output folder.

    Args:
        folder: of the run's output; wandb's files go to `wandb/` in it.
        settings: the run's config, shown next to its curves.
        resume: continue the run in the folder, if there is one.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path, settings: dict, resume: bool):
        self.folder, self.settings, self.resume = folder, settings, resume
        self._wandb = _import()
        self._run: Any = None

    def begin(self) -> None:
        """Start or continue the run; offline if it cannot be online."""
        path = self.folder / "wandb" / "run_id.txt"
        run_id = path.read_text().strip() if self.resume and path.is_file() else secrets.token_hex(4)
        with atomic_write(path) as partial:
            partial.write_text(run_id + "\n")
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        name = os.environ.get("WANDB_NAME") or self.folder.resolve().name
        options = {"dir": str(self.folder), "id": run_id, "resume": "allow", "name": name, "config": self.settings}
        with _nobody_to_ask():
            self._tell(lambda: self._start(options))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Record update number `step`; one that was recorded before a kill may come again."""
        if self._run is not None:
            self._tell(lambda: self._run.log({"step": step, **scalars}))

    def add_image(self, step: int, name: str, path: Path) -> None:
        """Record a picture, made at update number `step`."""
        if self._run is not None:
            self._tell(lambda: self._run.log({"step": step, name: self._wandb.Image(str(path))}))

    def close(self, failed: bool = False) -> None:
        """End the run once everything is uploaded."""
        if self._run is not None:
            self._tell(lambda: self._run.finish(exit_code=int(failed)))
        self._run = None

    def _start(self, options: dict) -> None:
        reason = ""
        try:
            run = self._wandb.init(**options)
        except Exception as error:  # no account, no answer, an id deleted there, ...
            reason = f" ({one_line(error)[:200]})"
            self._wandb.teardown()  # which still holds the id
            run = self._wandb.init(**options, mode="offline")
        # Not wandb's own step count, which must grow: a killed run repeats its last updates.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run
        if run.offline:
            _logger.info(
                "wandb: offline%s; to upload the run: wandb sync %s", reason, self.folder / f"wandb/*-{run.id}"
            )
        elif run.url:
            _logger.info("wandb: %s", run.url)

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of any kind: the training matters more
            self._run = None
            _logger.warning("wandb failed, the run continues without it: %s", one_line(error)[:200])


def _import():
    try:
        wandb = importlib.import_module("wandb")
        missing = None if hasattr(wandb, "init") else "found a folder of that name"  # e.g. from another run
    except ImportError as error:
        missing = str(error)
    if missing:
        raise ValueError(
            f"--wandb needs the package wandb, which cannot be imported ({missing}): "
            "pip install wandb, or train without --wandb"
        )
    return wandb


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Make standard input empty: wandb would ask for an account on a terminal, and wait."""
    before = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before
