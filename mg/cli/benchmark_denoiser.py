"""Measure denoisers: seconds and memory for building, compiling and calling them.

    mg-benchmark-denoiser --type STDiT3-XL/2 --latents 4x16x16          # a table of one row
    mg-benchmark-denoiser --type STDiT2-XL/2 --latents 4x16x16 --mode pynative --depth 2

Weights are random, and captions have full length. A call has a batch of two, as with guidance. The extra time of the
first call counts as compiling.
"""

import re
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
from mindspore import Tensor

from mg import runtime
from mg.config import parse_config, require, run_command_line
from mg.diffusion.networks import TYPES, create_denoiser
from mg.memory import peak_rss

_TITLES = ("network", "latents", "mode", "precision", "parameters", "build, s", "compile, s", "call, s", "peak MB")


@dataclass
class Options:
    """What to measure.

    Attributes:
        type: STDiT-XL/2 | STDiT2-XL/2 | STDiT3-XL/2 | STDiT3-3B/2 | DiT-XL/2 | DiT-XL/2x2.
        latents: frames, rows and columns of the latents, such as 4x16x16.
        depth: number of blocks, instead of the released number.
        batch: samples per call.
        runs: calls after the first; their median is reported.
        device: the device.
        mode: graph (compiled) | pynative (op by op).
        dtype: precision of matrix products.
    """

    type: str
    latents: str = "4x16x16"
    depth: int | None = None
    batch: int = 2
    runs: int = 3
    device: Literal["auto", "ascend", "gpu", "cpu"] = "auto"
    mode: Literal["graph", "pynative"] = "graph"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self):
        require(self.type in TYPES, self, "type", f"one of {', '.join(TYPES)}")
        sizes = re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", self.latents)
        require(bool(sizes), self, "latents", "frames, rows and columns, as 4x16x16")
        for name in ("batch", "runs"):
            require(getattr(self, name) >= 1, self, name, "at least 1")


def main() -> None:
    options = parse_config(Options, __doc__.splitlines()[0])
    runtime.setup(options.device, options.mode)
    size = [int(length) for length in options.latents.split("x")]
    start = time.monotonic()
    settings: dict[str, Any] = {} if options.depth is None else {"depth": options.depth}
    network = create_denoiser(options.type, dtype=options.dtype, input_size=size, **settings)
    network.set_train(False)
    build = time.monotonic() - start

    rng = np.random.default_rng(0)
    tokens = 1 if network.name == "dit" else network.config["model_max_length"]
    shapes = {
        "x": (options.batch, network.in_channels, *size),
        "y": (options.batch, 1, tokens, network.config["caption_channels"]),
    }
    inputs = {name: Tensor(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    inputs |= {name: Tensor(np.full(options.batch, 256, np.float32)) for name in ("t", *network.extra_inputs)}
    seconds = []
    for _ in range(options.runs + 1):
        start = time.monotonic()
        network(**inputs).asnumpy()
        seconds.append(time.monotonic() - start)

    call, peak = median(seconds[1:]), peak_rss()
    parameters = sum(parameter.size for _, parameter in network.named_weights())
    cells = [options.type, options.latents, options.mode, options.dtype, f"{parameters:,}", f"{build:.1f}"]
    cells += [f"{max(0.0, seconds[0] - call):.1f}", f"{call:.2f}", "-" if peak is None else f"{peak / 2**20:.0f}"]
    print(f"| {' | '.join(_TITLES)} |\n{'|---' * len(_TITLES)}|\n| {' | '.join(cells)} |")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
