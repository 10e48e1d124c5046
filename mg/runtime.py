"""The only module that touches MindSpore's context: device, mode, seed, ranks, and a device's actual precision."""

import ctypes
import gc
import importlib
import logging
import os
import random
import re
import signal
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn, ops

from mg.launcher import end_with_msrun, process_name
from mg.memory import available_memory, forget_peak_rss, peak_rss, release_freed

_logger = logging.getLogger(__name__)

T = TypeVar("T")

DEVICES = {"ascend": "Ascend", "gpu": "GPU", "cpu": "CPU"}
MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}  # and auto, see `setup`
_ASCEND_DRIVER = "/dev/davinci_manager"
PRECISIONS = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """What `setup` found: the device's lower-case name, and this process's rank among the workers.

    Attributes:
        sp_size: number of workers with consecutive ranks that share the tokens of the same clips (sequence
            parallelism), and so count as one for data.
    """

    device: str
    rank: int = 0
    world_size: int = 1
    sp_size: int = 1

    @property
    def dp_rank(self) -> int:
        """This worker's rank for data; workers that share tokens have the same one."""
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        """How many data ranks there are."""
        return self.world_size // self.sp_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, content: bytes) -> list[bytes]:
        """Every worker's content, of any length, in rank order; all must call it at the same time."""
        if self.world_size == 1:
            return [content]
        collect = ops.AllGather()  # of bytes as floats, which every device can send
        lengths = collect(Tensor([[len(content)]], ms.float32)).asnumpy()[:, 0].astype(int)
        if not lengths.any():
            return [b""] * self.world_size
        padded = np.zeros((1, lengths.max()), np.float32)
        padded[0, : len(content)] = np.frombuffer(content, np.uint8)
        rows = collect(Tensor(padded)).asnumpy().astype(np.uint8)  # (workers, longest)
        return [row[:length].tobytes() for row, length in zip(rows, lengths)]


def setup(
    device: str = "auto",
    mode: str = "graph",
    seed: int = 42,
    jit_level: str = "O0",
    blocking: bool = False,
    deterministic: bool = False,
) -> Runtime:
    """Choose device and mode, seed every generator, and join the other workers if `msrun` started this process.

    Args:
        device: auto | ascend | gpu | cpu; auto picks the first of the three that is available, gpu only if CUDA_HOME is
            set.
        mode: graph (compiled once per shape) | pynative (op by op) | auto: pynative on a CPU, where graphs need more
            memory and each shape takes long to compile, else graph.
        seed: for Python, numpy and MindSpore, so that every worker starts from the same parameters.
        jit_level: O0 (op by op) | O1 (fused) | O2 (whole graph; Ascend with static shapes only).
        blocking: PyNative errors surface at the op that raised them; slower, meant for tests. Always on for a CPU, see
            `block_on_cpu`.
        deterministic: the same operation gives the same bits every time, which an NPU's kernels and collectives don't
            guarantee otherwise; slower, and for the rest of the process.

    Raises:
        ValueError: an unknown name, or a device that isn't available.
    """
    if mode not in (*MODES, "auto"):
        raise ValueError(f"mode is {mode!r}; it must be one of auto, {', '.join(MODES)}")
    joined = communication.GlobalComm.INITED  # by an earlier call; MindSpore then cannot change the device
    found = ms.get_context("device_target").lower() if joined else _choose_device(device)
    ms.set_context(mode=MODES[chosen_mode(mode, found)], jit_config={"jit_level": jit_level})
    # fp32 means fp32. By default CANN uses HF32 for convolutions and matrix products, cuDNN TF32 for convolutions.
    if found == "ascend":
        ms.device_context.ascend.op_precision.conv_allow_hf32(False)
        ms.device_context.ascend.op_precision.matmul_allow_hf32(False)
    elif found == "gpu":
        ms.device_context.gpu.op_precision.conv_allow_tf32(False)
        ms.device_context.gpu.op_precision.matmul_allow_tf32(False)
    if blocking:
        ms.runtime.launch_blocking()
    block_on_cpu()
    if deterministic and ms.get_context("deterministic") != "ON":  # MindSpore refuses to set it twice
        ms.set_deterministic(True)

    rank, world_size = 0, 1
    if int(os.environ.get("MS_WORKER_NUM", "1")) > 1:  # set by msrun
        # On a CPU a worker gives up on one that is 30 s late, though that may be compiling or writing a checkpoint. A
        # dead one is noticed sooner anyway: its heartbeats to the scheduler stop.
        os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "3600")
        if not joined:
            end_with_msrun()
            communication.init()
        rank, world_size = communication.get_rank(), communication.get_group_size()
        if rank:
            logging.getLogger("mg").setLevel(logging.WARNING)  # only the first logs info

    set_seed(seed)
    return Runtime(found, rank, world_size)


def set_seed(seed: int) -> None:
    """Seed Python, numpy and MindSpore."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    ms.set_seed(seed)


def block_on_cpu() -> None:
    """In PyNative on a CPU, wait for every operator. The operator queue needs its own core and makes kernels 1.5 times
    as slow, twice as slow if other processes are running."""
    if device() == "cpu" and not is_graph_mode():
        ms.runtime.launch_blocking()


def chosen_mode(mode: str, device: str) -> str:
    """The mode, with auto resolved for a device."""
    if mode != "auto":
        return mode
    return "pynative" if device == "cpu" else "graph"


def device() -> str:
    """The device in use: ascend | gpu | cpu."""
    return ms.get_context("device_target").lower()


def peak_memory() -> tuple[int, str] | None:
    """Peak memory so far, in bytes, and whose: "device" if MindSpore counts it, which it doesn't on a CPU, else
    "process", as Linux counts it; None if neither is known."""
    allocated = 0 if device() == "cpu" else ms.runtime.max_memory_allocated()
    if allocated:
        return allocated, "device"
    resident = peak_rss()
    return None if resident is None else (resident, "process")


def forget_peak_memory() -> None:
    """Start `peak_memory` again, from what is allocated now."""
    if device() != "cpu":
        ms.runtime.reset_peak_memory_stats()
    forget_peak_rss()


def release_memory() -> None:
    """Return what freed tensors and networks leave, as far as possible, so that it counts in no later peak."""
    gc.collect()
    if device() != "cpu":
        ms.runtime.empty_cache()
    release_freed()


def free_memory() -> int | None:
    """Bytes that can still be allocated: on a device, if MindSpore reports it; on a CPU, within the machine's memory
    and this process's control groups. None if unknown."""
    if device() == "cpu":
        return available_memory()
    with suppress(Exception):  # it differs by version and device, and isn't worth failing a run
        properties = ms.hal.get_device_properties(int(os.environ.get("DEVICE_ID", "0")), DEVICES[device()])
        total, pooled = properties.total_memory, ms.runtime.memory_reserved()
        free = getattr(properties, "free_memory", total - pooled)
        if total and free:  # 0 before the device is first used
            return int(free + pooled - ms.runtime.memory_allocated())
    return None


def forget_graphs(network: nn.Cell) -> None:
    """Free most of the memory of a network's compiled graphs, about 100 MB each plus more with the clip's size;
    MindSpore keeps one per shape. A shape that is used again is compiled again."""
    with suppress(Exception):  # what MindSpore does when a cell is destroyed, under names that may change
        executor = importlib.import_module("mindspore.nn.cell")._cell_graph_executor
        for cell in (network, *(cell for _, cell in network.cells_and_names())):
            if getattr(cell, "compile_cache", None):
                executor.del_net_res(cell, cell.compile_cache)
                cell.compile_cache.clear()
    gc.collect()
    release_freed()


def is_graph_mode() -> bool:
    return ms.get_context("mode") == ms.GRAPH_MODE


def records_gradients() -> bool:
    """Whether PyNative is currently recording for a gradient; True if MindSpore doesn't tell."""
    with suppress(Exception):  # private to MindSpore, under names that may change
        return importlib.import_module("mindspore.graph.api")._pynative_executor.grad_flag()
    return True


class WorkerMean(nn.Cell):
    """The mean of a tensor over all workers, the same on each; its gradient reaches every worker's tensor."""

    def __init__(self, world_size: int):
        super().__init__()
        self.share = 1.0 / world_size
        self.sum = ops.AllReduce() if world_size > 1 else None

    def construct(self, x):
        return x if self.sum is None else self.sum(x) * self.share

    def bprop(self, x, out, dout):
        return (self.construct(dout),)


class CtrlC:
    """Context in which Ctrl-C waits for the next `check`, which raises it; a second one is raised immediately.

    In the middle of a step it could be lost in a callback. It may arrive as SIGTERM: MindSpore's compiler, and each of
    its worker threads when it starts, replace the handler of SIGINT by one that sends the process SIGTERM. So both are
    held; with msrun only SIGINT, since msrun's SIGTERM must also end a worker that waits inside MindSpore.
    """

    def __init__(self):
        self._noted = False
        self._signals = [signal.SIGINT] if process_name() else [signal.SIGINT, signal.SIGTERM]
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "CtrlC":
        self._before = {number: signal.getsignal(number) for number in self._signals}
        self.hold()
        return self

    def __exit__(self, *exception):
        self._handle(self._before)

    def hold(self) -> None:
        """Take the signals back from whoever has taken them since."""
        self._handle(dict.fromkeys(self._signals, self._note))

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        self.hold()
        if self._noted:
            raise KeyboardInterrupt

    def checked(self, items: Generator[T, None, None]) -> Generator[T, None, None]:
        """The items, with a check after each is made."""

        def check(item: T) -> T:
            self.check()
            return item

        with closing(items):
            yield from map(check, items)  # unlike a loop, it keeps no reference to an item

    def _note(self, *_):
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    @staticmethod
    def _handle(handlers: dict[signal.Signals, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)


def _choose_device(name: str) -> str:
    if name == "auto":
        name = next(candidate for candidate in DEVICES if _seems_present(candidate))
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}; it must be one of auto, {', '.join(DEVICES)}")
    missing = _missing(name)
    if missing is None:
        try:
            ms.set_device(DEVICES[name])
            return name
        except RuntimeError as error:
            _logger.debug("set_device(%s)", name, exc_info=True)
            libraries = re.findall(rf"libmindspore_{name}\S* failed\. ([^\n]*)", str(error))
            missing = f"MindSpore cannot use it here ({(libraries or [' '.join(str(error).split())])[0][:160]})"
    raise ValueError(f"device is {name!r}, but {missing}; see docs/devices.md, or use --device cpu")


def _seems_present(name: str) -> bool:
    """Whether `auto` means this device."""
    if name == "ascend":
        return Path(_ASCEND_DRIVER).exists()
    return name == "cpu" or ("CUDA_HOME" in os.environ and _missing(name) is None)


def _missing(name: str) -> str | None:
    """What is missing to use a device, and how to get it; checked before MindSpore does, which fills the terminal."""
    simulated = "MS_SIMULATION_LEVEL" in os.environ  # MindSpore simulates it, and needs no driver
    if name == "ascend" and not simulated and not Path(_ASCEND_DRIVER).exists():
        return (
            f"there is no Ascend NPU here, or no driver ({_ASCEND_DRIVER} is missing): install the driver, and the "
            f"CANN version that MindSpore {ms.__version__} needs, and source CANN's set_env.sh"
        )
    if name == "gpu" and not _cuda_driver_works():
        return "there is no NVIDIA GPU here, or no driver (libcuda.so.1 does not start)"
    if name == "gpu" and not Path(os.environ.get("CUDA_HOME", ""), "bin", "nvcc").is_file():
        home = os.environ.get("CUDA_HOME")
        lacking = f"CUDA_HOME, {home}, has no bin/nvcc" if home else "CUDA_HOME is not set"
        return f"{lacking}: mg-make-cuda-home --target FOLDER makes one, and says what to set"
    return None


def _cuda_driver_works() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except (OSError, AttributeError):
        return False
