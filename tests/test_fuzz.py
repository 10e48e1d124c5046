"""Readers of weights under thousands of damaged files: bounded time and memory, no code run, no other error."""

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from weight_files import whole_files

from mg.checkpoints import CheckpointError, read_state_dict

FUZZ = [sys.executable, str(Path(__file__).with_name("fuzz_checkpoints.py"))]


def fuzz(folder: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([*FUZZ, str(folder), *options], env=environment, capture_output=True, text=True, timeout=300)


def test_damaged_weight_files_are_read_or_refused_and_do_nothing_else(tmp_path):
    whole_files(tmp_path)
    run = fuzz(tmp_path, "--cases", "4000", "--seed", "0")
    assert run.returncode == 0, run.stderr[-2000:]
    counts = json.loads(run.stdout)
    assert counts["cases"] == 4000
    for suffix in (".bin", ".ckpt", ".pt", ".safetensors"):  # damage that is always noticed at once tests little
        assert counts[f"{suffix} refused"] > 300 and counts[f"{suffix} read"] > 20, counts


def test_a_reader_that_would_run_what_a_pickle_names_is_caught(tmp_path):
    whole_files(tmp_path)
    code = (
        "import pickle, sys, fuzz_checkpoints\n"
        "from mg.checkpoints import torch_pickle\n"
        "ours = torch_pickle.Unpickler.find_class\n"
        "trusting = lambda self, module, name: "
        "ours(self, module, name) if 'torch' in module else pickle._Unpickler.find_class(self, module, name)\n"
        "torch_pickle.Unpickler.find_class = trusting\n"
        "sys.exit(fuzz_checkpoints.main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path), "--cases", "4000"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and "pickle.find_class" in run.stderr, run.stderr[-500:]


# A few hundred bytes that take years or terabytes, if they are believed.


def nested(opcode: bytes, depth: int) -> bytes:
    """A tuple in a tuple in a ..."""
    return b")" + opcode * depth


PICKLES = {
    "a key of a dict that overflows the stack": b"}" + nested(b"\x85", 500_000) + b"Ns.",
    "a key of a dict that hashes 2^60 tuples": b"}" + nested(b"2\x86", 60) + b"Ns.",
    "a type of a storage that hashes 2^60 tuples": b"(X\x07\0\0\0storage" + nested(b"2\x86", 60) + b"X\0\0\0\0NK\1tQ.",
    "a name of a class that is none": b")X\x01\0\0\0x\x93.",
    "an ordered dict whose key hashes 2^60 tuples": (
        b"ccollections\nOrderedDict\n" + nested(b"2\x86", 60) + b"N\x86\x85\x85R."
    ),
    "a list that is copied a million times": (
        b"ctorch\nSize\nq\0(" + b"N" * 20_000 + b"t\x85q\x01" + b"h\0h\x01R" * 200_000 + b"."
    ),
    "an array of 2^62 bytes": b"\x96" + (2**62).to_bytes(8, "little") + b".",
    "a memo of 2^32 slots": b"Nr\xff\xff\xff\xff.",
    "a call of a class without its name": b")\x81.",
    "a text that is an integer of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_would_take_forever_is_refused_at_once(tmp_path, what):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + PICKLES[what])
    assert_refused_at_once(tmp_path / "w.pt")


def test_a_tensor_of_a_million_dimensions_is_refused_at_once(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**62] * 300_000, "data_offsets": [0, 16]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert_refused_at_once(tmp_path / "w.safetensors")
    dims = b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * 100_000
    tensor = dims + b"\x12\x07Float32\x1a\x04" + bytes(4)
    value = b"\x0a\x01w\x12" + varint(len(tensor)) + tensor
    (tmp_path / "w.ckpt").write_bytes(b"\x0a" + varint(len(value)) + value)
    assert_refused_at_once(tmp_path / "w.ckpt")


def test_a_zip_that_claims_gigabytes_for_a_record_is_refused_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    data = bytearray((tmp_path / "w.pt").read_bytes())
    compressed = data.rfind(b"PK\x01\x02") + 20
    data[compressed : compressed + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "w.pt").write_bytes(data)
    assert_refused_at_once(tmp_path / "w.pt")


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128, value >> 7 & 127 | 128, value >> 14 & 127 | 128, value >> 21])


def assert_refused_at_once(path: Path) -> None:
    """In a process of its own: a stack that overflows, and a hash in C, cannot be caught here."""
    code = (
        "import resource, sys; from mg.checkpoints import CheckpointError, read_state_dict\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: read_state_dict(sys.argv[1])\n"
        "except CheckpointError as error: sys.exit(3 if not isinstance(error.__cause__, MemoryError) else str(error))"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    begin = children_seconds()
    run = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, timeout=120, capture_output=True)
    assert run.returncode == 3, (run.returncode, run.stderr[-500:])
    assert children_seconds() - begin < 60  # most of it Python's start, on a slow machine


def children_seconds() -> float:
    """What the processes that have ended took of the processor, which no other work on the machine lengthens."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_names_of_a_foreign_file_are_shown_in_one_printable_line(tmp_path):
    name = "two\nlines \x1b[2J" + "x" * 100_000
    header = json.dumps({name: {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError) as error:
        read_state_dict(tmp_path / "w.safetensors")
    assert str(error.value).isprintable() and len(str(error.value)) < 2000 and "two lines \\x1b[2J" in str(error.value)
