"""The data of a run, recorded with its state, and how they differ when it is resumed.

The order of the rows decides what every update sees: with other rows, a resumed run is not the run that was started.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence

from mg.data.index import IndexRow

_SHOWN = 3  # names of each kind in a message


def note_rows(rows: Iterable[IndexRow]) -> list[list[str]]:
    """Each row's name, and a checksum of everything the index has about it."""
    noted = []
    for row in rows:
        said = json.dumps([row.name, row.caption, row.num_frames, row.height, row.width, row.fps])
        noted.append([row.name, hashlib.blake2b(said.encode(), digest_size=8).hexdigest()])
    return noted


def describe_changes(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str:
    """How noted rows differ, in words: how many are gone, new or edited, and whether the others are in another order;
    "" if they do not differ."""
    old, new = Counter(name for name, _ in before), Counter(name for name, _ in now)
    gone, added, kept = old - new, new - old, old & new
    unlike = Counter(map(tuple, before)) - Counter(map(tuple, now))
    edited = Counter(name for name, _ in unlike.elements()) - gone
    kinds = [(gone, "gone"), (added, "new"), (edited, "edited")]
    changes = [f"{_count(names)} {what} ({_some(names)})" for names, what in kinds if names]
    if _common(before, kept) != _common(now, kept) or (not changes and before != now):
        changes.append(f"{'the others' if changes else 'the rows are'} in another order")
    return ", ".join(changes)


def _common(rows: Sequence[Sequence[str]], kept: Counter) -> list[str]:
    """The names of the rows that are in both, in their order."""
    left, names = Counter(kept), []
    for name, _ in rows:
        if left[name]:
            left[name] -= 1
            names.append(name)
    return names


def _count(names: Counter) -> str:
    total = names.total()
    return f"{total} {'row' if total == 1 else 'rows'}"


def _some(names: Counter) -> str:
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + ", ..." * (len(names) > _SHOWN)
