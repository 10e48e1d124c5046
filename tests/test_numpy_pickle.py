"""Pickles of numpy arrays: read as numpy reads them, and nothing but arrays in dicts comes out of a file."""

import os
import pickle

import numpy as np
import pytest

from mg.checkpoints import CheckpointError, read_numpy_pickle


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def write(path, found, protocol=4):
    path.write_bytes(pickle.dumps(found, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_come_back_under_their_keys(tmp_path, protocol):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 2, 4)).astype(np.float32)
    found = {
        "A_0": {"kernel": kernel, "columns": np.asfortranarray(kernel), "turned": kernel.T, "none": kernel[:0]},
        "half": kernel.astype(np.float16),
        "count": np.arange(5),
        "flags": np.array([True, False]),
        "scalar": np.array(2.5),
    }
    arrays = read_numpy_pickle(write(tmp_path / "weights.ckpt", found, protocol))
    assert list(arrays) == ["A_0/kernel", "A_0/columns", "A_0/turned", "A_0/none", "half", "count", "flags", "scalar"]
    for name in ("kernel", "columns", "turned", "none"):
        np.testing.assert_array_equal(arrays[f"A_0/{name}"], found["A_0"][name])
    assert arrays["half"].dtype == arrays["scalar"].dtype == np.float32
    np.testing.assert_array_equal(arrays["half"], found["half"])
    np.testing.assert_array_equal(arrays["flags"], found["flags"])
    assert arrays["count"].dtype == np.int64 and arrays["scalar"] == 2.5


def test_nothing_in_a_file_is_called(tmp_path):
    for function, argument in ((os.mkdir, str(tmp_path / "made")), (eval, "1 / 0")):
        with pytest.raises(CheckpointError, match="refused, nothing was run"):
            read_numpy_pickle(write(tmp_path / "x.ckpt", {"a": Call(function, argument)}))
    with pytest.raises(CheckpointError, match="x.ckpt: a is neither a numpy array nor a dict"):
        read_numpy_pickle(write(tmp_path / "x.ckpt", {"a": Call(np.load, "x.npy")}))
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_pickle_that_is_not_a_dict_of_arrays_is_refused(tmp_path):
    array = np.zeros(4, np.float32)
    loop: dict = {}
    loop["again"] = loop
    twice = {"x": array}
    for found, message in (
        ([array], "what it holds is neither"),
        ({}, "holds no numpy arrays"),
        ({"a": {"b": "text"}}, "a/b is neither"),
        (loop, "again is neither"),
        ({"a": twice, "b": twice}, "b is neither"),
        ({"a": np.zeros(2, ">f4")}, "little-endian"),
        ({"a": np.zeros(2, np.complex64)}, "little-endian"),
        ({"a": np.array([None])}, "little-endian"),
    ):
        with pytest.raises(CheckpointError, match=message) as told:
            read_numpy_pickle(write(tmp_path / "x.ckpt", found))
        assert "x.ckpt" in str(told.value) and "\n" not in str(told.value)


def test_damage_is_reported_and_never_used(tmp_path):
    whole = pickle.dumps({"a": {"b": np.arange(40, dtype=np.float32).reshape(5, 8)}}, 4)
    path = tmp_path / "x.ckpt"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="x.ckpt"):
            read_numpy_pickle(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(whole)
        for at in rng.integers(len(whole), size=2):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            arrays = read_numpy_pickle(path)
        except CheckpointError:
            continue
        assert sum(array.nbytes for array in arrays.values()) <= 2 * len(whole)
    with pytest.raises(CheckpointError, match="none.ckpt: No such file"):
        read_numpy_pickle(tmp_path / "none.ckpt")
