"""The commands, one module each: parse options, call the library, print results. Nothing in mg imports them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg.config import exit_status
from mg.plain_text import printable

if TYPE_CHECKING:  # commands that need no MindSpore don't wait for it
    from mg.data.shards import EncodeReport
    from mg.runtime import Runtime


def end_of_encoding(report: "EncodeReport", noun: str, folder: str, worker: "Runtime") -> int:
    """Print what a rank encoded -> 0 if nothing failed, 1 if something did; see `exit_status`."""
    for name, error in report.failed:
        print(f"failed: {printable(name)}: {error}")
    part = f" (rank {worker.rank} has {report.mine} of {report.total})" if worker.world_size > 1 else ""
    print(
        f"{report.encoded} {noun} encoded, {report.there} were there, {len(report.failed)} failed{part}; see {folder}"
    )
    return exit_status(len(report.failed), report.mine - len(report.failed), worker.world_size)


def end_of_benchmark(benchmark: Any, figures: str) -> int:
    """Print a benchmark's figures and where its report is -> 0 if it is `complete`, 1 if not.

    Raises:
        OSError: the `unwritten` error, if a file could not be written; the figures are printed in any case.
    """
    print(figures)
    if benchmark.unwritten:
        raise benchmark.unwritten
    print(f"report: {benchmark.report}")
    return 0 if benchmark.complete else 1


def measured(config: Any, measure: Callable[[Any], dict], table: Callable[[dict], str]) -> int:
    """Measure, print the table and where the rest is -> 0 if everything that can be measured here was, 1 if something
    failed."""
    Path(config.output_path).mkdir(parents=True, exist_ok=True)  # where it can't be made, that shows before measuring
    found = measure(config)
    print(table(found))
    print(f"see {config.output_path}")
    return 1 if found["failed"] else 0
