"""Differentiable collectives: `AllGather` and `ReduceScatter`, over all workers or over groups.

HCCL and NCCL support both for any group. MindSpore's CPU backend only has AllGather and AllReduce, and only over all
workers: there each worker takes its part of the global result, which has the same values.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore import communication, mint, nn, ops

from mg import runtime


@dataclass(frozen=True)
class Group:
    """A group of workers with consecutive ranks.

    Attributes:
        rank, size: this worker's rank in the group, and the group's number of workers.
        first: global rank of the group's first worker.
        world_size: total number of workers.
    """

    rank: int = 0
    size: int = 1
    first: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, worker: runtime.Runtime, size: int | None = None) -> "Group":
        """The worker's group, if groups have `size` workers, a divisor of their number; by default one group."""
        size = size or worker.world_size
        return cls(worker.rank % size, size, worker.rank - worker.rank % size, worker.world_size)

    def name(self) -> str:
        """The group's name in the backend. All of its workers must call this at the same time."""
        if self.size == self.world_size:
            return communication.GlobalComm.WORLD_COMM_GROUP
        name = f"workers_{self.first}_{self.size}"
        if name not in _NAMED:
            communication.create_group(name, list(range(self.first, self.first + self.size)))
            _NAMED.add(name)
        return name


_NAMED: set[str] = set()  # MindSpore refuses to create a group twice


def _cut(x, begin, length):
    """Rows of x, as a product, not a view: gradients through some views are wrong in MindSpore 2.10's PyNative."""
    return mint.narrow(x, 0, begin, length) * 1.0


class _Gathered(nn.Cell):
    """(n, ...) on each worker -> (size * n, ...), concatenated"""

    def __init__(self, group: Group):
        super().__init__()
        self.first, self.size = group.first, group.size
        alone = runtime.device() == "cpu" and group.size < group.world_size
        self.collect = ops.AllGather() if alone else ops.AllGather(group=group.name())
        self.alone = alone

    def construct(self, x):
        whole = self.collect(x)
        return _cut(whole, self.first * x.shape[0], self.size * x.shape[0]) if self.alone else whole


class _Summed(nn.Cell):
    """(size * n, ...) on each worker -> (n, ...), this worker's part of the sum"""

    def __init__(self, group: Group):
        super().__init__()
        self.rank, self.size = group.rank, group.size
        on_cpu, all_workers = runtime.device() == "cpu", group.size == group.world_size
        self.scatter = None if on_cpu else ops.ReduceScatter(group=group.name())
        self.sum = ops.AllReduce() if on_cpu and all_workers else None
        self.gathered = _Gathered(group)

    def construct(self, x):
        if self.scatter is not None:
            return self.scatter(x)
        part = x.shape[0] // self.size
        if self.sum is not None:
            return _cut(self.sum(x), self.rank * part, part)
        total = self.gathered(x).reshape((self.size,) + x.shape).astype(ms.float32).sum(0)
        return _cut(total, self.rank * part, part).astype(x.dtype)


class AllGather(nn.Cell):
    """(n, ...) on each worker of a group -> (size * n, ...), concatenated, the same on each.

    The gradient of a worker's input is the sum of all workers' gradients for it.
    """

    def __init__(self, group: Group):
        super().__init__()
        self.gathered, self.summed = _Gathered(group), _Summed(group)

    def construct(self, x):
        return self.gathered(x)

    def bprop(self, x, out, dout):
        return (self.summed(dout),)


class ReduceScatter(nn.Cell):
    """(size * n, ...) on each worker of a group -> (n, ...), one part of the sum each, in rank order."""

    def __init__(self, group: Group):
        super().__init__()
        self.gathered, self.summed = _Gathered(group), _Summed(group)

    def construct(self, x):
        return self.summed(x)

    def bprop(self, x, out, dout):
        return (self.gathered(dout),)
