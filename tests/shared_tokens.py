"""What each worker does in tests/test_shared_tokens.py.

    msrun --worker_num=2 --local_worker_num=2 ... tests/shared_tokens.py FOLDER
    msrun --worker_num=4 --local_worker_num=4 ... tests/shared_tokens.py FOLDER --outputs ...

Under FOLDER rank_<r>.npz: of the first, outputs and gradients of networks whose tokens are on one worker, and shared,
by "<case>/<mode>/<alone or shared>/<name>"; of the second, which trains too, what groups of workers gather and sum.
"""

import sys
from pathlib import Path

import mg  # noqa: F401  # isort: skip  # before MindSpore

import mindspore as ms
import numpy as np
from denoisers import array, inputs, original
from mindspore import Tensor, nn

from mg import runtime
from mg.collectives import AllGather, Group, ReduceScatter
from mg.config import parse_config
from mg.generation.training.config import DenoiserTrainConfig
from mg.training.trainer import train

CASES = [
    ("stdit", "pynative"),
    ("stdit2", "pynative"),
    ("stdit3", "pynative"),
    ("stdit2", "graph"),
    ("stdit3", "graph"),
]


class Loss(nn.Cell):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def construct(self, weights, x, t, y, mask, x_mask, *sizes):
        out = self.network.construct(x, t, y, mask, x_mask, *sizes)
        return (out * weights).sum(), out


def outputs_and_gradients(network, case: str) -> dict[str, np.ndarray]:
    """Those of a loss that every pixel has another weight in, with captions of several lengths and frames given."""
    given = inputs(case, "mask", "x_mask")
    x, t, y, mask, x_mask = (given.pop(name) for name in ("x", "t", "y", "mask", "x_mask"))
    sizes = [network._of_samples(given[name], len(x), name, ms.float32) for name in network.extra_inputs]
    y, mask = network._caption(y, mask, len(x))
    weights = Tensor(np.random.default_rng(0).standard_normal(array(case, "out").shape, np.float32))
    gradient = ms.value_and_grad(Loss(network), 1, network.trainable_params(), has_aux=True)
    (_, out), (of_x, of_parameters) = gradient(
        weights, x, t.astype(ms.float32), y, mask, x_mask.astype(ms.bool_), *sizes
    )
    names = [p.name.removeprefix("network.") for p in network.trainable_params()]
    return {"out": out.asnumpy()} | {
        name: value.asnumpy() for name, value in zip(["x", *names], [of_x, *of_parameters], strict=True)
    }


def given_by(rank: int, size: int) -> np.ndarray:
    """What a worker gives to a group of that many."""
    return np.arange(2 * size, dtype=np.float32).reshape(size, 2) + 100 * rank


def exchange(worker: runtime.Runtime, size: int) -> dict[str, np.ndarray]:
    """What a group of that many workers gathers and sums, and the gradients of the sum of the squares of either."""
    found, x = {}, Tensor(given_by(worker.rank, size))
    for name, layer in (("gathered", AllGather), ("summed", ReduceScatter)):
        layer = layer(Group.of(worker, size))
        gradient = ms.grad(lambda x, layer=layer: (layer(x) ** 2).sum())(x)
        found |= {f"{name}_{size}": layer(x).asnumpy(), f"{name}_{size}_gradient": gradient.asnumpy()}
    return found


def networks() -> dict[str, np.ndarray]:
    found = {}
    for case, mode in CASES:
        worker = runtime.setup("cpu", mode)
        mean = runtime.WorkerMean(worker.world_size)
        for way in ("alone", "shared"):
            network = original(case, norm_given_twice=True) if mode == "pynative" else original(case)
            if mode == "graph" and case == "stdit3":
                network.recompute_activations()
            if way == "shared":
                network.share_tokens(Group.of(worker))
            values = outputs_and_gradients(network, case)
            if way == "shared":
                values = {name: v if name == "out" else mean(Tensor(v)).asnumpy() for name, v in values.items()}
            found |= {f"{case}/{mode}/{way}/{name}": value for name, value in values.items()}
    return found


def main(folder: Path, options: list[str]) -> None:
    worker = runtime.setup("cpu", "pynative")
    if options:
        found = exchange(worker, 2) | exchange(worker, 4)
        train(parse_config(DenoiserTrainConfig, "", options))
    else:
        found = networks()
    np.savez(folder / f"rank_{worker.rank}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
