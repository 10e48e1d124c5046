"""Run a small TAE on a device, in every mode and precision, and compare its numbers with the CPU's in fp32.

    mg-check-device --device gpu

What to run first on a new machine: encode, decode and one training step of random weights, each row in a process of its
own, so that one that crashes costs a row. The table can be pasted into an issue. A row is ok where every number differs
from the CPU's by no more than its precision allows; seconds are of the second run, compiled before.
"""

import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mg import runtime
from mg.config import parse_config, run_command_line
from mg.losses.reconstruction import AutoencoderLoss, LossConfig
from mg.models import create_model
from mg.training.optim import OptimConfig
from mg.training.step import TrainStep

# The largest difference that a row may have, relative to the largest number of the CPU's: rounding and its growth over
# a dozen layers. A device that computes in TF32 or HF32 behind fp32's name is found out.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
LEFT_OUT = "left out"
MODEL: dict[str, Any] = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4} | {
    "temporal_downsample_level": [0],
    "temporal_upsample_level": [1],
}


@dataclass
class Options:
    """What to check.

    Args:
        device: the device.
        modes: graph (compiled) | pynative (op by op).
        dtypes: fp32 | fp16 | bf16.
        save: file that the numbers of a single row, one mode and one dtype, go to: what a row's process is told.
    """

    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    modes: list[Literal["graph", "pynative"]] = field(default_factory=lambda: ["graph", "pynative"])
    dtypes: list[Literal["fp32", "fp16", "bf16"]] = field(default_factory=lambda: ["fp32", "fp16", "bf16"])
    save: Path | None = None


def main() -> int:
    """0 if every row is ok, or of a precision that the device has not; 1 if not."""
    options = parse_config(Options, __doc__.splitlines()[0])
    if options.save is not None:
        np.savez(options.save, **measure(options.device, options.modes[0], options.dtypes[0]))
        return 0
    device = runtime.setup(options.device).device
    print(f"device {device}, mindspore {ms.__version__}, {platform.platform()}, Python {platform.python_version()}")
    if device == "gpu":
        print("a GPU newer than MindSpore's kernels (9.0 and up) compiles them first: many minutes, once", flush=True)
    print("| mode | precision | latents | video | loss | gradient | seconds | |\n|---|---|---|---|---|---|---|---|")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        wanted, why = run_row("cpu", "pynative", "fp32", Path(folder) / "cpu.npz")
        if wanted is None:
            raise ValueError(f"the CPU's own numbers could not be had: {why}")
        for mode in options.modes:
            for dtype in options.dtypes:
                found, why = run_row(device, mode, dtype, Path(folder) / f"{mode}_{dtype}.npz")
                cells = ["-"] * 5
                if found is not None:
                    apart = {name: difference(found[name], wanted[name]) for name in wanted if name != "seconds"}
                    cells = [*(f"{value:.1e}" for value in apart.values()), f"{float(found['seconds']):.2f}"]
                    far = [name for name, value in apart.items() if not value <= TOLERANCES[dtype]]
                    why = f"FAR in {', '.join(far)}: at most {TOLERANCES[dtype]:g} is expected" if far else "ok"
                good = good and (why == "ok" or why.startswith(LEFT_OUT))
                print("|", " | ".join([mode, dtype, *cells, why]), "|", flush=True)
    return 0 if good else 1


def run_row(device: str, mode: str, dtype: str, save: Path) -> tuple[dict | None, str]:
    """What `measure` finds in a process of its own, or why it found nothing."""
    options = ["--device", device, "--modes", mode, "--dtypes", dtype, "--save", str(save)]
    row = subprocess.run([sys.executable, "-m", "mg.cli.check_device", *options], capture_output=True, text=True)
    if row.returncode == 0:
        with np.load(save) as file:
            return dict(file), ""
    lines = [line.strip() for line in row.stderr.splitlines() if line.strip(" -")]
    last = lines[-1][:200] if lines else "nothing was said"
    if row.returncode == 2 and last.startswith("error: "):  # a precision that the device has not
        return None, last.replace("error", LEFT_OUT, 1)
    return None, f"FAILED with {row.returncode}: {last}"


def measure(device: str, mode: str, dtype: str) -> dict:
    """Latents, reconstruction, loss, and length of the gradient, of weights and a clip that are the same everywhere."""
    runtime.setup(device, mode)
    rng = np.random.default_rng(0)
    model = create_model("tae", None, dtype, **MODEL)
    for _, parameter in model.named_weights():
        fill(parameter, rng)
    x = rng.uniform(-1, 1, (1, 3, 4, 32, 32)).astype(np.float32)
    noise = rng.standard_normal(model.latent_shape(x.shape), dtype=np.float32)
    loss = AutoencoderLoss(LossConfig(perceptual_weight=0, kl_weight=1e-6))
    step = TrainStep(model, loss, OptimConfig(lr=1e-4, init_loss_scale=1), 2, dtype)
    found: dict = {}
    for _ in range(2):  # the first compiles; its numbers count, since its step moves the weights
        start = time.monotonic()
        mean = model.encode(Tensor(x)).mean
        y = model.decode(mean, x.shape[2]).asnumpy()
        step.accumulate(x, noise)
        result = step.update()
        found = found or {"latents": mean.asnumpy(), "video": y, "loss": result.loss, "gradient": result.grad_norm}
        seconds = time.monotonic() - start
    return {**found, "seconds": seconds}


def fill(parameter: Parameter, rng: np.random.Generator) -> None:
    """Random weights of about the size that keeps values at theirs; norms and biases stay."""
    if parameter.ndim > 1:
        spread = 1 / np.sqrt(np.prod(parameter.shape[1:]))
        values = spread * rng.standard_normal(parameter.shape)
        parameter.set_data(Tensor(values.astype(np.float32)))


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest number wanted; infinite where a number is not finite."""
    apart = np.abs(found - wanted).max() / np.abs(wanted).max()
    return float(apart) if np.isfinite(found).all() else float("inf")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
