"""Devices: one that is not there is one line that says what to do; the CUDA_HOME of NVIDIA's wheels."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import mindspore as ms
import pytest

from mg import runtime
from mg.cli import check_device
from mg.config import parse_config
from mg.training import trainer
from mg.training.autoencoder import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
MAKE = str(ROOT / "tools" / "make_cuda_home.py")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"} | environment
    return subprocess.run(
        [sys.executable, *command], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    "device, there, advice",
    [("ascend", runtime._ASCEND_DRIVER, "install the driver"), ("gpu", "/dev/nvidiactl", "there is no NVIDIA GPU")],
)
def test_a_missing_device_is_one_line_that_says_what_to_do(device, there, advice):
    if Path(there).exists():
        pytest.skip(f"there is such a device here: {there}")
    found = run("scripts/inference_vae.py", "--ckpt_path", "x.ckpt", "--csv_path", "x.csv", "--device", device)
    assert found.returncode == 2 and not found.stdout, found.stdout
    assert found.stderr.startswith(f"error: device is '{device}', but ") and found.stderr.count("\n") == 1, found.stderr
    for part in (advice, "docs/devices.md", "--device cpu"):
        assert part in found.stderr
    assert (ROOT / "docs" / "devices.md").is_file()


def test_a_simulated_ascend_needs_no_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "_ASCEND_DRIVER", str(tmp_path / "none"))
    assert "install the driver" in runtime._missing("ascend")
    monkeypatch.setenv("MS_SIMULATION_LEVEL", "1")
    assert runtime._missing("ascend") is None


def test_a_gpu_without_a_cuda_home_is_told_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "_cuda_driver_works", lambda: True)
    for home, message in ((None, "CUDA_HOME is not set: mg-make-cuda-home"), (tmp_path, "no bin/nvcc")):
        monkeypatch.setenv("CUDA_HOME", str(home)) if home else monkeypatch.delenv("CUDA_HOME", raising=False)
        with pytest.raises(ValueError, match=message) as error:
            runtime.setup("gpu")
        assert str(home or "") in str(error.value)


def test_auto_takes_the_cpu_where_nothing_else_works(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "_ASCEND_DRIVER", str(tmp_path / "none"))
    monkeypatch.setattr(runtime, "_cuda_driver_works", lambda: False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert runtime.setup("auto", "pynative").device == "cpu"


def test_cuda_loads_kernels_as_they_run_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("CUDA_MODULE_LOADING")  # the tests' own import of mg has set it
    for told, loading in ({}, "LAZY"), ({"CUDA_MODULE_LOADING": "EAGER"}, "EAGER"):
        found = run("-c", "import mg, os; print(os.environ['CUDA_MODULE_LOADING'])", **told)
        assert found.stdout == f"{loading}\n", found.stderr


@pytest.mark.parametrize("device, rounded", [("ascend", "hf32"), ("gpu", "tf32")])
def test_fp32_is_not_rounded_on_devices_that_would(monkeypatch, device, rounded):
    precision, allowed = getattr(ms.device_context, device).op_precision, {}
    for op in ("conv", "matmul"):
        monkeypatch.setattr(precision, f"{op}_allow_{rounded}", lambda value, op=op: allowed.update({op: value}))
    monkeypatch.setattr(runtime, "_choose_device", lambda name: name)
    assert runtime.setup(device, "pynative").device == device
    assert allowed == {"conv": False, "matmul": False}


def test_training_has_the_same_bits_every_time_unless_told_otherwise(monkeypatch, tmp_path):
    state, told = {"deterministic": "OFF"}, []
    get_context = runtime.ms.get_context
    monkeypatch.setattr(runtime.ms, "get_context", lambda name: state.get(name) or get_context(name))
    monkeypatch.setattr(
        runtime.ms, "set_deterministic", lambda value: told.append(value) or state.update(deterministic="ON")
    )
    runtime.setup("cpu", "pynative")
    assert told == []
    for _ in range(2):  # MindSpore refuses to be told twice
        runtime.setup("cpu", "pynative", deterministic=True)
        assert told == [True]

    class Stop(Exception):
        pass

    (tmp_path / "clips.csv").write_text("path\nclip.mp4\n")

    def setup(*options, deterministic):
        asked.append(deterministic)
        raise Stop

    asked = []
    monkeypatch.setattr(runtime, "setup", setup)
    for options in [], ["--deterministic=false"]:
        with pytest.raises(Stop):
            trainer.train(parse_config(TrainConfig, "", [f"--csv_path={tmp_path}/clips.csv", *options]))
    assert asked == [True, False]


# The real wheels are 1.7 GB: these are stand-ins, a library of a few bytes in each.

WHEELS = {
    "nvidia_cublas_cu11-11.11.3.6": ["nvidia/cublas/lib/libcublas.so.11", "nvidia/cublas/include/cublas.h"],
    "nvidia_cuda_nvrtc_cu11-11.8.89": ["nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2"],
    "nvidia_cuda_runtime_cu11-11.8.89": ["nvidia/cuda_runtime/lib/libcudart.so.11.0"],
    "nvidia_cudnn_cu11-8.9.6.50": ["nvidia/cudnn/lib/libcudnn.so.8", "../../../libcudnn_escaped.so.8"],
    "nvidia_cufft_cu11-10.9.0.58": ["nvidia/cufft/lib/libcufft.so.10"],
    "nvidia_curand_cu11-10.3.0.86": ["nvidia/curand/lib/libcurand.so.10"],
    "nvidia_cusolver_cu11-11.4.1.48": ["nvidia/cusolver/lib/libcusolver.so.11"],
    "nvidia_cusparse_cu11-11.7.5.86": ["nvidia/cusparse/lib/libcusparse.so.11"],
}


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, files in WHEELS.items():
        with zipfile.ZipFile(folder / f"{name}-py3-none-manylinux1_x86_64.whl", "w") as archive:
            for file in files:
                archive.writestr(file, f"stand-in of {file}")
    return folder


def test_a_cuda_home_is_put_together_from_wheels(tmp_path, wheels):
    home = tmp_path / "cuda"
    # MindSpore's plugin would not link to stand-ins: without it the check of its needs has nothing to look at.
    code = (
        f"import sys; sys.modules['mindspore'] = None; sys.argv[0] = {MAKE!r}; import runpy; "
        f"import importlib.util as u; u.find_spec = lambda name: None; runpy.run_path({MAKE!r}, run_name='__main__')"
    )
    made = run("-c", code, "--target", str(home), "--wheels", str(wheels))
    assert made.returncode == 0, made.stderr
    assert f"export CUDA_HOME={home} LD_LIBRARY_PATH={home}/lib64:" in made.stdout
    libraries = sorted(file.name for file in (home / "lib64").iterdir())
    assert "libcudart.so.11.8.89" in libraries and "libcudnn_escaped.so.8" in libraries and "cublas.h" not in libraries
    assert (home / "lib64" / "libcudnn.so.8").read_text() == "stand-in of nvidia/cudnn/lib/libcudnn.so.8"
    answer = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    assert answer == "Cuda compilation tools, release 11.8, V11.8.89\n"  # MindSpore splits its first line at "release"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cuda", "wheels"]


@pytest.mark.parametrize("damage", ["missing", "twice", "cut short", "other version", "in the way"])
def test_unsuitable_wheels_are_named_and_leave_nothing_behind(tmp_path, wheels, damage):
    wheel = next(wheels.glob("nvidia_cufft*"))
    if damage == "missing":
        wheel.unlink()
    elif damage == "twice":
        (wheels / "nvidia_cufft_cu11-10.9.0.99-py3-none-any.whl").write_bytes(wheel.read_bytes())
    elif damage == "cut short":
        wheel.write_bytes(wheel.read_bytes()[:40])
    elif damage == "other version":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("nvidia/cufft/lib/libcufft.so.9", "older")
    else:
        (tmp_path / "cuda").mkdir()
    before = sorted(tmp_path.rglob("*"))
    found = run(MAKE, "--target", str(tmp_path / "cuda"), "--wheels", str(wheels))
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr, found.stderr
    assert ("cuda" if damage == "in the way" else "cufft") in found.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.full
def test_the_check_of_a_device_prints_a_row_for_every_model_mode_and_precision():
    options = "--device cpu --modes graph --dtypes fp32 --models tae image_vae --sizes small".split()
    found = run("tools/check_device.py", *options)
    assert found.returncode == 0, found.stderr
    header, titles, _, *rows = found.stdout.splitlines()
    assert header.startswith("device cpu, mindspore ") and "gradient" in titles
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    named = [[model, "small", "graph", "fp32"] for model in ("tae", "image_vae")]
    assert [cells[:4] for cells in found] == named and {cells[-1] for cells in found} == {"ok"}
    assert all(float(cell) <= 1e-4 for cells in found for cell in cells[4:8])


@pytest.mark.parametrize(
    "row, code, said",
    [
        (({"latents": 1.00005, "seconds": 1.0}, ""), 0, "| ok |"),
        (({"latents": 1.01, "seconds": 1.0}, ""), 1, "FAR in latents"),
        (({"latents": float("nan"), "seconds": 1.0}, ""), 1, "FAR in latents"),
        ((None, "FAILED with -11: no output"), 1, "FAILED with -11"),
        ((None, "left out: it has no bf16"), 0, "left out: it has no bf16"),
    ],
)
def test_a_device_whose_numbers_are_not_the_cpus_fails_the_check(row, code, said, monkeypatch, capsys):
    rows = iter([({"latents": 1.0, "seconds": 1.0}, ""), row])
    monkeypatch.setattr(check_device, "run_row", lambda *_: next(rows))
    argv = "check_device.py --device cpu --models tae --modes graph --dtypes fp32".split()
    monkeypatch.setattr(sys, "argv", argv)
    assert check_device.main() == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        ("--models teo", "it must be some of tae, dc_ae"),
        ("--jobs 0", "jobs is 0; it must be at least 1"),
        ("--static ascend --models teo", "unknown model 'teo'; it must be one of tae, dc_ae"),
    ],
)
def test_an_impossible_check_is_one_line(options, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_device.py", *options.split()])
    with pytest.raises(ValueError, match=said):
        check_device.main()


@pytest.mark.full
def test_at_full_size_a_device_is_checked_at_the_frames_of_training():
    options = "--device cpu --modes graph --dtypes fp32 --models image_vae --sizes full".split()
    found = run("tools/check_device.py", *options)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "| image_vae | full | graph | fp32 |" in found.stdout
