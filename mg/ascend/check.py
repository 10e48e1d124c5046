"""The check: for each graph, which kernels are selected and what is wrong with them.

with Check() as check:
    for finding in check.all(graphs(models=["tae"])):
        print(finding.row())
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mg.ascend import kernels, liveness, rules, stand_ins
from mg.ascend.graphs import TRAINED, Graph

# Columns of the table of findings.
TITLES = ("graph", "aclnn", "aclop", "hccl", "host", "refused", "rules", "launches per parameter", "GB", "")
_SHOWN = 3  # faults shown in a graph's row
_ROOT = Path(__file__).parents[2]  # where the compiling process imports mg from
_RULES = {rule.__name__ for rule in rules.RULES}


@dataclass(frozen=True)
class Finding:
    """The findings for a graph.

    Attributes:
        parameters: how many an update changes; 0 for other graphs.
        faults: what is wrong with the graph, with counts.
        unlisted: aclop kernels that are not listed as exceptions, by primitive.
        memory: peak bytes on the device, see `mg.ascend.liveness`; 0 if there is no graph.
    """

    graph: Graph
    selection: kernels.Selection
    parameters: int
    faults: Counter[str]
    unlisted: Counter[str]
    memory: int = 0

    @property
    def clean(self) -> bool:
        return not self.faults and not self.unlisted

    def lines(self) -> list[str]:
        """Every fault, with its count if above 1, the most frequent first; then the unlisted kernels."""
        said = [f"{fault} ({times})" if times > 1 else fault for fault, times in self.faults.most_common()]
        unlisted = ", ".join(f"{primitive} {times}" for primitive, times in self.unlisted.most_common())
        return said + ([f"aclop: {unlisted}"] if unlisted else [])

    def row(self) -> str:
        """A row of a Markdown table with the columns TITLES."""
        selected = [self.selection.count(kind).total() for kind in ("aclnn", "aclop", "hccl", "host")]
        broken = sum(times for fault, times in self.faults.items() if fault.partition(":")[0] in _RULES)
        launches = f"{self.selection.launches / self.parameters:.1f}" if self.parameters else "-"
        memory = f"{self.memory / 1e9:.3f}" if self.memory else "-"
        lines = self.lines()
        if len(self.faults) > _SHOWN:
            lines[_SHOWN : len(self.faults)] = [f"{len(self.faults) - _SHOWN} more"]
        verdict = "; ".join(lines).replace("|", "/") or "ok"
        cells = [self.graph, *selected, int(self.selection.refused), broken, launches, memory, verdict]
        return f"| {' | '.join(map(str, cells))} |"


class Check:
    """Compiles graphs for a simulated Ascend, each in its own process.

    Args:
        folder: for stand-ins, logs and saved graphs, which are kept; by default a temporary one.

    Raises:
        ValueError: on entering, if this machine cannot run the check or the folder is not empty.
    """

    def __init__(self, folder: Path | None = None):
        self._given = folder

    def __enter__(self) -> "Check":
        self._temporary = tempfile.TemporaryDirectory(prefix="mg_ascend_")
        self.folder = (self._given or Path(self._temporary.name)).absolute()
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty; give a new or empty folder for the graphs")
        self._home = stand_ins.make(self.folder)
        return self

    def __exit__(self, *exception) -> None:
        self._temporary.cleanup()

    def all(self, graphs: Sequence[Graph], jobs: int = 1) -> Iterator[Finding]:
        """Check graphs, `jobs` at a time; findings come in the same order."""
        with ThreadPoolExecutor(jobs) as threads:
            yield from threads.map(self.one, graphs)

    def one(self, graph: Graph) -> Finding:
        """Check a graph."""
        saved = self.folder / "graphs" / str(graph).replace("/", "-")
        saved.mkdir(parents=True)
        environment = stand_ins.environment(self._home, graph.workers)
        environment |= kernels.LOGGING | {"MS_DEV_SAVE_GRAPHS_PATH": str(saved)}
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), environment["PYTHONPATH"]])
        command = [sys.executable, "-m", "mg.ascend.graphs", str(graph), str(self.folder)]
        with open(saved / "log", "w+b") as file:  # MindSpore leaves files in the working directory
            subprocess.run(command, env=environment, cwd=saved, stdout=file, stderr=subprocess.STDOUT)
            file.seek(0)
            log = file.read().decode(errors="replace")
        selection = kernels.read(log, saved)
        memory = liveness.peak(kernels.saved_graphs(saved), selection)
        if self._given is None:  # the largest are 50 MB
            shutil.rmtree(saved)
        trained = re.search(rf"^{TRAINED}(\d+)$", log, re.MULTILINE)
        return judge(graph, selection, int(trained[1]) if trained else 0, memory)


def judge(graph: Graph, selection: kernels.Selection, parameters: int = 0, memory: int = 0) -> Finding:
    """Find what is wrong with a graph, given its kernels, the parameters it updates and the bytes it needs."""
    faults = Counter(fault for kernel in selection.kernels for fault in rules.breaks(kernel))
    faults.update({f"on the host: {primitive}": times for primitive, times in selection.count("host").items()})
    if selection.failure:
        faults[selection.failure] += 1
    if selection.launches > rules.LAUNCHES_PER_PARAMETER * parameters > 0:
        faults[f"more than {rules.LAUNCHES_PER_PARAMETER} launches for each of {parameters} parameters"] += 1
    listed = rules.ACLOP_TRAINING if graph.trains else rules.ACLOP_INFERENCE
    aclop = selection.count("aclop").items()
    unlisted = Counter({primitive: times for primitive, times in aclop if primitive not in listed})
    return Finding(graph, selection, parameters, faults, unlisted, memory)
