"""What can go wrong with weights, and the account of which names of a file a model used."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

_SHOWN = 3  # names that a one-line summary spells out


class CheckpointError(ValueError):
    """A weight file that cannot be read, or does not fit. `report` says which names, where that is the reason."""

    def __init__(self, message: str, report: "LoadReport | None" = None):
        super().__init__(message)
        self.report = report


@dataclass
class LoadReport:
    """Which names of a file a model used.

    Attributes:
        used: names taken.
        missing: names that the model wants and the file lacks.
        unexpected: names that the file holds and the model does not want.
        mismatched: (name, shape in the file, shape wanted).
        new: names that the file lacks because it is of an older architecture, which the model starts from; they keep
            the values that training starts with.
    """

    used: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """The model got every parameter that it wants; names left over do not matter."""
        return not self.missing and not self.mismatched

    def summary(self) -> str:
        """One line: the counts, and the first names of whatever is wrong."""
        shapes = [f"{name} {found}, wanted {wanted}" for name, found, wanted in self.mismatched]
        said = [
            f"{len(self.used)} used",
            f"{len(self.missing)} missing{_first(self.missing)}",
            f"{len(self.mismatched)} of another shape{_first(shapes)}",
            f"{len(self.unexpected)} left over{_first(self.unexpected)}",
        ]
        return ", ".join(said + ([f"{len(self.new)} new{_first(self.new)}"] if self.new else []))

    def details(self) -> str:
        """Every name on a line of its own, after the word for what became of it."""
        lines = [f"used {name}" for name in self.used]
        lines += [f"missing {name}" for name in self.missing]
        lines += [f"mismatched {name} {found} wanted {wanted}" for name, found, wanted in self.mismatched]
        lines += [f"left over {name}" for name in self.unexpected]
        lines += [f"new {name}" for name in self.new]
        return "\n".join(lines)


def compare_names(wanted: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]) -> LoadReport:
    """Compare the parameters that a model wants with those of a file, both as name -> shape."""
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
    """Give the values of `state` our names; those that have them already, and names not in the table, pass.

    Args:
        names: our name -> the original's.
    """
    ours = {original: name for name, original in names.items()}
    return {ours.get(name, name): value for name, value in state.items()}


def rename_back(state: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """Give the values of `state` the original's names, in the table's order; what is not in the table is left out.

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
