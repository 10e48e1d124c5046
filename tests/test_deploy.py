"""Exported models give the MindSpore model's values in the same tiles, in either engine, and run without MindSpore."""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from tiny_models import DC_AE, IMAGE_VAE, SMALL_HUNYUAN_VAE, SMALL_TEMPORAL_VAE, randomized

from mg import memory, runtime
from mg.codec import Geometry
from mg.deploy import load
from mg.deploy.engines import opener
from mg.models import create_model
from mg.models.layers.attention import DotProductAttention
from mg.models.layers.forms import FORMS

pytest.importorskip("onnx")

ROOT = Path(__file__).parents[1]
ENGINES = ("onnxruntime", "openvino", "torch")
TOLERANCE = 1e-5  # of the output's scale

# Per model: its config, an export's tiles, and a clip of several of them, the last of which moves back.
CASES = {
    "image_vae": (IMAGE_VAE, dict(frames=2, size=16, spatial_overlap=4), (2, 3, 4, 28, 16)),
    "temporal_vae": (SMALL_TEMPORAL_VAE, dict(size=8, spatial_overlap=4), (1, 3, 10, 14, 8)),
    "tae": (
        {
            "ch": 8,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "z_channels": 4,
            "norm_num_groups": 4,
            "temporal_downsample_level": [0],
            "temporal_upsample_level": [1],
        },
        dict(frames=8, size=8, encode_overlap=4, decode_overlap=4),
        (1, 3, 14, 8, 12),
    ),
    "hunyuan_vae": (
        SMALL_HUNYUAN_VAE,
        dict(frames=9, size=8, encode_overlap=4, decode_overlap=4, spatial_overlap=4),
        (1, 3, 13, 8, 14),
    ),
    "dc_ae": ({**DC_AE, "scaling_factor": 0.5}, dict(frames=4, size=64, spatial_overlap=32), (1, 3, 8, 64, 96)),
}


def clip(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


class Exported:
    """A model, its export, and what it makes of a clip in the export's tiles."""

    def __init__(self, name: str, folder: Path):
        from mg.deploy.export import export_model

        runtime.setup("cpu", "pynative", seed=0)
        config, tiles, shape = CASES[name]
        self.folder, self.x = folder, clip(*shape)
        self.model = randomized(create_model(name, **config))
        self.before = [p.name for p in self.model.get_parameters()]
        self.described = export_model(self.model, folder, "0" * 64, **tiles)
        self.model.enable_tiling(**self.described["tiling"])
        self.mean, self.logvar = self.model.encode(ms.Tensor(self.x))[1:]
        self.y = self.model.decode(self.mean, shape[2]).asnumpy()
        self.z = self.mean.asnumpy()


SLOW = ("dc_ae", "hunyuan_vae")  # to compile


def marked(name: str):
    return pytest.param(name, marks=[pytest.mark.full] * (name in SLOW))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Each model's export, made when it is first asked for."""
    made = {}

    def get(name: str) -> Exported:
        if name not in made:
            made[name] = Exported(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module", params=map(marked, CASES))
def exported(request, exports):
    return exports(request.param)


@pytest.fixture(scope="module")
def image_vae(exports):
    return exports("image_vae")


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("engine", ENGINES)
def test_encode_and_decode_are_the_models_in_the_same_tiles(exported, engine):
    pytest.importorskip(engine)
    vae = load(exported.folder, engine, threads=1)
    z, mean, logvar = vae.encode(exported.x)
    assert_close(mean, exported.z)
    assert z is mean or np.array_equal(z, mean)
    if exported.logvar is None:
        assert logvar is None
    else:
        assert_close(logvar, exported.logvar.asnumpy())
    assert_close(vae.decode(exported.z, exported.x.shape[2]), exported.y)
    model = exported.model
    assert (vae.name, vae.config) == (model.name, json.loads(json.dumps(dict(model.config))))
    for name in ("spatial_compression", "temporal_compression", "latent_channels", "tiling"):
        assert getattr(vae, name) == getattr(model, name)


def test_streams_join_to_the_results_of_encode_and_decode(exported):
    vae = load(exported.folder, threads=1)
    x, z, frames = exported.x, exported.z, exported.x.shape[2]
    pieces = list(vae.encode_stream(lambda start, stop: x[:, :, start:stop], frames, seed=3))
    assert_close(np.concatenate([piece.z for piece in pieces], axis=2), vae.encode(x, seed=3).z)
    pixels = list(vae.decode_stream(lambda start, stop: z[:, :, start:stop], z.shape[2], frames))
    assert_close(np.concatenate(pixels, axis=2), vae.decode(z, frames))


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_may_share_a_model(image_vae, engine):
    pytest.importorskip(engine)
    vae = load(image_vae.folder, engine, threads=1)
    clips = [image_vae.x, clip(*image_vae.x.shape)[::-1]]
    wanted = [vae.encode(x).mean for x in clips]
    with ThreadPoolExecutor(len(clips)) as pool:
        found = list(pool.map(lambda number: vae.encode(clips[number % 2]).mean, range(20)))
    for number, mean in enumerate(found):
        assert_close(mean, wanted[number % 2])


@pytest.mark.filterwarnings("error:.*not writable")
def test_a_clip_that_cannot_be_written_to_is_read(image_vae):
    pytest.importorskip("torch")
    x = clip(1, 3, 2, 16, 16)  # one tile, which is not copied
    x.flags.writeable = False
    assert_close(load(image_vae.folder, "torch").encode(x).mean, load(image_vae.folder).encode(x).mean)


def test_any_length_and_size_goes_in_and_comes_back(exported):
    """Smaller than a tile, or no whole number of latents and tiles: shapes are the model's."""
    vae = load(exported.folder, threads=1)
    for t, h, w in ((3, 5, 17), (exported.x.shape[2] + 1, 9, 3)):
        x = clip(2 if t == 3 else 1, 3, t, h, w)
        z = vae.encode(x).z
        assert z.shape == exported.model.latent_shape(x.shape)
        assert vae(x).shape == x.shape
        assert vae.decode(z, t).shape[2] == t and np.isfinite(vae(x)).all()


def test_an_export_leaves_the_model_as_it_was(exported):
    assert [p.name for p in exported.model.get_parameters()] == exported.before
    kinds = {type(cell) for _, cell in exported.model.cells_and_names()}
    assert kinds & set(FORMS["cpu"].values()) and not kinds & set(FORMS["export"].values())


@pytest.mark.full
def test_attention_that_large_tiles_compute_in_pieces_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(DotProductAttention, "most_scores", 2 * 64 * 20)  # 20 of 64 queries at once
    made = Exported("image_vae", tmp_path)
    assert_close(load(tmp_path).decode(made.z, made.x.shape[2]), made.y)


def test_frames_that_fill_a_tile_do_not_change_images(image_vae):
    """Frames know nothing of each other there, so a tile that is filled is a tile that is cut short."""
    x = clip(1, 3, 3, 16, 16)
    assert_close(load(image_vae.folder).encode(x).mean, image_vae.model.encode(ms.Tensor(x)).mean.asnumpy())


@pytest.mark.full
@pytest.mark.parametrize("name", ["dc_ae", "temporal_vae"])
def test_an_export_for_images_is_the_model_on_images(name, tmp_path):
    from mg.deploy.export import export_model

    config, tiles, shape = CASES[name]
    model = randomized(create_model(name, **config))
    described = export_model(model, tmp_path, frames=1, size=tiles["size"], spatial_overlap=tiles["spatial_overlap"])
    model.enable_tiling(**described["tiling"])
    vae, x = load(tmp_path), clip(2, 3, 1, *shape[3:])
    mean = model.encode(ms.Tensor(x)).mean
    assert_close(vae.encode(x).mean, mean.asnumpy())
    assert_close(vae.decode(mean.asnumpy(), 1), model.decode(mean, 1).asnumpy())
    assert_close(vae.decode(mean.asnumpy()), model.decode(mean).asnumpy())
    with pytest.raises(ValueError, match="x has 2 frames, but this export is for images"):
        vae.encode(clip(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match="z has 2 frames, but this export is for images"):
        vae.decode(clip(1, model.latent_channels, 2, 2, 2))


def test_a_sample_depends_on_its_seed_and_spreads_as_the_posterior(image_vae):
    vae = load(image_vae.folder)
    z, mean, logvar = vae.encode(image_vae.x, seed=7)
    assert np.array_equal(z, vae.encode(image_vae.x, seed=7).z)
    assert not np.array_equal(z, vae.encode(image_vae.x, seed=8).z)
    noise = (z - mean) / np.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


WITHOUT_MINDSPORE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mindspore", "torch", "onnx", "safetensors", "yaml", "jsonargparse"}:
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Refuse())
import numpy as np
from mg.deploy import load

vae = load(sys.argv[1], sys.argv[2])
x = np.load(sys.argv[3])
encoded = vae.encode(x)
np.save(sys.argv[4], vae.decode(encoded.mean, x.shape[2]))
"""


@pytest.mark.parametrize("engine", ("onnxruntime", "openvino"))
def test_a_machine_without_mindspore_runs_an_export(image_vae, tmp_path, engine):
    pytest.importorskip(engine)
    np.save(tmp_path / "x.npy", image_vae.x)
    words = [image_vae.folder, engine, tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run([sys.executable, "-c", WITHOUT_MINDSPORE, *map(str, words)], check=True, cwd=ROOT)
    assert_close(np.load(tmp_path / "y.npy"), image_vae.y)


MINDIR = """
import sys
import mg
import mindspore as ms
import numpy as np

run = ms.nn.GraphCell(ms.load(sys.argv[1]))
np.save(sys.argv[3], run(ms.Tensor(np.load(sys.argv[2]))).asnumpy())
"""


def test_mindir_runs_in_a_fresh_process(tmp_path):
    from mg.deploy.export import export_model

    model, x = randomized(create_model("image_vae", **IMAGE_VAE)), clip(1, 3, 2, 8, 8)
    described = export_model(model, tmp_path / "out", format="mindir", frames=2, size=8)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["decoder.mindir", "deploy.json", "encoder.mindir"]
    assert described["networks"]["encoder"]["output"] == (1, 8, 2, 4, 4)
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "other").stat().st_mode}
    np.save(tmp_path / "x.npy", x)
    words = [tmp_path / "out" / "encoder.mindir", tmp_path / "x.npy", tmp_path / "moments.npy"]
    subprocess.run([sys.executable, "-c", MINDIR, *map(str, words)], check=True, cwd=ROOT)
    assert_close(np.load(tmp_path / "moments.npy"), model.encode_moments(ms.Tensor(x)).asnumpy())
    with pytest.raises(ValueError, match="the networks are mindir; export the model with --format onnx"):
        load(tmp_path / "out")


# Faults.


def test_a_missing_engine_or_feature_is_one_line(image_vae, monkeypatch):
    import onnxruntime

    for engine in ENGINES:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, engine, None)
            with pytest.raises(ValueError, match=f"not installed .*: pip install {engine}"):
                load(image_vae.folder, engine)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="this onnxruntime has no CUDA: .* pip install onnxruntime-gpu"):
        load(image_vae.folder, device="cuda")
    with pytest.raises(ValueError, match="bf16', which onnxruntime does not run. Use engine torch or openvino,"):
        load(image_vae.folder, precision="bf16")
    with pytest.raises(ValueError, match="fp16', which onnxruntime runs only on CUDA. Use engine torch,"):
        load(image_vae.folder, precision="fp16")
    with pytest.raises(ValueError, match="fp16', which OpenVINO does not run here. Use engine torch"):
        load(image_vae.folder, "openvino", precision="fp16")
    with pytest.raises(ValueError, match="compile is for engine torch"):
        load(image_vae.folder, compile=True)
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match="tf32', which needs .*device cuda"):
            load(image_vae.folder, engine, precision="tf32")
    with pytest.raises(ValueError, match="OpenVINO runs only on CPUs here"):
        load(image_vae.folder, "openvino", device="cuda")
    for wrong in ({"engine": "tensorrt"}, {"precision": "int8"}, {"device": "gpu"}, {"threads": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must be"):
            load(image_vae.folder, **wrong)


class FakeCuda:
    """A session of onnxruntime as on a machine with a GPU."""

    def __init__(self, graph, options, providers):
        self.graph, self.providers = graph, providers

    def get_providers(self):
        return [provider if isinstance(provider, str) else provider[0] for provider in self.providers]

    def get_inputs(self):
        return [SimpleNamespace(name="input")]

    def run(self, outputs, inputs):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 42")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_cuda_gets_the_precision_asked_for_and_tiles_too_large_are_named(image_vae, monkeypatch, precision):
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    opened, preloaded = [], []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: preloaded.append(True))
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened.append(FakeCuda(*a, **k)) or opened[-1])
    vae = load(image_vae.folder, precision=precision)
    assert preloaded and [session.providers[0][1]["use_tf32"] for session in opened] == [int(precision == "tf32")] * 2
    for session in opened:
        model = onnx.load_from_string(session.graph) if precision == "fp16" else onnx.load(session.graph)
        halves = [weight for weight in model.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16]
        assert bool(halves) == (precision == "fp16")
    with pytest.raises(MemoryError, match=r"decoder.onnx: not enough memory for tiles of \d+x\d+x\d+; .*--size"):
        vae.decode(image_vae.z)


def test_bf16_runs_where_the_cpu_has_it_and_says_so_elsewhere(image_vae):
    openvino = pytest.importorskip("openvino")
    load(image_vae.folder, "openvino")  # OpenVINO looks at the CPU once, and is to see it without mg's limit
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        found = load(image_vae.folder, "openvino", "bf16").decode(image_vae.z)
        error = np.abs(found - image_vae.y).max() / np.abs(image_vae.y).max()
        assert 1e-5 < error < 0.1  # really low, and no lower than it should be
    else:
        with pytest.raises(ValueError, match="precision is 'bf16', which this CPU .* has no instructions for"):
            load(image_vae.folder, "openvino", "bf16")


def test_norms_softmax_and_the_last_convolution_stay_in_fp32_under_bf16(image_vae):
    """Seen in what OpenVINO would compile: it has marks for all of their operators, and for one convolution."""
    openvino = pytest.importorskip("openvino")
    from mg.deploy.engines import _partly_in_fp32

    core = openvino.Core()
    plain = core.read_model(image_vae.folder / "decoder.onnx")
    model = _partly_in_fp32(core, plain)
    marked = [op.get_type_name() for op in model.get_ops() if "DisablePrecisionConversion_0" in dict(op.get_rt_info())]
    assert set(marked) == {"Softmax", "ReduceMean", "ReduceSum", "Sqrt", "Subtract", "Divide", "Convolution"}
    assert marked.count("Convolution") == 1
    assert len(model.get_ops()) == len(plain.get_ops())


def test_a_graph_in_fp16_is_close_and_keeps_in_fp32_what_needs_it(exported, tmp_path):
    """By onnxruntime's CPU, which computes in fp32 but rounds to fp16 where the graph does."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    from mg.deploy.half_precision import read_in_fp16

    for path in sorted(exported.folder.glob("*.onnx")):
        model, rng = read_in_fp16(path), np.random.default_rng(0)
        weights = {weight.name: weight.data_type for weight in model.graph.initializer}
        *convolutions, last = (node for node in model.graph.node if node.op_type == "Conv")
        assert {weights[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT16}
        assert weights[last.input[1]] == onnx.TensorProto.FLOAT
        casts = {node.output[0]: node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"}
        inputs = {
            name for node in model.graph.node if node.op_type in ("Softmax", "Sqrt", "Sub") for name in node.input
        }
        assert onnx.TensorProto.FLOAT16 not in {casts.get(name) for name in inputs}
        run, run_half = (
            onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            for graph in (str(path), model.SerializeToString())
        )
        (given,) = run.get_inputs()
        x = rng.standard_normal(given.shape, np.float32)
        wanted, found = (session.run(None, {given.name: x})[0] for session in (run, run_half))
        assert found.dtype == np.float32
        assert 1e-5 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.01


# PyTorch.


def test_torch_runs_norms_attention_and_upsampling_as_one_operator_each(exported):
    """Of the operators that they consist of in ONNX, only those of linear attention are left."""
    pytest.importorskip("torch")
    from mg.deploy.torch_graph import read_network

    left, found = set(), set()
    for made in exported.described["networks"].values():
        for node in read_network(exported.folder / made["file"]).graph.nodes:
            (found if node.op == "call_function" else left).add(getattr(node.target, "__name__", None))
    assert not found & {"sqrt", "square", "sigmoid", "softmax", "sub", "_interleave", "interpolate"}
    assert found & {"_group_norm", "_rms_norm"} and "silu" in found
    assert "_upsample" in found or exported.model.name == "temporal_vae"
    assert "_attention" in found or exported.model.name == "dc_ae"


@pytest.mark.parametrize("precision, least, most", [("bf16", 1e-4, 0.05), ("fp16", 1e-5, 0.01)])
def test_half_precision_in_torch_is_close(image_vae, precision, least, most):
    torch = pytest.importorskip("torch")
    vae = load(image_vae.folder, "torch", precision, device="cpu", threads=1)
    kinds = {parameter.dtype for parameter in vae.networks["decoder"].run.module.parameters()}
    assert kinds == {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}  # norms in fp32
    *_, last = (p for p in vae.networks["decoder"].run.module.parameters() if p.ndim > 3)
    assert last.shape[0] == 3 and last.dtype == torch.float32
    for found, wanted in ((vae.decode(image_vae.z), image_vae.y), (vae.encode(image_vae.x).z, image_vae.z)):
        assert found.dtype == np.float32
        assert least < np.abs(found - wanted).max() / np.abs(wanted).max() < most


def save_graph(path: Path, nodes: list, shape: tuple[int, ...], constants: dict[str, np.ndarray]) -> None:
    """A graph from x, of this shape, to y."""
    import onnx
    from onnx import helper, numpy_helper

    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, of) for name, of in (("x", shape), ("y", None)))
    arrays = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], arrays)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


# Operators on their own, as no whole model has them: name, constants after x, attributes.
ALONE = [
    ("DepthToSpace", (), {"blocksize": 2, "mode": "DCR"}),
    ("Resize", ("", np.float32([1, 1, 2, 2])), {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}),
    ("Softmax", (), {"axis": 1}),
    *((op, (np.int64([1]),), {"keepdims": 1}) for op in ("ReduceMax", "ReduceMin", "ReduceSum", "ReduceSumSquare")),
    *((op, (np.float32([[1.5], [2.5]]),), {}) for op in ("Sub", "Div")),
    ("MatMul", (np.float32([[1.5], [2.5], [0.5]]),), {}),
    *((op, (), {}) for op in "Sqrt Exp Log Erf Reciprocal Tanh Neg Abs Sigmoid Relu".split()),
    ("Pad", (np.int64([0, 0, 1, 0, 0, 0, 2, 1]),), {"mode": "edge"}),
    ("Slice", (np.int64([1]), np.int64([6]), np.int64([1]), np.int64([2])), {}),
]


@pytest.mark.parametrize("op, constants, attributes", ALONE, ids=[op for op, *_ in ALONE])
def test_an_operator_in_torch_gives_what_onnx_defines(tmp_path, op, constants, attributes):
    torch = pytest.importorskip("torch")
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    from mg.deploy.torch_graph import read_network

    x = np.random.default_rng(0).uniform(0.5, 2, (2, 8, 2, 3)).astype(np.float32)
    arrays = {f"c{i}": array for i, array in enumerate(constants) if isinstance(array, np.ndarray)}
    names = [f"c{i}" if f"c{i}" in arrays else "" for i in range(len(constants))]
    save_graph(tmp_path / "one.onnx", [helper.make_node(op, ["x", *names], ["y"], **attributes)], x.shape, arrays)
    wanted = ReferenceEvaluator(str(tmp_path / "one.onnx")).run(None, {"x": x})[0]
    assert_close(read_network(tmp_path / "one.onnx")(torch.from_numpy(x)).numpy(), wanted)


def test_convolutions_that_share_a_bias_run_in_half_precision(tmp_path):
    """As exports of untrained models do, whose biases are all zero; only the last convolution is in fp32."""
    torch = pytest.importorskip("torch")
    import onnx
    from onnx import helper

    from mg.deploy.half_precision import read_in_fp16
    from mg.deploy.torch_graph import read_network

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 4, 4), np.float32)
    weights = {name: rng.standard_normal((2, 2, 1, 1), np.float32) for name in "vw"}
    nodes = [helper.make_node("Conv", [x, w, "b"], [y], kernel_shape=[1, 1]) for x, w, y in ("xvh", "hwy")]
    save_graph(tmp_path / "two.onnx", nodes, x.shape, weights | {"b": np.zeros(2, np.float32)})
    wanted = np.einsum("im,mj,bjhw->bihw", weights["w"][:, :, 0, 0], weights["v"][:, :, 0, 0], x)
    found = read_network(tmp_path / "two.onnx", torch.bfloat16)(torch.from_numpy(x)).numpy()
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    kinds = {weight.name: weight.data_type for weight in read_in_fp16(tmp_path / "two.onnx").graph.initializer}
    assert kinds == dict(
        w=onnx.TensorProto.FLOAT,
        b=onnx.TensorProto.FLOAT,
        v_fp16=onnx.TensorProto.FLOAT16,
        b_fp16=onnx.TensorProto.FLOAT16,
    )


def test_a_second_run_of_onnxruntime_takes_no_more_memory_than_the_first(tmp_path):
    from onnx import helper

    x = np.ones((1, 8, 1024, 512), np.float32)  # 16 MB
    nodes = [helper.make_node("Conv", ["x", f"w{name}"], [name], kernel_shape=[1, 1]) for name in "abcdef"]
    nodes.append(helper.make_node("Sum", list("abcdef"), ["y"]))
    save_graph(
        tmp_path / "sum.onnx", nodes, x.shape, {f"w{name}": np.ones((8, 8, 1, 1), np.float32) for name in "abcdef"}
    )
    run = opener("onnxruntime", "fp32", "cpu", threads=1)(tmp_path / "sum.onnx")
    run(x)
    after_one = memory.resident()
    for _ in range(2):
        run(x)
    assert memory.resident() - after_one < 2 * x.nbytes


def test_an_operator_that_torch_does_not_know_is_named(image_vae, tmp_path):
    pytest.importorskip("torch")
    import onnx

    folder = copy_of(image_vae, tmp_path)
    model = onnx.load(folder / "decoder.onnx")
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "HardSwish"
    onnx.save(model, folder / "decoder.onnx")
    with pytest.raises(ValueError, match=r"decoder.onnx: cannot be opened \(engine torch has no operator HardSwish"):
        load(folder, "torch")


def test_what_torch_lacks_is_one_line(image_vae, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but this PyTorch cannot start it: .* Or use device cpu"):
        load(image_vae.folder, "torch", device="cuda")
    with pytest.raises(ValueError, match="tf32', which needs device cuda. Use fp32, or bf16"):
        load(image_vae.folder, "torch", "tf32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    with pytest.raises(ValueError, match=r"bf16', which V100 has no instructions for; use fp16"):
        load(image_vae.folder, "torch", "bf16")


def test_torch_leaves_its_global_settings_as_they_were(image_vae):
    torch = pytest.importorskip("torch")
    from mg.deploy.torch_engine import _settings

    def settings():
        cudnn = torch.backends.cudnn
        return cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads()

    before = settings()
    for precision, tf32 in (("tf32", True), ("bf16", False)):
        with _settings(True, precision, None):
            assert settings() == (True, tf32, tf32, before[3]) and torch.is_inference_mode_enabled()
    with _settings(False, "fp32", before[3] + 1):
        assert torch.get_num_threads() == before[3] + 1
    assert settings() == before


def test_torch_that_cannot_compile_runs_uncompiled_and_says_so_once(image_vae, monkeypatch, caplog):
    torch = pytest.importorskip("torch")

    def compiled(module, dynamic):
        def run(x):
            raise RuntimeError("no compiler\n  is here")

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    vae = load(image_vae.folder, "torch", device="cpu", threads=1, compile=True)
    for _ in range(2):
        assert_close(vae.decode(image_vae.z), image_vae.y)
    lines = [record.getMessage() for record in caplog.records if "cannot compile" in record.getMessage()]
    assert lines == ["decoder.onnx: PyTorch cannot compile it here (no compiler is here); it runs uncompiled"]


@pytest.mark.full
def test_compiled_by_torch_an_export_is_the_same(image_vae, caplog):
    pytest.importorskip("torch")
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    vae = load(image_vae.folder, "torch", device="cpu", threads=1, compile=True)
    assert_close(vae.decode(image_vae.z), image_vae.y)
    assert "cannot compile" not in caplog.text


def test_tiles_too_large_for_torch_are_named(image_vae, monkeypatch):
    torch = pytest.importorskip("torch")
    vae = load(image_vae.folder, "torch", device="cpu")

    def fail(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vae.networks["decoder"].run, "module", fail)
    with pytest.raises(MemoryError, match=r"decoder.onnx: not enough memory for tiles of \d+x\d+x\d+; .*--size"):
        vae.decode(image_vae.z)


LIMITS = """
import os, sys
import mg
from mg.deploy.engines import whole_instruction_set

before = os.environ["ONEDNN_MAX_CPU_ISA"]
with whole_instruction_set():
    within = os.environ.get("ONEDNN_MAX_CPU_ISA")
print(before, within, os.environ["ONEDNN_MAX_CPU_ISA"])
"""


@pytest.mark.parametrize(
    "given, said", [({}, "AVX2 None AVX2"), ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, "SSE41 SSE41 SSE41")]
)
def test_mindspores_limit_is_lifted_for_other_libraries_and_the_users_is_not(given, said):
    names = ("ONEDNN_MAX_CPU_ISA", "MG_LIMITS_ONEDNN")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    run = subprocess.run([sys.executable, "-c", LIMITS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == said, run.stderr


def test_arrays_of_other_shapes_and_kinds_are_refused(image_vae):
    vae = load(image_vae.folder)
    for x in (clip(3, 2, 8, 8), clip(1, 4, 2, 8, 8), clip(1, 3, 0, 8, 8)):
        with pytest.raises(ValueError, match=r"x has shape .*; it must be \(B, 3, T, H, W\)"):
            vae.encode(x)
    with pytest.raises(ValueError, match=r"z has shape .*; it must be \(B, 4, T, H, W\)"):
        vae.decode(clip(1, 3, 2, 8, 8))
    with pytest.raises(ValueError, match="x has dtype uint8"):
        vae.encode(np.zeros((1, 3, 2, 8, 8), np.uint8))


def copy_of(image_vae, folder: Path) -> Path:
    for path in image_vae.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_incomplete_export_is_named(image_vae, tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}: not an exported model, there is no deploy.json"):
        load(tmp_path)
    folder = copy_of(image_vae, tmp_path)
    settings = folder / "deploy.json"
    good = json.loads(settings.read_text())
    settings.write_text(json.dumps({**good, "version": 2}))
    with pytest.raises(ValueError, match="deploy.json: its version is 2; only 1 can be read"):
        load(folder)
    settings.write_text(json.dumps({**good, "networks": None}))
    with pytest.raises(ValueError, match="deploy.json: does not describe an exported model"):
        load(folder)
    settings.write_text("{")
    with pytest.raises(ValueError, match="deploy.json: not a JSON file"):
        load(folder)
    settings.write_text(json.dumps(good))
    for engine in ENGINES:
        (folder / "encoder.onnx").write_bytes(b"no graph")
        with pytest.raises(ValueError, match="encoder.onnx: cannot be opened"):
            load(folder, engine)
    (folder / "encoder.onnx").unlink()
    with pytest.raises(OSError, match="encoder.onnx: no such file"):
        load(folder)


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def write_quickly(network, shape, file: Path) -> tuple[Path, tuple[int, ...]]:
    """A network that no engine runs, in a file with its weights next to it."""
    file.write_bytes(b"graph")
    if file.suffix == ".onnx":
        file.with_name(f"{file.name}.data").write_bytes(b"weights")
        return file, shape
    weights = file.with_name(f"{file.stem}_variables")
    weights.mkdir(mode=0o700)
    (weights / "data_0").write_bytes(b"weights")
    graph = file.rename(file.with_name(f"{file.stem}_graph.mindir"))
    for path in (weights / "data_0", graph):
        path.chmod(0o400)  # as MindSpore does
    return graph, shape


FILES = {
    "onnx": ["decoder.onnx", "decoder.onnx.data", "deploy.json", "encoder.onnx", "encoder.onnx.data"],
    "mindir": ["decoder_graph.mindir", "decoder_variables", "decoder_variables/data_0", "deploy.json"]
    + ["encoder_graph.mindir", "encoder_variables", "encoder_variables/data_0"],
}


@pytest.fixture
def export_quickly(image_vae, monkeypatch):
    """Exports the image VAE's networks without converting them -> what the folder contains."""
    from mg.deploy import export

    for format in FILES:
        monkeypatch.setitem(export._WRITERS, format, write_quickly)

    def run(folder: Path, format: str = "onnx", checkpoint: str = "") -> dict[str, bytes | None]:
        export.export_model(image_vae.model, folder, checkpoint, format, frames=2, size=16)
        return content(folder)

    return run


def test_an_earlier_export_is_replaced(export_quickly, tmp_path):
    for format in ("onnx", "mindir", "mindir", "onnx"):
        assert sorted(export_quickly(tmp_path, format)) == FILES[format]


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_an_export_that_fails_leaves_the_earlier_one_whole(image_vae, export_quickly, tmp_path, monkeypatch):
    from mg.deploy import export

    folder = copy_of(image_vae, tmp_path)
    before = content(folder)

    def write_the_first(network, shape, file):
        return (no_space if file.stem == "decoder" else write_quickly)(network, shape, file)

    for patched, error, message in (
        ((export._WRITERS, "onnx", write_the_first), OSError, f"No space left on device.*{folder}/decoder.onnx'"),
        ((sys.modules, "onnx", None), ValueError, "format is 'onnx', which needs onnx .*: pip install onnx"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(*patched)
            with pytest.raises(error, match=message):
                export_quickly(folder)
        assert content(folder) == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=f"No space left on device.*{folder}/deploy.json'"):
            export_quickly(folder)
    assert content(folder) == before
    load(folder)


@pytest.mark.parametrize("killed", [False, True])
def test_deploy_json_is_there_only_with_all_files_wherever_an_export_stops(
    export_quickly, tmp_path, monkeypatch, killed
):
    replace, stops = os.replace, 0
    new = export_quickly(tmp_path / "new", "mindir", "new")

    def stop(*paths):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        replace(*paths)

    while True:
        folder, left = tmp_path / str(stops), stops + 1
        old = export_quickly(folder, checkpoint="old")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            if killed:  # and so removes nothing
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            with contextlib.suppress(KeyboardInterrupt):
                export_quickly(folder, "mindir", "new")
        if left:
            break  # it needed fewer replacements
        stops += 1
        if (folder / "deploy.json").exists():
            assert {name: data for name, data in content(folder).items() if not name.startswith(".")} == old
        assert export_quickly(folder, "mindir", "new") == new
    assert stops > len(FILES["onnx"])


def test_files_are_on_disk_before_deploy_json_is_there(export_quickly, tmp_path, monkeypatch):
    fsync, replace = os.fsync, os.replace
    synced, missing = set(), []

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(old, new):
        if Path(new) == tmp_path / "deploy.json":
            files = [path for path in (Path(old), *tmp_path.rglob("[de]*coder*")) if path.stat().st_ino not in synced]
            missing.extend(files)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    for format in FILES:
        export_quickly(tmp_path, format)
    assert not missing


def test_what_a_killed_export_left_is_removed(export_quickly, tmp_path):
    hidden = tmp_path / ".export-k1ll3d_0"
    (hidden / ".export-abcd1234").mkdir(parents=True)
    (hidden / "encoder.onnx").write_bytes(b"half")
    assert sorted(export_quickly(tmp_path)) == FILES["onnx"]


@pytest.mark.parametrize("earlier", [False, True], ids=["alone", "beside an export"])
@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        "yolo.onnx",
        "yolo.onnx.data",
        "a.onnx/",
        "yolo.mindir",
        "b_variables",
        "run_variables/",
        ".export-",
    ],
)
def test_a_folder_with_other_contents_is_not_touched(image_vae, export_quickly, tmp_path, name, earlier):
    if earlier:
        copy_of(image_vae, tmp_path)
    other = tmp_path / name
    if name.endswith("/"):
        other.mkdir()
        other = other / "data"
    other.write_text("x")
    (tmp_path / ".export-k1ll3d_0").mkdir()
    before = content(tmp_path)
    with pytest.raises(
        ValueError, match=f"--target {tmp_path}: contains something other than an export, {Path(name)};"
    ):
        export_quickly(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "settings",
    ['{"name": "production"}', '{"networks": {"encoder": {"file": "../encoder.onnx"}}}', "[]", "{", None],
    ids=["no networks", "elsewhere", "a list", "half", "a folder"],
)
def test_a_deploy_json_of_others_is_not_touched(export_quickly, tmp_path, settings):
    (tmp_path / "out").mkdir()
    (tmp_path / "encoder.onnx").write_text("x")
    (tmp_path / "out" / "encoder.onnx").write_text("x")
    if settings is None:
        (tmp_path / "out" / "deploy.json").mkdir()
    else:
        (tmp_path / "out" / "deploy.json").write_text(settings)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="contains something other than an export, (deploy.json|encoder.onnx);"):
        export_quickly(tmp_path / "out")
    assert content(tmp_path) == before


def test_what_arrives_during_an_export_is_not_touched(export_quickly, tmp_path, monkeypatch):
    from mg.deploy import export

    def write(network, shape, file):
        (tmp_path / "encoder.onnx").write_text("x")
        return write_quickly(network, shape, file)

    monkeypatch.setitem(export._WRITERS, "onnx", write)
    with pytest.raises(ValueError, match="contains something other than an export, encoder.onnx;"):
        export_quickly(tmp_path)
    assert content(tmp_path) == {"encoder.onnx": b"x"}


@pytest.mark.parametrize(
    "name, tiles, message",
    [
        ("tae", {"frames": 12}, "frames is 12; tae needs a multiple of 8, or 1 for images"),
        ("hunyuan_vae", {"frames": 16}, "frames is 16; hunyuan_vae needs a multiple of 4, plus 1, or 1 for images"),
        ("temporal_vae", {"frames": 16}, "frames is 16; temporal_vae needs its micro_frame_size, 17, or 1 for images"),
        ("temporal_vae", {"encode_overlap": 4}, "encode_overlap is 4; it must be 0"),
        ("dc_ae", {"size": 100}, "size is 100; dc_ae needs a multiple of 32"),
        ("tae", {"encode_overlap": 32}, "encode_overlap is 32; it must be a multiple of 8 from 0 to 24"),
    ],
)
def test_tiles_that_do_not_fit_the_model_name_the_option(name, tiles, message):
    assert message in refusal(name, **tiles)


def refusal(name: str, **tiles) -> str:
    with pytest.raises(ValueError) as error:
        tiles_of(name, **tiles)
    return str(error.value)


def tiles_of(name: str, **tiles):
    """Tiles of an export of the released size, of which nothing is built."""
    from mg.deploy.networks import tiling_of
    from mg.models import model_class

    cls = model_class(name)
    model = cls.__new__(cls)
    time, space, lead = {"tae": (8, 8, 0), "hunyuan_vae": (4, 8, 1), "temporal_vae": (4, 8, 0), "dc_ae": (4, 32, 0)}[
        name
    ]
    object.__setattr__(model, "geometry", Geometry(3, 4, space, time, lead))
    object.__setattr__(model, "config", model.default_config)
    names = ("frames", "size", "encode_overlap", "decode_overlap", "spatial_overlap")
    return tiling_of(model, *(tiles.get(name) for name in names))


def test_tiles_are_the_models_own_by_default_and_keep_their_share_of_overlap():
    tiling, frames, size = tiles_of("hunyuan_vae")
    assert (frames, size, tiling.encode_tile, tiling.encode_overlap) == (65, 256, 64, 16)
    tiling, frames, _ = tiles_of("hunyuan_vae", frames=17)
    assert (tiling.encode_tile, tiling.encode_overlap, tiling.decode_overlap) == (16, 4, 4)
    tiling, frames, size = tiles_of("tae", frames=16)
    assert (size, tiling.encode_overlap, tiling.decode_overlap) == (256, 0, 8)
    assert tiles_of("temporal_vae")[1:] == (17, 256)


def test_the_tool_exports_a_checkpoint_and_a_mistake_is_one_line(image_vae, tmp_path, monkeypatch, capsys):
    image_vae.model.save_weights(tmp_path / "vae.ckpt")

    def tool(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "tools" / "export_onnx.py"), run_name="__main__")
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out, said.err

    target = tmp_path / "out"
    tiles = ("--frames", 2, "--size", 16, "--spatial_overlap", 4)
    code, out, _ = tool("--ckpt_path", tmp_path / "vae.ckpt", "--target", target, *tiles)
    assert code == 0 and "encoder: (1, 3, 2, 16, 16) -> (1, 8, 2, 8, 8)" in out
    vae = load(target)
    assert_close(vae.decode(image_vae.z), image_vae.y)
    assert len(vae.sha256) == 64
    for words, message in (
        (("--ckpt_path", tmp_path / "none.ckpt", "--target", target), "none.ckpt: no such checkpoint"),
        (("--ckpt_path", tmp_path / "vae.ckpt", "--target", target, "--size", 15), "size is 15"),
        (("--target", target), "must be given"),
    ):
        code, out, err = tool(*words)
        assert code == 2 and message in err and "Traceback" not in err
