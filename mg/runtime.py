"""The one place that touches MindSpore's context: device, mode, seed, ranks, and what precision a device really has."""

import ctypes
import gc
import importlib
import logging
import os
import random
import re
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, nn, ops

from mg.launcher import end_with_msrun
from mg.memory import available_memory, peak_rss

_logger = logging.getLogger(__name__)

DEVICES = {"ascend": "Ascend", "gpu": "GPU", "cpu": "CPU"}
MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}  # and auto, see `setup`
_ASCEND_DRIVER = "/dev/davinci_manager"
PRECISIONS = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """What `setup` found: the device's lower-case name, and this process's place among the workers.

    Attributes:
        sp_size: workers of neighbouring ranks that share the tokens of the same clips, and so count as one for data.
    """

    device: str
    rank: int = 0
    world_size: int = 1
    sp_size: int = 1

    @property
    def dp_rank(self) -> int:
        """This worker's place among those that have data of their own; all that share tokens have one place."""
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        """How many there are that have data of their own."""
        return self.world_size // self.sp_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, content: bytes) -> list[bytes]:
        """What every worker gives, of any length, in the order of their ranks; all must call it at the same time."""
        if self.world_size == 1:
            return [content]
        collect = ops.AllGather()  # of bytes as floats, which every device sends
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
        device: auto | ascend | gpu | cpu; auto takes the first of the three that is there, gpu only with CUDA_HOME set.
        mode: graph (compiled once per shape) | pynative (op by op) | auto: pynative on a CPU, where graphs take more
            memory and each shape takes long to compile, and graph elsewhere.
        seed: for Python, numpy and MindSpore alike, so that every worker starts from the same parameters.
        jit_level: O0 (op by op) | O1 (fused) | O2 (whole graph; Ascend with static shapes only).
        blocking: PyNative errors surface at the op that made them; slower, meant for tests. On a CPU it is so anyway:
            see `block_on_cpu`.
        deterministic: the same operation gives the same bits every time, which an NPU's kernels and its messages
            between workers do not promise otherwise; for the rest of the process, and slower.

    Raises:
        ValueError: an unknown name, or a device that is not there.
    """
    if mode not in (*MODES, "auto"):
        raise ValueError(f"mode is {mode!r}; it must be one of auto, {', '.join(MODES)}")
    joined = communication.GlobalComm.INITED  # by an earlier call; MindSpore then has the device for good
    found = ms.get_context("device_target").lower() if joined else _choose_device(device)
    ms.set_context(mode=MODES[chosen_mode(mode, found)], jit_config={"jit_level": jit_level})
    # fp32 means fp32. Unless told otherwise CANN makes HF32 of convolutions and products, cuDNN TF32 of convolutions.
    if found == "ascend":
        ms.device_context.ascend.op_precision.conv_allow_hf32(False)
        ms.device_context.ascend.op_precision.matmul_allow_hf32(False)
    elif found == "gpu":
        ms.device_context.gpu.op_precision.conv_allow_tf32(False)
        ms.device_context.gpu.op_precision.matmul_allow_tf32(False)
    if blocking:
        ms.runtime.launch_blocking()
    block_on_cpu()
    if deterministic and ms.get_context("deterministic") != "ON":  # MindSpore refuses to be told twice
        ms.set_deterministic(True)

    rank, world_size = 0, 1
    if int(os.environ.get("MS_WORKER_NUM", "1")) > 1:  # set by msrun
        # On a CPU a worker gives up on one that is 30 s late, though it may be compiling or writing a checkpoint. One
        # that has died shows sooner and otherwise: it sends no more signs of life to the scheduler.
        os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "3600")
        if not joined:
            end_with_msrun()
            communication.init()
        rank, world_size = communication.get_rank(), communication.get_group_size()
        if rank:
            logging.getLogger("mg").setLevel(logging.WARNING)  # the first speaks for all

    set_seed(seed)
    return Runtime(found, rank, world_size)


def set_seed(seed: int) -> None:
    """Seed Python, numpy and MindSpore alike."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    ms.set_seed(seed)


def block_on_cpu() -> None:
    """On a CPU let PyNative, if it is the mode, wait for every operator. Its queue wants a processor of its own, and
    makes kernels take half as long again, twice as long where other processes run."""
    if device() == "cpu" and not is_graph_mode():
        ms.runtime.launch_blocking()


def chosen_mode(mode: str, device: str) -> str:
    """What auto means on a device."""
    if mode != "auto":
        return mode
    return "pynative" if device == "cpu" else "graph"


def device() -> str:
    """The device in use: ascend | gpu | cpu."""
    return ms.get_context("device_target").lower()


def peak_memory() -> tuple[int, str] | None:
    """The most memory held so far, in bytes, and whose: "device" where MindSpore counts it, which it does not on
    a CPU, else "process", as Linux counts it; None where neither is known."""
    allocated = 0 if device() == "cpu" else ms.runtime.max_memory_allocated()
    if allocated:
        return allocated, "device"
    resident = peak_rss()
    return None if resident is None else (resident, "process")


def free_memory() -> int | None:
    """Bytes that may still be taken: of a device, where MindSpore tells; on a CPU of the machine and of the control
    groups that this process is in. None where it is not known."""
    if device() == "cpu":
        return available_memory()
    with suppress(Exception):  # it differs by version and device, and is worth no run
        properties = ms.hal.get_device_properties(int(os.environ.get("DEVICE_ID", "0")), DEVICES[device()])
        total, pooled = properties.total_memory, ms.runtime.memory_reserved()
        free = getattr(properties, "free_memory", total - pooled)
        if total and free:  # 0 before the device is first used
            return int(free + pooled - ms.runtime.memory_allocated())
    return None


def forget_graphs(network: nn.Cell) -> None:
    """Give back most of the memory that a network's compiled graphs hold, about 100 MB each and more with the clip;
    MindSpore keeps one for every shape. A shape that comes again is compiled again."""
    with suppress(Exception):  # MindSpore has it for the end of a cell's life, under names that may change
        executor = importlib.import_module("mindspore.nn.cell")._cell_graph_executor
        for cell in (network, *(cell for _, cell in network.cells_and_names())):
            if getattr(cell, "compile_cache", None):
                executor.del_net_res(cell, cell.compile_cache)
                cell.compile_cache.clear()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's; it would keep what is free
        ctypes.CDLL(None).malloc_trim(0)


def is_graph_mode() -> bool:
    return ms.get_context("mode") == ms.GRAPH_MODE


def records_gradients() -> bool:
    """Whether what PyNative runs now is kept for a gradient; True where MindSpore does not tell."""
    with suppress(Exception):  # MindSpore has it for itself, under names that may change
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
    """Within it, Ctrl-C waits for the next `check`, which raises it; a second one is raised at once.

    In the middle of a step it could be lost in a callback, or end the process in silence: MindSpore's compiler leaves a
    handler of its own behind. So `hold`, which puts this one back, belongs behind all that may compile, if `check` does
    not stand there.
    """

    def __init__(self):
        self._noted = False
        self._before = None

    def __enter__(self) -> "CtrlC":
        self._before = signal.getsignal(signal.SIGINT)
        self.hold()
        return self

    def __exit__(self, *exception):
        self._handle(self._before)

    def hold(self) -> None:
        self._handle(self._note)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        self.hold()
        if self._noted:
            raise KeyboardInterrupt

    def _note(self, *_):
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    @staticmethod
    def _handle(handler) -> None:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


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
    raise ValueError(f"device is {name!r}, but {missing}; docs/devices.md says what it takes. Or use --device cpu")


def _seems_present(name: str) -> bool:
    """Whether `auto` means this device."""
    if name == "ascend":
        return Path(_ASCEND_DRIVER).exists()
    return name == "cpu" or ("CUDA_HOME" in os.environ and _missing(name) is None)


def _missing(name: str) -> str | None:
    """What a device lacks here, and who brings it; looked at before MindSpore looks, which fills the terminal."""
    simulated = "MS_SIMULATION_LEVEL" in os.environ  # by MindSpore, which then needs no driver
    if name == "ascend" and not simulated and not Path(_ASCEND_DRIVER).exists():
        return (
            f"there is no Ascend NPU here, or no driver ({_ASCEND_DRIVER} is missing): install the driver, and the "
            f"CANN that MindSpore {ms.__version__} is made for, and source CANN's set_env.sh"
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
