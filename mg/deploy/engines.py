"""Engines that run an ONNX graph, onnxruntime, OpenVINO and PyTorch: networks with one input and one output."""

import logging
import os
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np

_logger = logging.getLogger(__name__)

ENGINES = ("onnxruntime", "openvino", "torch")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
DEVICES = ("auto", "cpu", "cuda")

# OpenVINO's names of the operators that norms and softmax, and hardly anything else, consist of: kept in fp32 under
# bf16, as in the models themselves. So is the last convolution, which costs `assets/image_vae` 0.3 dB in bf16.
_KEPT_IN_FP32 = {"SoftMax", "ReduceMean", "ReduceSum", "Sqrt", "Subtract", "Divide"}

Run = Callable[[np.ndarray], np.ndarray]


def opener(
    engine: str, precision: str, device: str, threads: int | None, compile: bool | None = None
) -> Callable[[Path], Run]:
    """Return a function that loads a graph's file; the arguments are those of `mg.deploy.load`.

    Raises:
        ValueError: the engine is not installed, or does not support an option here.
    """
    choices = (("engine", engine, ENGINES), ("precision", precision, PRECISIONS), ("device", device, DEVICES))
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    if engine == "torch":
        return _torch(precision, device, threads, compile)
    if compile:
        raise ValueError(f"compile is for engine torch; {engine} always compiles")
    return (_onnxruntime if engine == "onnxruntime" else _openvino)(precision, device, threads)


def _onnxruntime(precision: str, device: str, threads: int | None) -> Callable[[Path], Run]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(_not_installed("onnxruntime", error)) from None
    if precision == "bf16":
        raise ValueError("precision is 'bf16', which onnxruntime does not run. Use engine torch or openvino, or fp32")
    cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and device != "cpu"
    if device == "cuda" and not cuda:
        raise ValueError(
            "device is 'cuda', but this onnxruntime has no CUDA: pip uninstall onnxruntime, "
            "pip install onnxruntime-gpu[cuda,cudnn]. Or use device cpu"
        )
    if precision == "tf32" and not cuda:
        raise ValueError("precision is 'tf32', which needs device cuda. Use fp32")
    if precision == "fp16" and not cuda:
        raise ValueError("precision is 'fp16', which onnxruntime runs only on CUDA. Use engine torch, or fp32")
    if precision == "fp16":
        try:
            from mg.deploy.half_precision import read_in_fp16
        except ImportError as error:
            raise ValueError(f"precision is 'fp16', which needs onnx ({error}): pip install onnx") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The pattern of a first run would get a block of its own in the second, next to what the first took: nearly twice
    # the memory on a CPU, in no less time. What it does on CUDA has not been measured.
    options.enable_mem_pattern = cuda
    if threads:
        options.intra_op_num_threads = threads
    providers: list[str | tuple[str, dict]] = ["CPUExecutionProvider"]
    if cuda:
        onnxruntime.preload_dlls()  # NVIDIA's libraries from their wheels, if installed
        settings = {
            "use_tf32": int(precision == "tf32"),  # 1, the default, would run fp32 as TF32
            "arena_extend_strategy": "kSameAsRequested",  # the default, powers of two, takes 1.4 times the memory
        }
        providers.insert(0, ("CUDAExecutionProvider", settings))

    def open_network(path: Path) -> Run:
        def open_session():
            graph = read_in_fp16(path).SerializeToString() if precision == "fp16" else str(path)
            return onnxruntime.InferenceSession(graph, options, providers=providers)

        session = opened(path, open_session)
        if cuda and session.get_providers()[0] != "CUDAExecutionProvider":
            if device == "cuda":
                raise ValueError(
                    "device is 'cuda', but onnxruntime cannot start it here: it needs an NVIDIA driver, and the CUDA "
                    "and cuDNN that it was built for: pip install onnxruntime-gpu[cuda,cudnn]. Or use device cpu"
                )
            _logger.warning("onnxruntime cannot start CUDA here; %s runs on the CPU", path.name)
        name = session.get_inputs()[0].name

        def run(x: np.ndarray) -> np.ndarray:
            try:
                return session.run(None, {name: x})[0]
            except Exception as error:  # onnxruntime has no exception class for it
                if "Failed to allocate memory" not in str(error):
                    raise
                raise too_large(path, x) from error

        return run

    return open_network


def _openvino(precision: str, device: str, threads: int | None) -> Callable[[Path], Run]:
    try:
        import openvino
    except ImportError as error:
        raise ValueError(_not_installed("openvino", error)) from None
    if device == "cuda":
        raise ValueError(
            "device is 'cuda'; OpenVINO runs only on CPUs here. Use engine torch or onnxruntime, or device cpu"
        )
    if precision == "tf32":
        raise ValueError("precision is 'tf32', which needs engine torch or onnxruntime, and device cuda. Use fp32")
    if precision == "fp16":
        raise ValueError("precision is 'fp16', which OpenVINO does not run here. Use engine torch, bf16 or fp32")
    core = openvino.Core()
    with whole_instruction_set():
        can = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in can:
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise ValueError(f"precision is 'bf16', which this CPU ({name}) has no instructions for; use fp32")
    settings: dict[str, str | int] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads

    def open_network(path: Path) -> Run:
        def compile_model():
            model = core.read_model(str(path))
            return core.compile_model(_partly_in_fp32(core, model) if precision == "bf16" else model, "CPU", settings)

        request, one_at_a_time = opened(path, compile_model).create_infer_request(), Lock()

        def run(x: np.ndarray) -> np.ndarray:
            with one_at_a_time:  # a run overwrites the previous one's result
                return request.infer([x])[0].copy()

        return run

    return open_network


@contextmanager
def whole_instruction_set() -> Iterator[None]:
    """Lift the limit that `import mg` sets for MindSpore's oneDNN. OpenVINO and PyTorch have their own oneDNN, which
    reads it once, when it is first asked what the CPU can do, or to run; with the limit it is slower."""
    limit = os.environ.pop("ONEDNN_MAX_CPU_ISA", None) if "MG_LIMITS_ONEDNN" in os.environ else None
    try:
        yield
    finally:
        if limit is not None:
            os.environ["ONEDNN_MAX_CPU_ISA"] = limit


def _torch(precision: str, device: str, threads: int | None, compile: bool | None) -> Callable[[Path], Run]:
    try:
        import onnx  # noqa: F401  # which reads the graphs
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(_not_installed("torch", error)) from None
    from mg.deploy.torch_engine import torch_opener

    return torch_opener(precision, device, threads, compile)


def _partly_in_fp32(core, model):
    """The model with its norms, softmax and last convolution marked so that OpenVINO keeps them in fp32. Marks can only
    be set in OpenVINO's own files, so the model is saved to one and read back."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.xml"
        openvino.save_model(model, file, compress_to_fp16=False)
        tree = ET.parse(file)
        layers = list(tree.iter("layer"))
        last = [layer for layer in layers if layer.get("type") == "Convolution"][-1:]
        for layer in layers:
            if layer.get("type") in _KEPT_IN_FP32 or layer in last:
                marks = layer.find("rt_info")
                if marks is None:
                    marks = ET.Element("rt_info")
                    layer.insert(int(layer.find("data") is not None), marks)
                mark = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:dynamic"}
                ET.SubElement(marks, "attribute", mark)
        tree.write(file)
        return core.read_model(file)


def _not_installed(engine: str, error: ImportError) -> str:
    packages = f"{engine} onnx" if engine == "torch" else engine
    return f"engine is {engine!r}, which is not installed ({error}): pip install {packages}"


def too_large(path: Path, x: np.ndarray) -> MemoryError:
    """The error for a tile that does not fit into memory."""
    return MemoryError(
        f"{path.name}: not enough memory for tiles of {'x'.join(map(str, x.shape[2:]))}; export the "
        "model again with a smaller --size or fewer --frames"
    )


def opened(path: Path, open_file: Callable):
    """Call `open_file`; any error it raises names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; export the model again")
    try:
        return open_file()
    except Exception as error:  # every engine has its own exceptions
        raise ValueError(f"{path}: cannot be opened ({' '.join(str(error).split())[:300]})") from error
