"""The engine that runs exported graphs in PyTorch, on CUDA and CPUs.

`mg.deploy.torch_graph` reads a graph as a module; here it is placed on a device, compiled, and run on numpy arrays.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from mg.deploy.engines import Run, opened, too_large, whole_instruction_set
from mg.deploy.torch_graph import read_network

_logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_opener(precision: str, device: str, threads: int | None, compiles: bool | None) -> Callable[[Path], Run]:
    """Return a function that loads a graph's file; see `mg.deploy.engines.opener`."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        raise ValueError(
            "device is 'cuda', but this PyTorch cannot start it: it needs an NVIDIA driver, and a build for CUDA "
            "(pip install torch). Or use device cpu"
        )
    if precision == "tf32" and not cuda:
        raise ValueError("precision is 'tf32', which needs device cuda. Use fp32, or bf16")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"precision is 'bf16', which {torch.cuda.get_device_name()} has no instructions for; use fp16")
    compiles = cuda if compiles is None else compiles  # on a CPU it gains little, see docs/performance.md

    def open_network(path: Path) -> Run:
        network = opened(path, lambda: read_network(path, _DTYPES[precision]).to("cuda" if cuda else "cpu"))
        return _Network(path, network, compiles, lambda: _settings(cuda, precision, threads))

    return open_network


class _Network:
    """A module as a function on numpy arrays; if PyTorch cannot compile it, it runs operator by operator."""

    def __init__(self, path: Path, module: torch.nn.Module, compiles: bool, settings: Callable):
        self.path, self.module, self.settings = path, module, settings
        self.device = next(module.parameters()).device
        self.compiled = torch.compile(module, dynamic=False) if compiles else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if not x.flags.writeable:  # PyTorch has no such tensors
            x = x.copy()
        try:
            with self.settings():
                return self._run(torch.from_numpy(x).to(self.device)).contiguous().cpu().numpy()
        except RuntimeError as error:  # out of memory on CUDA; on a CPU PyTorch has no class for it
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise too_large(self.path, x) from error

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        if self.compiled is not None:
            try:
                return self.compiled(x)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers have their own exceptions, and there may be no compiler
                reason = " ".join(str(error).split())[:200]
                _logger.warning("%s: PyTorch cannot compile it here (%s); it runs uncompiled", self.path.name, reason)
                self.compiled = None
        return self.module(x)


@contextmanager
def _settings(cuda: bool, precision: str, threads: int | None) -> Iterator[None]:
    """PyTorch's global settings for one run, set back after it: convolutions found by trial, TF32 only if requested."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if cuda:
            tf32 = precision == "tf32"
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32))
            stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", torch.backends.cuda.matmul.allow_tf32)
            torch.backends.cuda.matmul.allow_tf32 = tf32
        else:
            stack.enter_context(whole_instruction_set())
            if threads is not None and threads != before:
                stack.callback(torch.set_num_threads, before)
                torch.set_num_threads(threads)
        yield
