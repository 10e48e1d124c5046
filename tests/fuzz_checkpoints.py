"""Damage weight files at random and read them: nothing may come out but weights or a CheckpointError.

    python tests/fuzz_checkpoints.py FOLDER --cases 3000 --seed 0      # FOLDER holds good files of any format
    python tests/fuzz_checkpoints.py FOLDER --seconds 600 --seed 1

It ends with 1 and the case that did it, left in FOLDER as fuzzed.*, if a read took longer than it may, ran or wrote
anything (every audit event of Python's is watched), took more memory than it may, or raised something else.
"""

import argparse
import encodings.cp437  # what texts of zips and .ckpt files, and lines of errors, take, else imported while watched
import encodings.unicode_escape
import encodings.utf_32_le  # noqa: F401
import faulthandler
import io
import json
import os
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from mg.checkpoints import CheckpointError, read_state_dict

SECONDS = 5  # of the processor's, that a read may take; good files take a thousandth
MEMORY = 256 * 2**20  # bytes that reading may add; the files are of kilobytes
NUMBERS = (0, 1, 2, 4, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
CALLED = ["os system", "builtins eval", "builtins exec", "subprocess Popen", "torch load"]
CALLED += ["collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2"]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


# Blind damage: bytes -> bytes.


def flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def insert(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 2, 7, 64, 300))) + data[at:]


def delete(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 2, 7, 64, 300)) :]


def repeat(data: bytearray, rng: random.Random) -> bytearray:
    start, at = rng.randrange(len(data)), rng.randrange(len(data))
    return data[:at] + data[start : start + rng.randrange(1, 500)] * rng.choice((1, 1, 2, 40)) + data[at:]


def change_number(data: bytearray, rng: random.Random) -> bytearray:
    """Lay a number that lengths trip over anywhere, little- or big-endian."""
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % 256**size
    at = rng.randrange(max(1, min(len(data) - size, rng.choice((64, 2000, len(data))))))
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return data


BLIND = (flip_bits, truncate, insert, delete, repeat, change_number)


# Damage that knows the format, so that it gets past the first check.


def change_pickle(text: bytes, rng: random.Random) -> bytes:
    """Leave out, repeat, move or replace single opcodes, or change their arguments."""
    starts = [position for _, _, position in pickletools.genops(text)]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(parts))
        kind = rng.randrange(8)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            parts.insert(at, rng.choice(parts))
        elif kind == 2:
            parts.insert(rng.randrange(len(parts)), parts.pop(at))
        elif kind == 3:
            parts[at] = rng.choice(opcodes) + parts[at][1:]
        elif kind == 4:
            parts.insert(at, rng.choice(opcodes) + rng.randbytes(rng.choice((0, 1, 4, 8))))
        elif kind == 5:
            number = rng.choice(NUMBERS) * rng.choice((1, 1, -1))
            parts.insert(at, pickle.dumps(number, 2)[2:-1])
        elif kind == 6:
            called = rng.choice(CALLED).replace(" ", "\n")
            argument = pickle.dumps(rng.choice(("echo", (), [1], {"a": 1}, 2**40)), 2)[2:-1]
            parts.insert(
                at, b"c" + called.encode() + b"\n" + argument + rng.choice((b"\x85R", b"R", b"\x81", b"b", b"o"))
            )
        else:
            parts[at] = bytes(flip_bits(bytearray(parts[at]), rng))
        parts = parts or [b"."]
    return b"".join(parts)


def change_zip(data: bytearray, rng: random.Random) -> bytearray:
    """Damage the pickle inside, and write the file again; or numbers of the zip's directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    if rng.random() < 0.3:
        where = data.rfind(b"PK\x01\x02", 0, rng.randrange(len(data) // 2, len(data)))
        if where < 0 or rng.random() < 0.3:
            where = data.rfind(b"PK\x05\x06")
        at, size = where + rng.randrange(4, 46), rng.choice((2, 4))
        data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        return data
    name = next(name for name in records if name.endswith("data.pkl"))
    if rng.random() < 0.9:
        records[name] = change_pickle(records[name], rng)
    else:
        other = rng.choice(list(records))
        records[other] = bytes(rng.choice(BLIND)(bytearray(records[other] or b"\0"), rng))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for key, content in records.items():
            archive.writestr(key, content)
    return bytearray(written.getvalue())


def change_legacy(data: bytearray, rng: random.Random) -> bytearray:
    """Damage one of the pickles that a file before PyTorch 1.6 is a row of."""
    stream, ends = io.BytesIO(data), []
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    number = rng.choice((2, 2, 3, 3, 4))
    start, end = ends[number - 1], ends[number]
    return data[:start] + change_pickle(bytes(data[start:end]), rng) + data[end:]


def change_header(data: bytearray, rng: random.Random) -> bytearray:
    """Change fields of a safetensors header, and its length with it, or not."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    entries = [name for name in header if name != "__metadata__"]
    odd = lambda: rng.choice((*NUMBERS, -1, -(2**63), 1.5, 1e300, None, True, "", "F32", [], {}, [[0]], [2**62] * 200))  # noqa: E731
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(entries)
        entry = header[name]
        kind = rng.randrange(7)
        if kind == 0 or not isinstance(entry, dict):
            header[name] = odd()
        elif kind == 1:
            entry[rng.choice(("dtype", "shape", "data_offsets", "other"))] = odd()
        elif kind == 2:
            entry.pop(rng.choice(list(entry) or [None]), None)
        elif kind == 3 and isinstance(entry.get("shape"), list):
            entry["shape"] = [*entry["shape"], odd()]
        elif kind == 4 and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [rng.choice((number, odd())) for number in entry["data_offsets"]]
        elif kind == 5:
            header[rng.choice(("__metadata__", "", "\0\n", name * 50))] = rng.choice((odd(), entry))
        else:
            entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "C64"))
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = rng.choice((b"[" * 50000, b'{"a":' * 50000, b"9" * 9000, text + text, text.replace(b"]", b"]]")))
    length = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return bytearray(length.to_bytes(8, "little") + text + body)


def change_messages(data: bytearray, rng: random.Random) -> bytearray:
    """Damage a .ckpt near its start, where the messages' tags and lengths are, and leave its CRC out or mend it."""
    data = data[: data.rfind(b"crc_num")]
    data = rng.choice(BLIND)(data, rng)
    if rng.random() < 0.3:
        at = rng.randrange(min(len(data), 200) or 1)
        data[at:at] = rng.choice((b"\x08\x01" * 500, b"\xff" * 12, b"\x0a\x00" * 300, struct.pack("<Q", 2**63)))
    return data


KNOWING = {".safetensors": change_header, ".pt": change_zip, ".bin": change_legacy, ".ckpt": change_messages}


# Watching.


class Watch:
    """What a read did that it must not have: an audit hook, which stays, between `begin` and `end`."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event not in ("open", "builtins.id") or (event == "open" and (arguments[2] or 0) & WRITING):
            self.seen.append((event, str(arguments)[:200]))


class TooLong(BaseException):
    """A read that took longer than it may; no Exception, so that no reader turns it into an error of its own."""


def too_long(*_) -> None:
    raise TooLong


def check(path: Path, watch: Watch) -> str:
    """Read a file; returns "read" or "refused". Anything else that happens is raised."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    watch.seen.clear()
    watch.on = True
    try:
        state = read_state_dict(path)
        outcome = "read"
    except CheckpointError as error:
        outcome = "refused"
        watch.on = False
        if str(path) not in str(error) or "\n" in str(error):
            raise AssertionError(f"an error that is not one line, or names no file: {error}") from error
        if isinstance(error.__cause__, MemoryError):
            raise AssertionError("more memory was asked for than the file has") from error
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
    if watch.seen:
        raise AssertionError(f"it did what reading does not need: {watch.seen}")
    if outcome == "read" and not all(type(name) is str and isinstance(a, np.ndarray) for name, a in state.items()):
        raise AssertionError("something came out that is not weights")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=10**9)
    options = parser.parse_args()

    files = {p: p.read_bytes() for p in sorted(options.folder.iterdir()) if not p.name.startswith("fuzzed")}
    watch, counts, slowest = Watch(), Counter(), 0.0
    signal.signal(signal.SIGPROF, too_long)
    for path in files:
        assert check(path, watch) == "read", path
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY,) * 2)

    begin = time.monotonic()
    for number in range(options.cases):
        if time.monotonic() - begin > options.seconds:
            break
        rng = random.Random(f"{options.seed}/{number}")
        path = rng.choice(list(files))
        data = bytearray(files[path])
        changes = (KNOWING[path.suffix],) * 6 + BLIND
        try:
            for _ in range(rng.choice((1, 1, 1, 2))):
                data = rng.choice(changes)(data, rng)
        except Exception:  # a second change may not know the file again after the first
            pass
        fuzzed = options.folder / f"fuzzed{path.suffix}"
        fuzzed.write_bytes(data)
        faulthandler.dump_traceback_later(60 * SECONDS, exit=True)  # for what no signal interrupts
        start = time.process_time()
        try:
            counts[path.suffix, check(fuzzed, watch)] += 1
        except BaseException as error:
            sys.stderr.write(f"seed {options.seed}, case {number}, {fuzzed}: {type(error).__name__}: {error}\n")
            return 1
        slowest = max(slowest, time.process_time() - start)
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    outcomes = {f"{suffix} {outcome}": count for (suffix, outcome), count in sorted(counts.items())}
    print(json.dumps({"cases": sum(counts.values()), "slowest": round(slowest, 3), "peak_mib": peak, **outcomes}))
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
