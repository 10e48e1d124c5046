"""Weight files: every format and type comes back exactly, and nothing in a foreign file is trusted."""

import json
import os
import pickle
import random
import stat
import zipfile

import numpy as np
import pytest
from weight_files import some_tensors, whole_files

from mg.checkpoints import (
    CheckpointError,
    atomic_write,
    compare_names,
    find_config,
    open_state_dict,
    read_state_dict,
    write_state_dict,
)
from mg.checkpoints.atomic import remove_leftovers

FORMATS = ("safetensors", "ckpt")


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Round trips.


@pytest.mark.parametrize("suffix", FORMATS)
def test_fp32_comes_back_bit_for_bit(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    write_state_dict(path, some_tensors())
    assert_same(read_state_dict(path), some_tensors())
    assert np.signbit(read_state_dict(path)["special"][4])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", ("fp16", "bf16"))
def test_half_precision_rounds_as_torch_does_and_widens_exactly(tmp_path, suffix, dtype):
    torch = pytest.importorskip("torch")
    numbers = np.random.default_rng(1).standard_normal(10000).astype(np.float32)
    numbers[:5] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-20  # halfway cases
    write_state_dict(tmp_path / f"w.{suffix}", {"x": numbers, "n": np.arange(3)}, dtype)
    found = read_state_dict(tmp_path / f"w.{suffix}")
    rounded = torch.from_numpy(numbers).to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).float().numpy()
    np.testing.assert_array_equal(found["x"], rounded)
    assert found["x"].dtype == np.float32 and found["n"].dtype == np.int64


def test_a_number_too_large_for_the_type_is_an_error_not_an_infinity(tmp_path):
    with pytest.raises(CheckpointError, match="big: 7e[+]04 is too large for fp16"):
        write_state_dict(tmp_path / "w.ckpt", {"big": np.array([7e4, np.inf], np.float32)}, "fp16")
    assert not list(tmp_path.iterdir())


def test_double_precision_narrows_to_float32(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    safetensors_numpy.save_file({"x": np.array([0.1])}, tmp_path / "w.safetensors")
    assert read_state_dict(tmp_path / "w.safetensors")["x"] == np.float32(0.1)


def test_safetensors_files_are_those_of_the_safetensors_package(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    wanted = {name: np.ascontiguousarray(array) for name, array in some_tensors().items() if array.shape}
    save_file(wanted, tmp_path / "theirs.safetensors")
    assert_same(read_state_dict(tmp_path / "theirs.safetensors"), wanted)
    write_state_dict(tmp_path / "ours.safetensors", wanted, metadata={"format": "np"})
    assert_same(load_file(tmp_path / "ours.safetensors"), wanted)
    with safe_open(tmp_path / "ours.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "np"}


def test_safetensors_do_not_depend_on_the_order_of_the_dict(tmp_path):
    tensors = some_tensors()
    write_state_dict(tmp_path / "a.safetensors", tensors)
    write_state_dict(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ("fp32", "fp16", "bf16"))
def test_mindspore_reads_the_ckpt_files_written_here(tmp_path, dtype):
    import mindspore as ms

    wanted = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7), "s": np.array(1.5, np.float32)}
    write_state_dict(tmp_path / "w.ckpt", wanted, dtype)
    found = ms.load_checkpoint(str(tmp_path / "w.ckpt"), crc_check=True)
    assert str(found["w"].dtype) == {"fp32": "Float32", "fp16": "Float16", "bf16": "BFloat16"}[dtype]
    assert_same({name: p.float().asnumpy() if name != "n" else p.asnumpy() for name, p in found.items()}, wanted)


@pytest.mark.parametrize("crc_check", (False, True))
def test_ckpt_files_that_mindspore_writes_are_read(tmp_path, crc_check):
    import mindspore as ms

    wanted = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.array([0.5], np.float16)}
    saved = [{"name": name, "data": ms.Tensor(array)} for name, array in wanted.items()]
    saved.append({"name": "brain", "data": ms.Tensor([1.0, -3.0], ms.bfloat16)})
    extra = {"epoch": 3, "note": "café"}
    ms.save_checkpoint(saved, str(tmp_path / "w.ckpt"), append_dict=extra, crc_check=crc_check)
    found = read_state_dict(tmp_path / "w.ckpt")
    np.testing.assert_array_equal(found["w"], wanted["w"])
    np.testing.assert_array_equal(found["brain"], np.array([1.0, -3.0], np.float32))
    assert found["half"].dtype == np.float32 and found["half"] == [0.5]
    assert found["epoch"] == 3 and found["epoch"].shape == () and str(found["note"]) == "café"


def test_a_ckpt_tensor_in_slices_is_joined(tmp_path):
    import mindspore as ms

    array = np.arange(600, dtype=np.float32).reshape(3, 200)
    from mindspore.train import serialization

    whole, serialization.SLICE_SIZE = serialization.SLICE_SIZE, 1  # KB
    try:
        ms.save_checkpoint([{"name": "w", "data": ms.Tensor(array)}], str(tmp_path / "w.ckpt"))
    finally:
        serialization.SLICE_SIZE = whole
    np.testing.assert_array_equal(read_state_dict(tmp_path / "w.ckpt")["w"], array)


# PyTorch's files.


@pytest.mark.parametrize("suffix", ("pt", "pth", "bin"))
@pytest.mark.parametrize("zipped", (True, False))
def test_torch_files_equal_what_torch_wrote(tmp_path, suffix, zipped):
    torch = pytest.importorskip("torch")
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    state = {
        "fp32": x,
        "shared": x,
        "transposed": x.t(),
        "slice": x[1:4, 2:7:2],
        "bf16": x.bfloat16().t(),
        "fp16": x.half()[2:],
        "fp64": x.double(),
        "int64": torch.arange(5),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(x.clone()),
    }
    path = tmp_path / f"w.{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    wanted = {name: t.detach() for name, t in state.items()}
    assert_same(
        read_state_dict(path), {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in wanted.items()}
    )


def test_a_modules_state_dict_is_found_among_training_leftovers(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2)
    for key in ("state_dict", "model", "ema"):
        leftovers = {"epoch": 3, "global_step": 7, "lr": 1e-5, "dtype": torch.float32, "size": torch.Size([2])}
        torch.save({key: module.state_dict(), **leftovers, "device": torch.device("cpu")}, tmp_path / "w.pt")
        found = read_state_dict(tmp_path / "w.pt")
        assert_same(found, {name: t.numpy() for name, t in module.state_dict().items()})


def test_two_state_dicts_in_one_file_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"several state dicts \(model, ema\)"):
        read_state_dict(tmp_path / "w.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "w.pt")


class _RunsCode:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", (True, False))
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    state = {"state_dict": {"w": torch.zeros(1)}, "hook": _RunsCode(tmp_path / "ran")}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"w\.pt: .*posix\.mkdir.*refused"):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


# Files that lie.


def torch_zip(path, shape, strides, offset=0, count=4, compress=zipfile.ZIP_STORED):
    """A file as torch writes them, one storage of four floats, with a description of our own making."""
    text = (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(count) + b"tQ"
    )
    text += number(offset) + sequence(shape) + sequence(strides) + b"\x89NtRs."
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", text)
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def sequence(values) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def test_a_hand_made_torch_file_reads(tmp_path):
    torch_zip(tmp_path / "w.pt", (2, 2), (1, 2))
    np.testing.assert_array_equal(read_state_dict(tmp_path / "w.pt")["w"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    "lie",
    (
        dict(shape=(2, 3), strides=(3, 1)),
        dict(shape=(4,), strides=(1,), offset=1),
        dict(shape=(2,), strides=(2**62,)),
        dict(shape=(2**40, 2**40), strides=(0, 0)),
        dict(shape=(2,), strides=(-1,), offset=1),
        dict(shape=(-2,), strides=(1,)),
        dict(shape=(2,), strides=(1,), offset=-1),
        dict(shape=(2, 2), strides=(1,)),
        dict(shape=(4,), strides=(1,), count=2**50),
        dict(shape=(4,), strides=(1,), count=-4),
        dict(shape=(2.0,), strides=(1,)),
        dict(shape=(4,), strides=(1,), compress=zipfile.ZIP_DEFLATED),
    ),
)
def test_a_torch_file_that_lies_about_sizes_is_refused(tmp_path, lie):
    torch_zip(tmp_path / "w.pt", **lie)
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "text",
    (
        b"\x80\x02}r\xff\xff\xff\xff.",  # a memo of 2**32 slots
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes without end
        b"\x80\x02" + b"(" * 200000 + b".",
        b"\x80\x02" + b"]" + b"]a" * 10 + b".",
        b"",
    ),
)
def test_a_pickle_made_to_exhaust_memory_is_refused(tmp_path, text):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("archive/data.pkl", text)
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "w.pt")


def safetensors_file(path, header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "lie",
    (
        dict(header={"w": entry()}, length=2**63),
        dict(header={"w": entry()}, length=10),
        dict(header={"w": entry(shape=(5,))}),
        dict(header={"w": entry(end=2**50, shape=(2**48,))}),
        dict(header={"w": entry(begin=-16, end=0)}),
        dict(header={"w": entry(shape=(-2, -2))}),
        dict(header={"w": entry(shape=(4.0,))}),
        dict(header={"w": entry(dtype="F8_E4M3")}),
        dict(header={"w": entry(dtype=["F32"])}),
        dict(header={"w": entry(), "v": entry()}),
        dict(header={"w": entry()}, data=b"\0" * 17),
        dict(header={"w": {"dtype": "F32"}}),
        dict(header={"w": 3}),
        dict(header=[1]),
        dict(header={}, data=b""),
        dict(header=b"\xff\xfe"),
        dict(header=b"[" * 100000),
        dict(header=b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}"),
    ),
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, lie):
    safetensors_file(tmp_path / "good.safetensors", {"w": entry()})
    assert read_state_dict(tmp_path / "good.safetensors")["w"].shape == (4,)
    safetensors_file(tmp_path / "w.safetensors", **lie)
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        read_state_dict(tmp_path / "w.safetensors")


def test_a_ckpt_that_lies_about_its_shape_is_refused(tmp_path):
    from mindspore.train.checkpoint_pb2 import Checkpoint

    for dims in ([1000, 1000], [-8], [2**62, 4], [7]):
        checkpoint = Checkpoint()
        value = checkpoint.value.add(tag="w")
        value.tensor.dims.extend(dims)
        value.tensor.tensor_type = "Float32"
        value.tensor.tensor_content = b"1234" * 8
        (tmp_path / "w.ckpt").write_bytes(checkpoint.SerializeToString())
        with pytest.raises(CheckpointError, match=r"w\.ckpt: w: shape"):
            read_state_dict(tmp_path / "w.ckpt")


def test_a_flipped_bit_in_a_ckpt_written_here_is_noticed(tmp_path):
    write_state_dict(tmp_path / "w.ckpt", some_tensors())
    data = bytearray((tmp_path / "w.ckpt").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "w.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC"):
        read_state_dict(tmp_path / "w.ckpt")


def test_truncated_files_are_refused_at_every_length(tmp_path):
    for path in whole_files(tmp_path):
        data = path.read_bytes()
        lengths = {0, 1, 2, 7, 8, 9, 100, *range(200, len(data) - 17, 211), len(data) - 17}
        for length in sorted(lengths | {len(data) - 1}):
            if path.suffix == ".ckpt" and length == len(data) - 17:
                continue  # without its CRC it is a whole file of MindSpore's
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=path.name):
                read_state_dict(path)


def test_damaged_bytes_raise_nothing_but_checkpoint_errors(tmp_path):
    rng = random.Random(0)
    refused = 0
    for path in whole_files(tmp_path):
        data = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            start = rng.choice((0, 0, len(data) - 400))
            for _ in range(rng.choice((1, 1, 8))):
                damaged[start + rng.randrange(min(1200, len(data) - start))] = rng.choice((0, 255, rng.randrange(256)))
            path.write_bytes(damaged)
            try:
                read_state_dict(path)
            except CheckpointError as error:
                assert str(path) in str(error) and "\n" not in str(error)  # noqa: PT017  # most files are refused
                refused += 1
    assert refused > 300


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "w.txt").write_text("weights")
    (tmp_path / "w.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("w.txt", "not a weight file"),
        ("w.pt", "a Git LFS pointer"),
        ("none.ckpt", "no such file or folder"),
        ("empty", "holds no weights"),
    ):
        with pytest.raises(CheckpointError, match=reason) as raised:
            read_state_dict(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)


# Folders.


def test_folders_of_ours_and_of_diffusers_are_read(tmp_path):
    tensors = {"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}
    theirs = "diffusion_pytorch_model.safetensors"
    for where in ("model.safetensors", theirs, f"vae/{theirs}"):
        path = tmp_path / where.replace("/", "_") / where
        write_state_dict(path, tensors)
        (path.parent / "config.json").write_text("{}")
        folder = tmp_path / where.replace("/", "_")
        assert_same(read_state_dict(folder), tensors)
        assert find_config(folder) == path.parent / "config.json"
    (path.parent / "diffusion_pytorch_model.json").write_text("{}")
    assert find_config(path).name == "diffusion_pytorch_model.json"


def test_sharded_folders_are_read_and_their_shards_stay_inside(tmp_path):
    tensors = {"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    for name, array in tensors.items():
        write_state_dict(tmp_path / f"part-{name}.safetensors", {name: array})
    index.write_text(json.dumps({"weight_map": {"a": "part-a.safetensors", "b": "part-b.safetensors"}}))
    assert_same(read_state_dict(tmp_path), tensors)
    for shards, reason in (
        ({"a": "../part-a.safetensors"}, "must be a file next to it"),
        ({"a": "part-a.safetensors", "c": "part-b.safetensors"}, "c and 0 more are in no shard"),
        ({"a": "part-z.safetensors"}, "No such file"),
        ([], "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(CheckpointError, match=reason):
            read_state_dict(tmp_path)


def test_an_opened_file_reads_only_what_is_asked_for(tmp_path):
    path = tmp_path / "w.safetensors"
    write_state_dict(path, {"a": np.ones(2, np.float32), "b": np.zeros((300, 1000), np.float32)})
    with open_state_dict(path) as state:
        assert state.shapes == {"a": (2,), "b": (300, 1000)} and "a" in state and "c" not in state
        os.truncate(path, 5000)
        np.testing.assert_array_equal(state["a"], [1, 1])
        with pytest.raises(CheckpointError, match="became shorter"):
            state["b"]


# Writing whole or not at all.


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "w.ckpt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == path.suffix
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_left_is_removed_but_not_what_is_being_written(tmp_path):
    long = "x" * 80
    others = ["a.mp4", ".a.mp4", ".a.0cb6c1bd.png", ".ab.0cb6c1bd.mp4", ".a.0cb6c1.mp4", ".0cb6c1bd.mp4"]
    left = [".a.0cb6c1bd.mp4", ".plain.0cb6c1bd", ".b[1].2.0cb6c1bd.mp4", f".{long[:-10]}.0cb6c1bd.mp4"]
    for name in [*others, *left]:
        (tmp_path / name).touch()
    with atomic_write(tmp_path / "a.mp4") as temporary:
        remove_leftovers(tmp_path, ["a.mp4", "plain", "b[1].2.mp4", f"{long}.mp4"])
        assert {path.name for path in tmp_path.iterdir()} == {*others, temporary.name}
    remove_leftovers(tmp_path / "none", ["a.mp4"])


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_failed_write_of_weights_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    write_state_dict(path, {"w": np.ones(2)})
    with pytest.raises(CheckpointError, match="w2: arrays of object"):
        write_state_dict(path, {"w1": np.ones(100000), "w2": np.array([object()])})
    assert read_state_dict(path)["w"].shape == (2,) and list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "new" / "w.txt") as temporary:
            temporary.write_text("x")
            os.chmod(temporary, 0o400)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "w.txt").stat().st_mode) == 0o640


def test_impossible_targets_are_refused(tmp_path):
    for path, options, reason in (
        ("w.pt", {}, "written to .safetensors or .ckpt"),
        ("w.ckpt", {"dtype": "int8"}, "fp32, fp16, bf16"),
        ("w.ckpt", {"metadata": {"a": "b"}}, "no place for metadata"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            write_state_dict(tmp_path / path, {"w": np.ones(2)}, **options)
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path):
        pass


def test_names_are_compared_both_ways():
    report = compare_names({"a": (2,), "b": (3,), "c": (1, 2)}, {"a": [2], "c": (2, 1), "d": ()})
    assert (report.used, report.missing, report.unexpected) == (["a"], ["b"], ["d"])
    assert report.mismatched == [("c", (2, 1), (1, 2))] and not report.complete
    assert report.summary() == "1 used, 1 missing (b), 1 of another shape (c (2, 1), wanted (1, 2)), 1 left over (d)"
    assert compare_names({"a": (2,)}, {"a": (2,), "b": ()}).complete
