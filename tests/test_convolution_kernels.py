"""On a CPU every convolution, forward and backward, runs on oneDNN's gemm kernels and none on its reference ones."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import mg
import mindspore as ms
import numpy as np
from mg import runtime
from mg.models import create_model

runtime.setup("cpu", "pynative")
model = create_model("tae", ch=32, ch_mult=[1, 1], num_res_blocks=1, z_channels=4,
                     temporal_downsample_level=[0], temporal_upsample_level=[1])
x = ms.Tensor(np.zeros((1, 3, 4, 16, 16), np.float32))
noise = ms.Tensor(np.zeros(model.latent_shape(x.shape), np.float32))
loss = ms.value_and_grad(lambda: model.forward(x, noise)[0].square().sum(), None, model.trainable_params())
print("loss", loss()[0])
"""


@pytest.mark.full
def test_no_convolution_takes_the_reference_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**environment, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if "exec,cpu,convolution," in line]
    for direction in ("forward", "backward_data", "backward_weights"):
        assert any(f",{direction}" in line for line in lines), direction
    assert any("gemm:jit" in line for line in lines)
    assert not [line for line in lines if "ref:any" in line]
