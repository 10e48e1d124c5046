"""What each worker does in tests/test_sharded_training.py, all of it in one group, since to start one takes a while.

    msrun --worker_num=2 --local_worker_num=2 ... tests/sharded_updates.py FOLDER

Under FOLDER rank_<r>.npz: parameters, averages and states of updates that workers make, the norms of their gradients,
and the bytes that a worker holds; by "<mode>/<optimizer>/<way>/<name>". Ways: whole states, shards, and either of them,
taken over by shards in the middle.
"""

import sys
from pathlib import Path

import mg  # noqa: F401  # isort: skip  # before MindSpore

import numpy as np
from mindspore import Parameter, Tensor

from mg import runtime
from mg.collectives import Group
from mg.training import flat
from mg.training.optim import OptimConfig
from mg.training.updater import Gather, Updater

SHAPES = {"conv.weight": (5, 3, 3, 3), "conv.bias": (5,), "norm.weight": (7,), "out.weight": (300, 401), "scale": (1,)}
UPDATES, MIDDLE = 4, 2
BROKEN = 1  # the update whose gradients are not finite, on one worker
OPTIMIZERS = {"graph": ["adamw"], "pynative": ["adamw", "lion", "adan", "nadam", "sgd", "momentum"]}


class Feed(Gather):
    """Gathers the gradients that it is given."""

    def construct(self, *gradients):
        self.gather(gradients)
        return gradients[0]


def draw(update: int, batch: int, rank: int) -> list[np.ndarray]:
    """Eighths, whose sums are exact in any order: at a gradient of about 0 Lion and Adam show every rounding."""
    rng = np.random.default_rng((update, batch, rank))
    gradients = [rng.integers(-16, 17, shape).astype(np.float32) / 8 for shape in SHAPES.values()]
    if (update, rank) == (BROKEN, 1):
        gradients[2][3] = np.inf
    return gradients


def make(optimizer: str, world_size: int = 1, sharers: Group | None = None) -> Updater:
    rng = np.random.default_rng(0)
    parameters = [Parameter(Tensor(rng.standard_normal(s, np.float32)), name=name) for name, s in SHAPES.items()]
    config = OptimConfig(name=optimizer, lr=0.01, weight_decay=0.1, clip_norm=3, loss_scale="dynamic")
    return Updater(parameters, config, UPDATES, "fp32", world_size, 0.9, sharers)


def take_over(updater: Updater, parameters: dict[str, np.ndarray], state: dict[str, np.ndarray]) -> Updater:
    """`updater`, with what another one has, as a checkpoint is loaded."""
    for parameter in updater.parameters:
        parameter.set_data(Tensor(parameters[parameter.name]))
    updater.load_state(state)
    return updater


def parameters_of(updater: Updater) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in updater.parameters}


def updates(updater: Updater, first: int, last: int, ranks: range) -> list[float]:
    """Those of two batches of each of these ranks; returns the norms of their gradients."""
    feed, norms = Feed(updater), []
    for update in range(first, last):
        scale = float(updater.loss_scale().asnumpy())
        for batch in range(2):
            for rank in ranks:
                feed(*(Tensor(g * np.float32(scale / 2 / len(ranks))) for g in draw(update, batch, rank)))
        norms.append(updater.update().grad_norm)
    return norms


def values(updater: Updater, prefix: str, norms: list[float]) -> dict[str, np.ndarray]:
    found = parameters_of(updater) | updater.state()
    found |= {"norms": np.array(norms), "held": np.array(updater.held())}
    return {f"{prefix}/{name}": value for name, value in found.items()}


def main(folder: Path) -> None:
    flat.MOST = 2  # several flat tensors
    found: dict[str, np.ndarray] = {}
    for mode, optimizers in OPTIMIZERS.items():
        worker = runtime.setup("cpu", mode)
        mine, workers, group = range(worker.rank, worker.rank + 1), worker.world_size, Group.of(worker)
        for optimizer in optimizers:
            for way, sharers in (("whole", None), ("zero2", group)):
                updater, name = make(optimizer, workers, sharers), f"{mode}/{optimizer}/{way}"
                norms = updates(updater, 0, MIDDLE, mine)
                middle = parameters_of(updater), {key: value.copy() for key, value in updater.state().items()}
                found |= {f"{name}/middle/{key}": value for part in middle for key, value in part.items()}
                found |= values(updater, name, norms + updates(updater, MIDDLE, UPDATES, mine))
                if mode == "pynative":
                    other = take_over(make(optimizer, workers, group), *middle)
                    found |= values(other, f"{name}_taken_over", norms + updates(other, MIDDLE, UPDATES, mine))
    np.savez(folder / f"rank_{worker.rank}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
