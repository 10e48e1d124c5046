"""Tensors from worker to worker, with gradients: `AllGather` and `ReduceScatter`, over all workers or over groups.

HCCL and NCCL have both for any group. MindSpore's backend for CPUs has AllGather and AllReduce, and these over all
workers alone: there each worker takes its part of what all have, which are the same values.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore import communication, mint, nn, ops

from mg import runtime


@dataclass(frozen=True)
class Group:
    """Workers of neighbouring ranks.

    Attributes:
        rank, size: this worker's place in the group, and how many workers are in it.
        first: rank of the group's first worker among all.
        world_size: how many workers there are.
    """

    rank: int = 0
    size: int = 1
    first: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, worker: runtime.Runtime, size: int | None = None) -> "Group":
        """That of a worker, among groups of `size`, which divides the number of workers; by default all are one."""
        size = size or worker.world_size
        return cls(worker.rank % size, size, worker.rank - worker.rank % size, worker.world_size)

    def name(self) -> str:
        """What the backend knows it by. All of its workers must ask for it at the same time."""
        if self.size == self.world_size:
            return communication.GlobalComm.WORLD_COMM_GROUP
        name = f"workers_{self.first}_{self.size}"
        if name not in _NAMED:
            communication.create_group(name, list(range(self.first, self.first + self.size)))
            _NAMED.add(name)
        return name


_NAMED: set[str] = set()  # MindSpore refuses to make a group twice


def _cut(x, begin, length):
    """Rows of x; a product, and no view: PyNative in MindSpore 2.10 gets gradients wrong that come from some views."""
    return mint.narrow(x, 0, begin, length) * 1.0


class _Gathered(nn.Cell):
    """(n, ...) of each worker -> (size * n, ...), one behind the other"""

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
    """(size * n, ...) of each worker -> (n, ...), this worker's part of their sum"""

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
    """(n, ...) of each worker of a group -> (size * n, ...), one behind the other, the same on each.

    The gradient of what a worker gives is the sum of those that all of them have for it.
    """

    def __init__(self, group: Group):
        super().__init__()
        self.gathered, self.summed = _Gathered(group), _Summed(group)

    def construct(self, x):
        return self.gathered(x)

    def bprop(self, x, out, dout):
        return (self.summed(dout),)


class ReduceScatter(nn.Cell):
    """(size * n, ...) of each worker of a group -> (n, ...), a part of their sum each, in the order of their ranks."""

    def __init__(self, group: Group):
        super().__init__()
        self.gathered, self.summed = _Gathered(group), _Summed(group)

    def construct(self, x):
        return self.summed(x)

    def bprop(self, x, out, dout):
        return (self.gathered(dout),)
