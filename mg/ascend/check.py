"""The check: a graph at a time, what is selected for it, and what is wrong with that.

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

# Of a table whose rows are findings.
TITLES = ("graph", "aclnn", "aclop", "host", "refused", "rules", "launches per parameter", "GB", "")
_SHOWN = 3  # faults of a graph that its row says
_ROOT = Path(__file__).parents[2]  # that the process which compiles is to import mg from
_RULES = {rule.__name__ for rule in rules.RULES}


@dataclass(frozen=True)
class Finding:
    """What was found of a graph.

    Attributes:
        parameters: how many an update moves; 0 for other graphs.
        faults: why the graph will not do, with how often.
        unlisted: kernels of the kind aclop that are no exceptions, by primitive.
        memory: bytes on the device at most, see `mg.ascend.liveness`; 0 where there is no graph.
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
        """Every fault, with how often where it is more than once, the most frequent first; then what is unlisted."""
        said = [f"{fault} ({times})" if times > 1 else fault for fault, times in self.faults.most_common()]
        unlisted = ", ".join(f"{primitive} {times}" for primitive, times in self.unlisted.most_common())
        return said + ([f"aclop: {unlisted}"] if unlisted else [])

    def row(self) -> str:
        """A row of a table in Markdown, under TITLES."""
        selected = [self.selection.count(kind).total() for kind in ("aclnn", "aclop", "host")]
        broken = sum(times for fault, times in self.faults.items() if fault.partition(":")[0] in _RULES)
        launches = f"{len(self.selection.kernels) / self.parameters:.1f}" if self.parameters else "-"
        memory = f"{self.memory / 1e9:.3f}" if self.memory else "-"
        lines = self.lines()
        if len(self.faults) > _SHOWN:
            lines[_SHOWN : len(self.faults)] = [f"{len(self.faults) - _SHOWN} more"]
        verdict = "; ".join(lines).replace("|", "/") or "ok"
        cells = [self.graph, *selected, int(self.selection.refused), broken, launches, memory, verdict]
        return f"| {' | '.join(map(str, cells))} |"


class Check:
    """Compiles graphs for an Ascend that is not there, each in a process of its own.

    Args:
        folder: for stand-ins, logs and saved graphs, which then stay there; by default one that goes at the end.

    Raises:
        ValueError: on entering, if this machine cannot do it, or the folder holds something.
    """

    def __init__(self, folder: Path | None = None):
        self._given = folder

    def __enter__(self) -> "Check":
        self._temporary = tempfile.TemporaryDirectory(prefix="mg_ascend_")
        self.folder = (self._given or Path(self._temporary.name)).absolute()
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty; graphs are kept in a folder of their own")
        self._home = stand_ins.make(self.folder)
        return self

    def __exit__(self, *exception) -> None:
        self._temporary.cleanup()

    def all(self, graphs: Sequence[Graph], jobs: int = 1) -> Iterator[Finding]:
        """Check graphs, so many at a time; findings come in their order."""
        with ThreadPoolExecutor(jobs) as threads:
            yield from threads.map(self.one, graphs)

    def one(self, graph: Graph) -> Finding:
        """Check a graph."""
        saved = self.folder / "graphs" / str(graph).replace("/", "-")
        saved.mkdir(parents=True)
        environment = stand_ins.environment(self._home) | kernels.LOGGING | {"MS_DEV_SAVE_GRAPHS_PATH": str(saved)}
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "mg.ascend.graphs", str(graph), str(self.folder)]
        with open(saved / "log", "w+b") as file:  # MindSpore leaves files where it runs
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
    """What is wrong with a graph that has these kernels, updates so many parameters and takes so many bytes."""
    faults = Counter(fault for kernel in selection.kernels for fault in rules.breaks(kernel))
    faults.update({f"on the host: {primitive}": times for primitive, times in selection.count("host").items()})
    if selection.failure:
        faults[selection.failure] += 1
    if len(selection.kernels) > rules.LAUNCHES_PER_PARAMETER * parameters > 0:
        faults[f"more than {rules.LAUNCHES_PER_PARAMETER} launches for each of {parameters} parameters"] += 1
    listed = rules.ACLOP_TRAINING if graph.trains else rules.ACLOP_INFERENCE
    aclop = selection.count("aclop").items()
    unlisted = Counter({primitive: times for primitive, times in aclop if primitive not in listed})
    return Finding(graph, selection, parameters, faults, unlisted, memory)
