"""Safetensors files written tensor by tensor and piece by piece: as if at once, and complete or refused."""

import io

import numpy as np
import pytest
from safetensors.numpy import load

from mg.checkpoints import CheckpointError
from mg.checkpoints.safetensors_file import PieceWriter, read_entries, read_stretch
from mg.checkpoints.tensors import Source

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_pieces_in_any_order_make_the_tensors():
    file, x, y = io.BytesIO(), array(3, 10, 2, 5), array(2, 4)
    writer = PieceWriter(file, "fp32", room=512)
    writer.add("x", x.shape)
    for start, stop in ((4, 9), (0, 4), (9, 10)):
        writer.write("x", start, x[:, start:stop])
    writer.add("ÿ", y.shape)
    writer.write("ÿ", 0, y)
    assert len(writer) == 2 and writer.size == x.nbytes + y.nbytes
    writer.finish()
    found = load(file.getvalue())
    assert set(found) == {"x", "ÿ"}
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["ÿ"], y)
    source = Source(file)
    entry = read_entries(source)["x"]
    for start, stop in ((0, 10), (3, 7), (9, 10), (5, 5)):
        np.testing.assert_array_equal(read_stretch(source, entry, start, stop), x[:, start:stop])


def test_a_tensor_that_is_dropped_leaves_no_trace():
    file, x = io.BytesIO(), array(2, 6)
    writer = PieceWriter(file, "fp16", room=256)
    for name in ("a", "b", "a2"):
        writer.add(name, x.shape)
        writer.write(name, 0, x if name != "b" else x[:, :3])
        if name == "b":
            writer.drop("b")
    writer.finish()
    found = load(file.getvalue())
    assert set(found) == {"a", "a2"}
    np.testing.assert_array_equal(found["a2"], x.astype(np.float16))


def test_incomplete_tensors_are_refused():
    writer = PieceWriter(io.BytesIO(), "fp16", room=128)
    writer.add("x", (2, 6))
    with pytest.raises(CheckpointError, match=r"x: a piece of shape \(2, 3\) at 4 does not fit into \(2, 6\)"):
        writer.write("x", 4, array(2, 3))
    with pytest.raises(CheckpointError, match="x: 1e.05 is too large for fp16"):
        writer.write("x", 0, np.full((2, 6), 1e5, np.float32))
    writer.write("x", 0, array(2, 5))
    with pytest.raises(CheckpointError, match="x: 4 bytes of it were never written"):
        writer.finish()
    with pytest.raises(CheckpointError, match="x: was already added"):
        writer.add("x", (2, 6))
    assert writer.has_room({"y": (2, 6)}) and not writer.has_room({"y" * 60: (2, 6)})
