"""What the workers of a run share besides their gradients."""

import hashlib
import json
from collections.abc import Iterable

from mg.data.loader import ClipLoader
from mg.runtime import Runtime


class WorkersError(ValueError):
    """Workers that cannot train together."""


def require_same(worker: Runtime, parts: dict[str, Iterable[bytes]]) -> None:
    """Check by hash that all workers have the same `parts`, which are keyed by their names for messages.

    Raises:
        WorkersError: on all workers, if one differs from the first.
    """
    if worker.world_size == 1:
        return
    digests = {}
    for name, chunks in parts.items():
        digest = hashlib.blake2b()
        for chunk in chunks:
            digest.update(chunk)
        digests[name] = digest.hexdigest()
    first, *others = map(json.loads, worker.gather(json.dumps(digests).encode()))
    for rank, other in enumerate(others, 1):
        different = " and ".join(name for name in parts if other[name] != first[name])
        if different:
            raise WorkersError(
                f"worker {rank} does not match worker 0: its {different} differ; give all workers the same command, "
                "the same files, and one shared output_path"
            )


def share_bad_files(worker: Runtime, loader: ClipLoader, known: set[str]) -> None:
    """Count the bad files found by other workers here too, so that all workers stop at the same batch.

    Args:
        known: files that were shared before; newly shared ones are added.
    """
    found = {name: reason for name, reason in loader.bad_files.items() if name not in known}
    for content in worker.gather(json.dumps(found).encode() if found else b""):
        for name, reason in json.loads(content or "{}").items():
            loader.bad_files.setdefault(name, reason)
    known |= loader.bad_files.keys()
