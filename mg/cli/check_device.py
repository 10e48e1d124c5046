"""Run small versions of all models on a device in every mode and precision, and compare with the CPU in fp32.

    mg-check-device --device gpu
    mg-check-device --device ascend --models tae --sizes full      # at 256x256

The first thing to run on a new machine: encode, decode and one training step with random weights, each row in its own
process, so that a crash costs only one row. The table can be pasted into an issue. A row is ok if no number differs
from the CPU's by more than its precision allows; seconds are those of the second run, which doesn't compile.

    mg-check-device --static ascend --sizes small full --jobs 4

needs no device: it compiles every graph of every model for Ascend on this machine's CPU (x86-64 Linux with g++), and
reports which kernels MindSpore selects and which restrictions in CANN's documents they violate. A row is a graph; it is
ok if nothing is refused or left to the host, no rule is broken, and each kernel that CANN would have to compile for
every shape (aclop) is a listed exception. Nothing is launched: the real test is `--device ascend` on an NPU. See
docs/devices.md.
"""

import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mg import runtime
from mg.ascend.check import TITLES, Check
from mg.ascend.graphs import graphs
from mg.ascend.sizes import NARROW, SMALL
from mg.config import parse_config, require, run_command_line
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model
from mg.training.optim import OptimConfig
from mg.training.step import TrainStep

# The largest difference allowed, relative to the CPU's largest number: rounding, as it grows over a dozen layers. Tight
# enough to catch a device that uses TF32 or HF32 for fp32.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
LEFT_OUT = "left out"


@dataclass
class Options:
    """What to check.

    Args:
        device: the device.
        static: check the graphs for this device instead, without one.
        models: names of models; by default all. With static also discriminator, optimizer, lpips, loss_scale, stdit,
            stdit2, stdit3, dit, diffusion_loss, t5 and clip.
        modes: graph (compiled) | pynative (op by op).
        dtypes: fp32 | fp16 | bf16.
        sizes: small models and clips, or with full narrow models at 256x256; with static, full means the released
            models with the clips of their configs.
        parts: with static, parts of a model, such as encode and update; by default all.
        jobs: with static, number of graphs to compile at the same time.
        details: with static, list every fault and its count below the table.
        folder: with static, where to keep logs and compiled graphs; by default they are deleted.
        save: file for the numbers of a single row; used for the process of a row.
    """

    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    static: Literal["ascend"] | None = None
    models: list[str] = field(default_factory=list)
    modes: list[Literal["graph", "pynative"]] = field(default_factory=lambda: ["graph", "pynative"])
    dtypes: list[Literal["fp32", "fp16", "bf16"]] = field(default_factory=lambda: ["fp32", "fp16", "bf16"])
    sizes: list[Literal["small", "full"]] = field(default_factory=lambda: ["small"])
    parts: list[str] = field(default_factory=list)
    jobs: int = 1
    details: bool = False
    folder: Path | None = None
    save: Path | None = None

    def __post_init__(self):
        require(self.jobs >= 1, self, "jobs", "at least 1")
        if self.static is None:
            require(set(self.models) <= set(SMALL), self, "models", f"some of {', '.join(SMALL)}")


@dataclass(frozen=True)
class DeviceRow:
    """A row of the device's table."""

    model: str
    size: str
    mode: str
    dtype: str


def main() -> int:
    """0 if every row is ok or has a precision that the device doesn't support; 1 if not."""
    options = parse_config(Options, __doc__.splitlines()[0])
    if options.save is not None:
        row = DeviceRow(options.models[0], options.sizes[0], options.modes[0], options.dtypes[0])
        np.savez(options.save, **measure(options.device, row))
        return 0
    return check_graphs(options) if options.static else check_numbers(options)


def check_graphs(options: Options) -> int:
    """Compile for a device without having one."""
    chosen = graphs(options.models, options.parts, options.dtypes, options.sizes)
    good, details = True, []
    with Check(options.folder) as check:
        print(f"{len(chosen)} graphs for Ascend, mindspore {ms.__version__}, no kernel built or launched")
        print("|", " | ".join(TITLES), "|\n" + "|---" * len(TITLES) + "|", flush=True)
        for finding in check.all(chosen, options.jobs):
            good = good and finding.clean
            print(finding.row(), flush=True)
            details += [f"{finding.graph}: {line}" for line in finding.lines()]
    for line in details if options.details else ():
        print(line)
    return 0 if good else 1


def check_numbers(options: Options) -> int:
    """Run on a device."""
    device = runtime.setup(options.device).device
    print(f"device {device}, mindspore {ms.__version__}, {platform.platform()}, Python {platform.python_version()}")
    if device == "gpu":
        print("a GPU newer than MindSpore's kernels (9.0 and up) compiles them first: many minutes, once", flush=True)
    titles = ("model", "size", "mode", "precision", "latents", "video", "loss", "gradient", "seconds", "")
    print("|", " | ".join(titles), "|\n" + "|---" * len(titles) + "|")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for size, model in product(options.sizes, options.models or SMALL):
            wanted, why = run_row("cpu", DeviceRow(model, size, "pynative", "fp32"), Path(folder) / "cpu.npz")
            if wanted is None:
                raise ValueError(f"the CPU's reference numbers for {model} could not be computed: {why}")
            for mode, dtype in product(options.modes, options.dtypes):
                found, why = run_row(device, DeviceRow(model, size, mode, dtype), Path(folder) / "row.npz")
                cells = ["-"] * 5
                if found is not None:
                    apart = {name: difference(found[name], wanted[name]) for name in wanted if name != "seconds"}
                    cells = [*(f"{value:.1e}" for value in apart.values()), f"{float(found['seconds']):.2f}"]
                    far = [name for name, value in apart.items() if not value <= TOLERANCES[dtype]]
                    why = f"FAR in {', '.join(far)}: at most {TOLERANCES[dtype]:g} is expected" if far else "ok"
                good = good and (why == "ok" or why.startswith(LEFT_OUT))
                print("|", " | ".join([model, size, mode, dtype, *cells, why]), "|", flush=True)
    return 0 if good else 1


def run_row(device: str, row: DeviceRow, save: Path) -> tuple[dict | None, str]:
    """The result of `measure` in its own process, or why there is none."""
    options = ["--device", device, "--models", row.model, "--sizes", row.size, "--modes", row.mode]
    options += ["--dtypes", row.dtype, "--save", str(save)]
    done = subprocess.run([sys.executable, "-m", "mg.cli.check_device", *options], capture_output=True, text=True)
    if done.returncode == 0:
        with np.load(save) as file:
            return dict(file), ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip(" -")]
    last = lines[-1][:200] if lines else "no output"
    if done.returncode == 2 and last.startswith("error: "):  # an unsupported precision
        return None, last.replace("error", LEFT_OUT, 1)
    return None, f"FAILED with {done.returncode}: {last}"


def measure(device: str, row: DeviceRow) -> dict:
    """Latents, reconstruction, loss and gradient norm for weights and a clip that are the same everywhere."""
    runtime.setup(device, row.mode)
    rng = np.random.default_rng(0)
    size = (NARROW if row.size == "full" else SMALL)[row.model]
    model = create_model(row.model, None, row.dtype, **size.config)
    for _, parameter in model.named_weights():
        fill(parameter, rng)
    x = rng.uniform(-1, 1, (1, 3, size.frames, size.pixels, size.pixels)).astype(np.float32)
    noise = rng.standard_normal(model.latent_shape(x.shape), dtype=np.float32)
    loss = AutoencoderLoss(LossConfig(perceptual_weight=0, kl_weight=1e-6 if model.geometry.has_posterior else 0.0))
    step = TrainStep(model, loss, OptimConfig(lr=1e-4, init_loss_scale=1), 2, row.dtype)
    found: dict = {}
    for _ in range(2):  # the first compiles; its numbers are used, since its update changes the weights
        start = time.monotonic()
        mean = model.encode(Tensor(x)).mean
        y = model.decode(mean, x.shape[2]).asnumpy()
        step.accumulate(x, noise)
        result = step.update()
        found = found or {"latents": mean.asnumpy(), "video": y, "loss": result.loss, "gradient": result.grad_norm}
        seconds = time.monotonic() - start
    return {**found, "seconds": seconds}


def fill(parameter: Parameter, rng: np.random.Generator) -> None:
    """Random weights scaled to roughly preserve the variance of activations; norms and biases are unchanged."""
    if parameter.ndim > 1:
        spread = 1 / np.sqrt(np.prod(parameter.shape[1:]))
        values = spread * rng.standard_normal(parameter.shape)
        parameter.set_data(Tensor(values.astype(np.float32)))


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest number wanted; infinite if a number is not finite."""
    apart = np.abs(found - wanted).max() / np.abs(wanted).max()
    return float(apart) if np.isfinite(found).all() else float("inf")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
