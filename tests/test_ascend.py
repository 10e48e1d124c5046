"""The static check for Ascend: what MindSpore's plugin selects for every graph is read rightly, and judged by rules.

The graphs themselves are compiled with stand-ins for CANN, which takes x86-64 Linux, g++ and binutils, and the release
of MindSpore whose log is known. Where one of these is not there those tests are skipped, and say so.
"""

import math
import re
import shutil
import sys

import pytest

from mg.ascend import check as ascend_check
from mg.ascend import kernels, liveness, rules, stand_ins
from mg.ascend.check import Check, judge
from mg.ascend.graphs import APART, CONTROLS, INFERENCE, MODELS, Graph, graphs
from mg.ascend.kernels import Kernel, Selection, Tensor
from mg.ascend.sizes import FULL, NARROW, SMALL
from mg.cli import check_device
from mg.models import list_models, model_class


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    lacking = stand_ins.missing()
    if lacking is not None:
        pytest.skip(f"the static check for Ascend cannot run here: {lacking}")
    with Check(tmp_path_factory.mktemp("ascend")) as check:
        yield check


def graph(name: str) -> Graph:
    return Graph(*name.split("/"))


def tensor(*shape: int, dtype: str = "Float32") -> Tensor:
    return Tensor(dtype, shape)


def kernel(primitive: str, inputs: list[Tensor], outputs: list[Tensor], kind: str = "aclnn") -> Kernel:
    return Kernel(primitive, kind, tuple(inputs), tuple(outputs), "Default/a-cell")


# The plugin itself.


@pytest.mark.parametrize(
    "name, said",
    [
        ("refused", "refused: MaxPool"),
        ("on_host", "on the host: Cholesky"),
        ("too_wide", "convolution_width: Conv2D with 4 x 4097 pixels; at most 100000 x 4096"),
        ("grouped", "convolution_groups: Conv2D with 2 groups of 8 channels to 8; must be 1, or one per channel"),
    ],
)
def test_known_faults_are_found(check, name, said):
    assert name in CONTROLS
    finding = check.one(graph(f"control/{name}/bf16/small"))
    assert dict(finding.faults) == {said: 1} and not finding.clean
    assert finding.selection.refused == (name == "refused")


def test_every_kernel_is_counted_that_the_plugin_counts(check):
    finding = check.one(graph("tae/encode/bf16/small"))
    assert finding.clean, finding.lines()
    log = (check.folder / "graphs" / "tae-encode-bf16-small" / "log").read_text(errors="replace")
    # By the kinds of kernels: INTERNAL_KERNEL, OPAPI_KERNEL, ACL_KERNEL, ATB_KERNEL, HCCL_KERNEL, HOST_KERNEL, ...
    said = re.search(r"PrintOpSelectedNum\] ([\d ]+)$", log, re.MULTILINE)[1].split()
    assert [finding.selection.count(kind).total() for kind in ("aclnn", "aclop")] == [int(said[1]), int(said[2])]
    assert {"Conv3DExt", "GroupNorm"} <= {found.primitive for found in finding.selection.kernels}
    assert all(found.inputs and found.outputs for found in finding.selection.kernels if found.primitive == "GroupNorm")
    # A kernel's input and output have to be there at once, and not what all give: the memory of most is used again.
    norms = [found for found in finding.selection.kernels if found.primitive == "GroupNorm"]
    outputs = [output for found in finding.selection.kernels if found.kind == "aclnn" for output in found.outputs]
    least = max(4 * math.prod(norm.inputs[0].shape) + 4 * math.prod(norm.outputs[0].shape) for norm in norms)
    assert least < finding.memory < sum(2 * math.prod(output.shape) for output in outputs) / 2


@pytest.mark.parametrize(
    "name",
    [
        *("image_vae/decode/fp16/small", "lpips/alex/fp32/small", "loss_scale/adjust/fp32/small"),
        "workers/reduce_shards/fp32/small",
    ],
)
def test_graphs_are_clean(check, name):
    finding = check.one(graph(name))
    assert finding.clean, finding.lines()


# Reading and judging.

SAVED = """
subgraph @kernel_graph0() {
  %0(CNode_1) = PrimFunc_Conv2DExt(%para1_x, %para2_w, None, (I64(1)), I64(1)) primitive_attrs: {groups: I64(1)}
      : (<Tensor[BFloat16], (1, 4, 8, 6)>, <Ref[Tensor[BFloat16]], (2, 4, 3, 3), ref_key=w, is_parameter>, \
<None, NoShape>, <Tuple[Int64], TupleShape(NoShape), elements_use_flags={[const vector]{1}}>, <Int64, NoShape>) -> \
(<Tensor[BFloat16], (1, 2, 8, 6)>)
      : (<BFloat16xDefaultFormat[const vector]{1, 4, 8, 6}>) -> (<BFloat16xDefaultFormat[const vector]{1, 2, 8, 6}>)
      # Fullname with scope: (Default/conv-Conv/Conv2DExt-op0)
  %1(CNode_2) = PrimFunc_Reshape(%0, (I64(2), I64(48))) primitive_attrs: {}
      : (<Tensor[BFloat16], (1, 2, 8, 6)>, <Tuple[Int64*2], TupleShape(NoShape, NoShape)>) -> \
(<Tensor[BFloat16], (2, 48)>)
      # Fullname with scope: (Default/Reshape-op0)
  %2(CNode_3) = Cholesky(%1) primitive_attrs: {}
      : (<Tuple[Tensor[Float32]*2,Tensor[Int8]], TupleShape((1, 2), (3), ())>) -> (<Tensor[Float32], ()>)
      # Fullname with scope: (Default/Cholesky-op0)
  Return(%2)
"""
LOG = """
[INFO] DEVICE: [kernel_select_ascend.cc:751] CollectOpSelectedType] Conv2DExt select aclnn kernel
[INFO] DEVICE: [kernel_select_ascend.cc:240] TryBackoffCpu] Try to use backoff CPU kernel, node:Default/Cholesky-op0
"""


def test_a_saved_graph_is_read_with_types_shapes_and_kinds(tmp_path):
    (tmp_path / f"hwopt_d_{kernels.SAVED_AFTER}_0_0001.ir").write_text(SAVED)
    convolution, cholesky = kernels.read(LOG, tmp_path).kernels  # Reshape, of which the log says nothing, is none
    inputs = (tensor(1, 4, 8, 6, dtype="BFloat16"), tensor(2, 4, 3, 3, dtype="BFloat16"))
    outputs = (tensor(1, 2, 8, 6, dtype="BFloat16"),)
    assert convolution == Kernel("Conv2DExt", "aclnn", inputs, outputs, "Default/conv-Conv/Conv2DExt-op0")
    assert cholesky.inputs == (tensor(1, 2), tensor(3), Tensor("Int8", ())) and cholesky.outputs == (tensor(),)
    assert cholesky.kind == "host"


@pytest.mark.parametrize(
    "log, failure, refused",
    [
        ("TypeError: Ascend operator selection failed info: node is Default/MaxPool-op0\n", "refused: MaxPool", True),
        ("Traceback\n  ValueError: not this one\nmindspore.Error: no group\n", "mindspore.Error: no group", False),
        ("", "it ended without an error message", False),
    ],
)
def test_a_missing_graph_is_a_failure_with_its_last_error(tmp_path, log, failure, refused):
    selection = kernels.read(log, tmp_path)
    assert (selection.failure, selection.refused) == (failure, refused)
    assert dict(judge(graph("tae/encode/bf16/small"), selection).faults) == {failure: 1}


# Parameters of 160 and 100 bytes, and a constant of 12 that is there twice. Then, in bytes, call 0 gives 4000 and 40; 9
# reads the 4000, through a view in a tuple; 6 gives 3000, which 7 reads, and 7 gives 6000, which 9 reads; 9 gives 6000,
# which are returned; 10 writes into a parameter; and 12 gives four times LAST.
LIVE = """
%para1_x: <Tensor[Float32], (1, 4, 10)> : [1, 4, 10]  :  <Float32xDefaultFormat[const vector]{1, 4, 10}>
%para2_w.1: <Ref[Tensor[Float32]], (25), ref_key=w.1, is_parameter>  :  has_default  :  IsWeight: true
subgraph @kernel_graph0() {
  %0(CNode_0) = PrimFunc_GroupNorm(%para1_x, Tensor(shape=[3], dtype=Float32, value=
[ 0.00000000e+00,  0.00000000e+00,  0.00000000e+00]
)) {instance name: norm} primitive_attrs: {groups: I64(1)}
      : (<Tensor[Float32], (1, 4, 10)>, <Tensor[Float32], (3), value=...>) -> \
(<Tuple[Tensor[Float32]*2], TupleShape((1000), (10))>)
  %1(CNode_1) = TupleGetItem(%0, I64(0)) primitive_attrs: {}
      : (<Tuple[Tensor[Float32]*2], TupleShape((1000), (10))>, <Int64, NoShape>) -> (<Tensor[Float32], (1000)>)
  %2(CNode_2) = PrimFunc_NarrowView(%1, I64(0), I64(0), I64(500)) cnode_attrs: {enable_view: Bool(1)}
      : (<Tensor[Float32], (1000)>, <Int64, NoShape>) -> (<Ref[Tensor[Float32]], (500), ref_key=0x5, is_view_output>)
  %3(CNode_3) = PrimFunc_Reshape(%2, (I64(5), I64(100)))
      : (<Tensor[Float32], (500)>, <Tuple[Int64*2], TupleShape(NoShape, NoShape)>) -> (<Tensor[Float32], (5, 100)>)
  %4(CNode_4) = MakeTuple(%para2_w.1, %3)
      : (<Tensor[Float32], (25)>, <Tensor[Float32], (500)>) -> (<Tuple[Tensor[Float32]*2], TupleShape((25), (500))>)
  %5(CNode_5) = UpdateState(UMonad[U], %4)
      : (<UMonad, NoShape>, <Tuple[Tensor[Float32]*2], TupleShape((25), (500))>) -> (<UMonad, NoShape>)
  %6(CNode_6) = PrimFunc_Mul(%para1_x, Tensor(shape=[3], dtype=Float32, value=
[ 0.00000000e+00,  0.00000000e+00,  0.00000000e+00]
))
      : (<Tensor[Float32], (1, 4, 10)>, <Tensor[Float32], (3), value=...>) -> (<Tensor[BFloat16], (1500)>)
  %7(CNode_7) = PrimFunc_Cast(%6, I64(43))
      : (<Tensor[BFloat16], (1500)>, <Int64, NoShape>) -> (<Tensor[Float32], (1500)>)
  %8(CNode_8) = TupleGetItem(%4, I64(1))
      : (<Tuple[Tensor[Float32]*2], TupleShape((25), (500))>, <Int64, NoShape>) -> (<Tensor[Float32], (500)>)
  %9(CNode_9) = PrimFunc_Mul(%7, %8)
      : (<Tensor[Float32], (1500)>, <Tensor[Float32], (500)>) -> (<Tensor[Float32], (1500)>)
  %10(CNode_10) = PrimFunc_InplaceCopy(%para2_w.1, %9, Bool(0), %5)
      : (<Ref[Tensor[Float32]], (25), ref_key=w.1, is_parameter>, <Tensor[Float32], (1500)>, <Bool, NoShape>) -> \
(<Ref[Tensor[Float32]], (25), ref_key=w.1, is_parameter, is_inplace>)
  %11(CNode_11) = Depend(%9, %10)
      : (<Tensor[Float32], (1500)>, <Tensor[Float32], (25)>) -> (<Tensor[Float32], (1500)>)
  %12(CNode_12) = PrimFunc_Cast(%para1_x, I64(43))
      : (<Tensor[Float32], (1, 4, 10)>, <Int64, NoShape>) -> (<Tensor[Float32], (LAST)>)
  %13(CNode_13) = MakeTuple(%11, %12)
      : (<Tensor[Float32], (1500)>, <Tensor[Float32], (LAST)>) -> \
(<Tuple[Tensor[Float32]*2], TupleShape((1500), (LAST))>)
  Return(%13)
      : (<Tuple[Tensor[Float32]*2], TupleShape((1500), (LAST))>)
}
"""


@pytest.mark.parametrize("last, most", [(2250, 4000 + 6000 + 6000), (2750, 6000 + 11000)])
def test_memory_is_the_most_that_is_live_at_once(tmp_path, last, most):
    (tmp_path / "graph.ir").write_text(LIVE.replace("LAST", str(last)))
    computing = [kernel(primitive, [], []) for primitive in ("GroupNorm", "Mul", "Cast", "InplaceCopy")]
    selection = Selection((*computing, kernel("NarrowView", [], [], "view")))
    memory = liveness.peak([tmp_path / "graph.ir"], selection)
    assert memory == 160 + 100 + 12 + most
    assert f"| - | {memory / 1e9:.3f} | ok |" in judge(graph("tae/encode/bf16/small"), selection, memory=memory).row()
    assert liveness.peak([], Selection(failure="refused")) == 0


X, W = tensor(1, 8, 4, 4), tensor(8, 8, 3, 3)
WIDE, GROUPED = tensor(1, 8, 4, 5000), tensor(8, 2, 3, 3)


@pytest.mark.parametrize(
    "rule, good, bad",
    [
        ("convolution_width", ("Conv2D", [tensor(1, 8, 4, 4096), W], [X]), ("Conv2D", [tensor(1, 8, 4, 4097), W], [X])),
        ("convolution_width", ("Conv3DExt", [X, W], [X]), ("Conv3DExt", [tensor(1, 8, 2, 4, 5000), W], [X])),
        ("convolution_width", ("Mul", [WIDE], [WIDE]), ("ConvolutionGrad", [X, WIDE, W], [WIDE])),
        ("convolution_groups", ("Conv2D", [X, tensor(8, 1, 3, 3)], [X]), ("Conv2D", [X, GROUPED], [X])),
        ("convolution_groups", ("Conv2D", [X, W], [X]), ("Conv2D", [X, tensor(16, 1, 3, 3)], [X])),
        ("convolution_groups", ("Conv2DBackpropInput", [X, W], [X]), ("Conv2DBackpropInput", [X, GROUPED], [X])),
        ("convolution_groups", ("Conv2DBackpropFilter", [X, X], [W]), ("Conv2DBackpropFilter", [X, X], [GROUPED])),
        ("convolution_groups", ("Conv3DBackpropInput", [W, X], [X]), ("Conv3DBackpropInput", [GROUPED, X], [X])),
        ("convolution_groups", ("Conv3DBackpropFilter", [X, X], [W]), ("Conv3DBackpropFilter", [X, X], [GROUPED])),
        ("convolution_groups", ("ConvolutionGrad", [X, X, W], [X]), ("ConvolutionGrad", [X, X, GROUPED], [X])),
        ("convolution_groups", ("Conv3DExt", [X, tensor(8, 1, 3, 3)], [X]), ("Conv3D", [X, tensor(8, 1, 3, 3)], [X])),
        ("convolution_kernel", ("Conv2D", [X, W], [X]), ("Conv2D", [X, tensor(8, 8, 256, 1)], [X])),
        ("convolution_values", ("Conv2D", [X, W], [X]), ("Conv3D", [tensor(1, 2**13, 2**6, 2**6, 2**6), W], [X])),
        ("pool_dtype", ("MaxPool", [X], [X]), ("MaxPool", [tensor(1, 8, 4, 4, dtype="BFloat16")], [X])),
        ("pieces", ("AddN", [X] * 63, [X], "aclop"), ("AddN", [X] * 64, [X], "aclop")),
        ("pieces", ("Concat", [X] * 64, [X], "aclnn"), ("Split", [X], [X] * 64, "aclop")),
        ("rank", ("Transpose", [tensor(*[2] * 8)], [X]), ("Transpose", [tensor(*[2] * 9)], [X])),
        ("norm_groups", ("GroupNormGrad", [X, X, X], [X]), ("GroupNormGrad", [X, tensor(1, 8001), tensor(1, 1)], [X])),
    ],
)
def test_a_rule_tells_allowed_kernels_from_others(rule, good, bad):
    found = [[line.partition(":")[0] for line in rules.breaks(kernel(*each))] for each in (good, bad)]
    assert rule not in found[0] and rule in found[1]
    assert rule in {each.__name__ for each in rules.RULES}


def test_an_aclop_kernel_is_a_finding_unless_it_is_an_exception(monkeypatch):
    selection = Selection((kernel("Roll", [X], [X], "aclop"), kernel("Mul", [X, X], [X])))
    assert dict(judge(graph("tae/encode/bf16/small"), selection).unlisted) == {"Roll": 1}
    monkeypatch.setitem(rules.ACLOP_INFERENCE, "Roll", "a reason")
    assert judge(graph("tae/encode/bf16/small"), selection).clean
    assert not judge(graph("tae/accumulate/bf16/small"), selection).clean


VIEW = kernel("NarrowView", [X], [X], "view")


def test_an_update_is_at_most_three_launches_for_each_parameter():
    selection = Selection((kernel("Mul", [X, X], [X]),) * 6)
    assert judge(graph("tae/update/fp32/small"), selection, parameters=2).clean
    assert judge(graph("tae/update/fp32/small"), Selection((*selection.kernels, VIEW)), parameters=2).clean
    finding = judge(graph("tae/update/fp32/small"), selection, parameters=1)
    assert dict(finding.faults) == {"more than 3 launches for each of 1 parameters": 1}
    assert finding.row().startswith("| tae/update/fp32/small | 6 | 0 | 0 | 0 | 0 | 0 | 6.0 | - | more than 3 launches")


# What there is to check, and where.


def test_every_model_is_checked_in_both_sizes():
    ours = {name for name in list_models() if model_class(name).__module__.startswith("mg.")}  # tests add others
    assert ours <= set(MODELS) == set(SMALL) == set(FULL) == set(NARROW)
    names = {str(found) for found in graphs()}
    for model in MODELS:
        for part in (*INFERENCE, "accumulate", "checkpointed", "compete"):
            assert {f"{model}/{part}/{dtype}/full" for dtype in ("fp32", "fp16", "bf16")} <= names
        assert {f"{model}/{part}/fp32/small" for part in ("reduce", "update", "update_with_ema")} <= names
    assert set(APART) < {found.model for found in graphs()}
    assert [str(found) for found in graphs(["tae"], ["encode"], ["bf16"], ["full"])] == ["tae/encode/bf16/full"]


def test_unknown_parts_to_check_are_named():
    with pytest.raises(ValueError, match="unknown part 'encoder'; it must be one of encode, encode_image"):
        graphs(["tae"], ["encoder"])


@pytest.mark.parametrize(
    "patch, said",
    [
        (("platform.machine", lambda: "aarch64"), "only runs on x86-64 Linux, and this is Linux on aarch64"),
        (("mg.ascend.stand_ins.version", lambda _: "2.11.0"), "MindSpore 2.10.0, and this is 2.11.0"),
        (
            ("shutil.which", lambda tool: None if tool == "nm" else tool),
            "nm; on Debian and Ubuntu: apt install binutils",
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="says elsewhere that this is not Linux")
def test_a_machine_that_cannot_check_gets_one_line_that_says_what_is_missing(monkeypatch, tmp_path, patch, said):
    for name, value in (
        ("platform.machine", lambda: "x86_64"),
        ("mg.ascend.stand_ins.version", lambda _: "2.10.0"),
        patch,
    ):
        monkeypatch.setattr(name, value)
    with (
        pytest.raises(ValueError, match="the static check for Ascend cannot run here") as error,
        Check(tmp_path / "new"),
    ):
        pass
    assert said in str(error.value) and "\n" not in str(error.value)


def test_kept_graphs_get_their_own_folders(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="is not empty"), Check(tmp_path):
        pass


@pytest.mark.parametrize("faults, code", [(0, 0), (5, 1)])
def test_the_command_prints_a_row_for_every_graph_and_fails_if_one_is_not_clean(monkeypatch, capsys, faults, code):
    wide = [kernel("Conv2D", [tensor(1, 8, 4, 5000 + number), W], [X]) for number in range(faults)]

    class Fake(Check):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def one(self, graph):
            return judge(graph, Selection((kernel("Mul", [X, X], [X]), *wide) if graph.part == "encode" else ()))

    monkeypatch.setattr(check_device, "Check", Fake)
    options = "--static ascend --models tae --parts encode decode --dtypes bf16 --jobs 2 --details True".split()
    monkeypatch.setattr(sys, "argv", ["check_device.py", *options])
    assert check_device.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 graphs for Ascend") and lines[1].count("|") == len(ascend_check.TITLES) + 1
    verdict = "convolution_width: Conv2D with 4 x 5000 pixels; at most 100000 x 4096; " if faults else "ok"
    assert lines[3].startswith(f"| tae/encode/bf16/small | {1 + faults} | 0 | 0 | 0 | 0 | {faults} | - | - | {verdict}")
    assert ("; 2 more |" in lines[3]) == bool(faults) and lines[4].endswith("| ok |")
    assert len(lines) == 5 + faults


# All of them. What is known to be wrong stays here until it is not.


def known(checked: Graph) -> str | None:
    slow = checked.model == "optimizer" and checked.part in ("lion", "adan", "nadam", "lamb", "muon")
    if slow or checked.part == "update_shards":
        return "more than three launches for each parameter"
    return None


@pytest.mark.full
@pytest.mark.parametrize("checked", graphs(sizes=["small"]) + graphs(sizes=["full"], dtypes=["bf16"]), ids=str)
def test_a_graph_is_clean(check, request, checked):
    if known(checked):
        request.applymarker(pytest.mark.xfail(reason=known(checked), strict=True))
    finding = check.one(checked)
    shutil.rmtree(check.folder / "graphs" / str(checked).replace("/", "-"))
    assert finding.clean, finding.lines()


@pytest.mark.full
@pytest.mark.parametrize("model", ["tae", "dc_ae"])
def test_gradient_checkpointing_computes_convolutions_again(check, model):
    counts = []
    for part in ("accumulate", "checkpointed"):
        counts.append(check.one(graph(f"{model}/{part}/bf16/small")).selection.count("aclnn")["Conv3DExt"])
        shutil.rmtree(check.folder / "graphs" / f"{model}-{part}-bf16-small")
    assert counts[1] > 1.25 * counts[0]  # of the model alone, as LPIPS' are in two dimensions; not all are in blocks
