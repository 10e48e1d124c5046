"""Errors about weights, and the report of which of a file's names a model used."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

_SHOWN = 3  # names that a one-line summary spells out


class CheckpointError(ValueError):
    """A weight file that cannot be read or doesn't fit the model. In the latter case `report` may list the names."""

    def __init__(self, message: str, report: "LoadReport | None" = None):
        super().__init__(message)
        self.report = report


@dataclass
class LoadReport:
    """Which of a file's names a model used.

    Attributes:
        used: names that were loaded.
        missing: names that the model needs and the file lacks.
        unexpected: names that the file has and the model doesn't need.
        mismatched: (name, shape in the file, shape wanted).
        new: names that the file lacks because it has an older architecture that the model starts from; they keep their
            initial values.
    """

    used: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the model got every parameter that it needs; names left over don't matter."""
        return not self.missing and not self.mismatched

    def summary(self) -> str:
        """One line: the counts, and the first names of each kind of problem."""
        shapes = [f"{name} {found}, wanted {wanted}" for name, found, wanted in self.mismatched]
        said = [
            f"{len(self.used)} used",
            f"{len(self.missing)} missing{_first(self.missing)}",
            f"{len(self.mismatched)} of another shape{_first(shapes)}",
            f"{len(self.unexpected)} left over{_first(self.unexpected)}",
        ]
        return ", ".join(said + ([f"{len(self.new)} new{_first(self.new)}"] if self.new else []))

    def details(self) -> str:
        """One line per name, starting with what happened to it."""
        lines = [f"used {name}" for name in self.used]
        lines += [f"missing {name}" for name in self.missing]
        lines += [f"mismatched {name} {found} wanted {wanted}" for name, found, wanted in self.mismatched]
        lines += [f"left over {name}" for name in self.unexpected]
        lines += [f"new {name}" for name in self.new]
        return "\n".join(lines)


def compare_names(wanted: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]) -> LoadReport:
    """Compare the parameters that a model needs with those of a file, both as name -> shape."""
    report = LoadReport(unexpected=[name for name in found if name not in wanted])
    for name, shape in wanted.items():
        shape = tuple(shape)
        if name not in found:
            report.missing.append(name)
        elif tuple(found[name]) != shape:
            report.mismatched.append((name, tuple(found[name]), shape))
        else:
            report.used.append(name)
    return report


def rename(state: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """Rename the values of `state` to our names; names that are already ours or not in the table stay.

    Args:
        names: our name -> the original's.
    """
    ours = {original: name for name, original in names.items()}
    return {ours.get(name, name): value for name, value in state.items()}


def rename_back(state: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """Rename the values of `state` to the original's names, in the table's order; names not in the table are dropped.

    Args:
        names: our name -> the original's.

    Raises:
        CheckpointError: a name of the table is missing.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"{len(missing)} parameters are missing{_first(missing)}")
    return {original: state[name] for name, original in names.items()}


def _first(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})"
