"""The ONNX graph of a network: equal to it, of as few and as fast operators as the engines have, and counted right."""

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mg.deploy import operations
from mg.models.hunyuan_vae.blocks import Upsample as HunyuanUpsample
from mg.models.layers.attention import CausalAttention
from mg.models.layers.conv import CausalConv3d, Conv3d, FactorizedConv
from mg.models.layers.forms import in_form
from mg.models.layers.forms.export import double_frames, double_pixels
from mg.models.layers.norm import GroupNorm
from mg.models.layers.resample import SpatialUpsample, TemporalUpsample

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def converted(network: nn.Cell, x: np.ndarray, folder):
    """The network as ONNX, the operators in it by name, and the largest error of onnxruntime's result, relative."""
    from mg.deploy.converters import convert
    from mg.deploy.mindir import read_graph

    rng = np.random.default_rng(1)  # its own: errors are not to depend on which tests ran before
    for name, p in network.parameters_and_names():
        p.set_data(Tensor(rng.normal(float(name.endswith("gamma")), 0.3, p.shape).astype(np.float32)))
    with in_form(network, "export"):
        ms.export(network, Tensor(x), file_name=str(folder / "x"), file_format="MINDIR")
    weights = {p.name: p.asnumpy() for p in network.get_parameters()}
    model = convert(read_graph(folder / "x.mindir", weights.get), "x", "y")
    onnx.checker.check_model(model, full_check=True)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    wanted = network(Tensor(x)).asnumpy()
    assert found.shape == wanted.shape
    return model, [node.op_type for node in model.graph.node], np.abs(found - wanted).max() / np.abs(wanted).max()


def clip(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


def nearest(x, frames):
    x = double_pixels(x)
    return double_frames(x) if frames == 2 else x


class NearestConv3d(nn.Cell):
    """As Video DC-AE's upsampling has it."""

    def __init__(self, channels: int, frames: int, conv: nn.Cell | None = None):
        super().__init__()
        self.frames, self.conv = frames, conv or Conv3d(channels, channels)

    def construct(self, x):
        return self.conv(nearest(x, self.frames))


def test_a_dense_3d_convolution_is_one_conv(tmp_path):
    model, found, error = converted(Conv3d(3, 4, stride=(2, 2, 2)), clip(1, 3, 4, 6, 6), tmp_path)
    assert found == ["Conv"] and error < 1e-5
    assert [len(node.input) for node in model.graph.node] == [3]  # the bias is part of it


def test_the_zeros_before_a_causal_convolution_are_its_pads(tmp_path):
    model, found, error = converted(CausalConv3d(3, 4), clip(1, 3, 4, 6, 6), tmp_path)
    assert found == ["Conv"] and error < 1e-5
    attributes = {item.name: list(item.ints) for item in model.graph.node[0].attribute}
    assert attributes["pads"] == [2, 1, 1, 0, 1, 1]


def test_repeated_edges_are_one_pad(tmp_path):
    _, found, error = converted(CausalConv3d(3, 4, padding="replicate"), clip(1, 3, 4, 6, 6), tmp_path)
    assert found == ["Pad", "Conv"] and error < 1e-5


@pytest.mark.parametrize("kernel, stride", [(3, (1, 1, 1)), (5, (2, 1, 1))])
def test_a_depthwise_3d_convolution_is_a_sum_of_depthwise_ones(tmp_path, kernel, stride):
    conv = Conv3d(6, 6, kernel, stride, bias=False, depthwise=True)
    model, found, error = converted(conv, clip(1, 6, 4, 6, 6), tmp_path)
    assert found.count("Conv") == kernel and error < 1e-5
    groups = [item.i for node in model.graph.node for item in node.attribute if item.name == "group"]
    assert groups == [6] * kernel


def test_a_factorized_convolution_has_no_constants_but_weights(tmp_path):
    model, found, error = converted(FactorizedConv(3, 4), clip(1, 3, 4, 6, 6), tmp_path)
    assert found.count("Conv") == 2 and found.count("Transpose") == 2 and error < 1e-5
    shapes = [tuple(constant.dims) for constant in model.graph.initializer if len(constant.dims) > 1]
    assert sorted(shapes) == [(4, 3, 3, 3), (4, 4, 3, 1)]


def test_group_norm_and_silu(tmp_path):
    class Block(nn.Cell):
        def __init__(self):
            super().__init__()
            self.norm = GroupNorm(8, 4)

        def construct(self, x):
            return ops.silu(self.norm(x)) + x

    _, found, error = converted(Block(), clip(2, 8, 3, 4, 4), tmp_path)
    assert error < 1e-5
    assert "InstanceNormalization" not in found and found[-5:] == ["Mul", "Add", "Sigmoid", "Mul", "Add"]
    assert found.count("Reshape") == 4  # to rows, twice, and of mean and deviation to channels


def test_group_norm_is_as_exact_over_millions_of_values(tmp_path):
    openvino = pytest.importorskip("openvino")
    x = clip(1, 4, 8, 256, 256) + np.float32(0.7)
    x[:, :, :2] = 5  # frames of a single colour, whose variance is tiny next to their mean
    model, _, error = converted(GroupNorm(4, 1), x, tmp_path)
    assert error < 1e-5  # InstanceNormalization: 3e-4
    onnx.save(model, tmp_path / "norm.onnx")
    found = openvino.Core().compile_model(tmp_path / "norm.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]
    wanted = onnxruntime.InferenceSession(tmp_path / "norm.onnx").run(None, {"x": x})[0]
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("frames", [1, 2])
def test_nearest_neighbour_is_one_resize(tmp_path, frames):
    class Nearest(nn.Cell):
        def construct(self, x):
            return nearest(x, frames)

    _, found, error = converted(Nearest(), clip(1, 2, 3, 4, 5), tmp_path)
    assert error == 0 and found.count("Resize") == 1
    assert found.count("Expand") == frames - 1


@pytest.mark.parametrize(
    "upsample, shape, taps",
    [
        (SpatialUpsample(4), (1, 4, 3, 4, 5), 4 * 4),
        (TemporalUpsample(4), (1, 4, 3, 4, 5), 2 * 2),
        (TemporalUpsample(4, "zeros"), (2, 4, 2, 4, 5), 2 * 2),
        (HunyuanUpsample(4, (1, 2)), (1, 4, 3, 4, 5), 4 * 4 * 3),
        (HunyuanUpsample(4, (2, 2)), (1, 4, 3, 4, 5), 4 * 4 * 3),  # only the first frame comes once
        (NearestConv3d(4, 1), (1, 4, 3, 4, 5), 4 * 4 * 3),
        (NearestConv3d(4, 2), (1, 4, 3, 4, 5), 8 * 8),
    ],
)
def test_a_convolution_after_nearest_neighbour_runs_on_the_small_grid(tmp_path, upsample, shape, taps):
    """`taps`: of all kernels, one for each phase."""
    model, found, error = converted(upsample, clip(*shape), tmp_path)
    assert error < 1e-5 and "Resize" not in found
    shapes = [tuple(constant.dims) for constant in model.graph.initializer if len(constant.dims) > 3]
    assert sum(math.prod(kernel[2:]) for kernel in shapes) == taps


def test_nearest_neighbour_before_other_convolutions_stays(tmp_path):
    """A stride, and a kernel of 1, see samples as they stand."""
    for conv in (Conv3d(4, 4, stride=(1, 2, 2)), Conv3d(4, 4, 1)):
        _, found, error = converted(NearestConv3d(4, 1, conv), clip(1, 4, 3, 4, 5), tmp_path)
        doubled = "Resize" if conv.kernel_size == 3 else "Expand"  # of a kernel of 1 the pixels lie in a row
        assert error < 1e-5 and doubled in found and found.count("Conv") == 1


def test_causal_attention(tmp_path):
    _, found, error = converted(CausalAttention(8, 4), clip(1, 8, 3, 2, 2), tmp_path)
    assert found.count("Softmax") == 3 and error < 1e-5


class Assorted(nn.Cell):
    """Operators that the models have none of, or only in other forms."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.zeros((6, 4), np.float32)), name="weight")

    def construct(self, x):  # (2, 4, 6)
        y = ops.sqrt(ops.abs(x) + 1.0) - 2.0 * x[:, ::2].sum(axis=1, keepdims=True)
        y = ops.relu(y) / (1.0 + ops.exp(-x)) + ops.sigmoid(x).mean(axis=(1, 2), keep_dims=True)
        first, second = ops.split(y, 3, axis=2)
        y = ops.stack((first, second[:, :, ::1]), axis=1).reshape(2, 4, 6)  # (2, 2, 4, 3)
        y = ops.bmm(y, y.transpose(0, 2, 1))  # (2, 4, 4)
        y = ops.matmul(self.weight.transpose(1, 0).reshape(4, 6)[:, 1:5], y) * ops.tanh(x[:, :, -1:])
        return ops.concat((y, x[0:1].broadcast_to((2, 4, 6))), axis=-1)[:, 3].expand_dims(1).square()


def test_assorted_operators(tmp_path):
    _, _, error = converted(Assorted(), clip(2, 4, 6), tmp_path)
    assert error < 1e-5


def test_an_operator_without_a_converter_is_named(tmp_path):
    class Network(nn.Cell):
        def construct(self, x):
            return ops.erfinv(ops.tanh(x))

    with pytest.raises(ValueError, match="no ONNX converter for MindSpore's Erfinv"):
        converted(Network(), clip(1, 3), tmp_path)


def test_weights_that_mindspore_stores_separately_are_found(tmp_path, monkeypatch):
    from mg.deploy.export import _write_mindir, _write_onnx

    conv, x = Conv3d(3, 4), clip(1, 3, 4, 6, 6)
    monkeypatch.setattr("mindspore.train.serialization.TOTAL_SAVE", 0)
    assert _write_onnx(conv, x.shape, tmp_path / "net.onnx") == (tmp_path / "net.onnx", (1, 4, 4, 6, 6))
    found = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"input": x})[0]
    assert np.abs(found - conv(Tensor(x)).asnumpy()).max() < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert _write_mindir(conv, x.shape, tmp_path / "net.mindir") == (tmp_path / "net_graph.mindir", (1, 4, 4, 6, 6))
    assert np.abs(nn.GraphCell(ms.load(str(tmp_path / "net_graph.mindir")))(Tensor(x)).asnumpy() - found).max() < 1e-5


def test_weights_above_protobufs_limit_are_stored_next_to_the_graph(tmp_path, monkeypatch):
    from mg.deploy import onnx_graph

    monkeypatch.setattr(onnx_graph, "_LARGEST", 1000)
    x = clip(1, 8, 3, 6, 6)
    model, _, _ = converted(Conv3d(8, 8), x, tmp_path)
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    onnx_graph.write_model(model, tmp_path / "net.onnx")
    assert sorted(path.name for path in tmp_path.glob("net*")) == ["net.onnx", "net.onnx.data"]
    assert np.array_equal(onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x})[0], wanted)
    assert operations(tmp_path / "net.onnx") == operations(model) == 2 * 8 * 8 * 27 * 3 * 6 * 6


def test_operations_are_two_per_multiply_add():
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT

    def constant(name: str, *shape: int):
        return onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2], group=2),  # (2, 6, 4, 4)
        helper.make_node("ConvTranspose", ["a", "v"], ["b"], strides=[2, 2]),  # (2, 5, 8, 8)
        helper.make_node("Reshape", ["b", "s"], ["c"]),  # (2, 320)
        helper.make_node("MatMul", ["c", "m"], ["d"]),
        helper.make_node("Gemm", ["d", "g"], ["y"], transA=1, transB=1),
    ]
    shape = onnx.numpy_helper.from_array(np.int64([2, -1]), "s")
    weights = [constant("w", 6, 2, 3, 3), constant("v", 6, 5, 2, 2), constant("m", 320, 7), constant("g", 9, 2), shape]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, (2, 4, 8, 8))],
        [helper.make_tensor_value_info("y", kind, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    conv, transposed = 2 * (2 * 6 * 4 * 4) * (2 * 9), 2 * (2 * 6 * 4 * 4) * (5 * 4)
    assert operations(model) == conv + transposed + 2 * 2 * 320 * 7 + 2 * 7 * 9 * 2
