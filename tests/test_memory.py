"""What memory there is: of the machine and of every control group, by either version; None where it is not known."""

from types import SimpleNamespace

import pytest

from mg import memory, runtime

GIB = 2**30


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """An empty /proc and /sys/fs/cgroup, and a function that writes files there."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(**files: object) -> None:
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("DOT", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return write


def test_this_machines_memory_is_known():
    assert memory.available_memory() > 0 and 0 < memory.resident() <= memory.peak_rss()


@pytest.mark.parametrize(
    "device, properties, free",
    [
        ("ascend", dict(total_memory=64, free_memory=40), 40 + 5 - 3),
        ("ascend", dict(total_memory=0, free_memory=0), None),  # not used yet
        ("gpu", dict(total_memory=80), 80 - 3),
        ("gpu", dict(), None),
    ],
)
def test_a_device_has_what_is_free_and_what_its_pool_does_not_use(monkeypatch, device, properties, free):
    monkeypatch.setattr(runtime, "device", lambda: device)
    monkeypatch.setattr(runtime.ms.hal, "get_device_properties", lambda *_: SimpleNamespace(**properties))
    monkeypatch.setattr(runtime.ms.runtime, "memory_reserved", lambda: 5)
    monkeypatch.setattr(runtime.ms.runtime, "memory_allocated", lambda: 3)
    assert runtime.free_memory() == free
    monkeypatch.setattr(runtime, "device", lambda: "cpu")
    assert runtime.free_memory() > 2**20


def test_memory_is_unknown_outside_linux(linux):
    assert memory.available_memory() is memory.peak_rss() is memory.resident() is None


def test_the_machine_without_limits_has_what_is_available(linux):
    linux(proc__meminfo=f"MemTotal: {8 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {3 * 2**20} kB")
    assert memory.available_memory() == 3 * GIB


@pytest.mark.parametrize(
    "groups, files, left",
    [
        ("0::/job", dict(job__memoryDOTmax=2 * GIB, job__memoryDOTcurrent=GIB), 1),
        ("0::/job", dict(job__memoryDOTmax="max", job__memoryDOTcurrent=GIB), 3),
        # A limit above, and files that were read, which count as used but are given up.
        (
            "0::/a/b",
            dict(
                a__b__memoryDOTmax="max",
                a__b__memoryDOTcurrent=GIB,
                a__memoryDOTmax=4 * GIB,
                a__memoryDOTcurrent=3 * GIB,
                a__memoryDOTstat=f"anon 1\ninactive_file {GIB}",
            ),
            2,
        ),
        ("0::/../elsewhere", dict(memoryDOTmax=GIB, memoryDOTcurrent=0), 1),  # a container's own group is the root
        (
            "3:cpu,memory:/docker/x\n0::/",
            dict(memory__memoryDOTlimit_in_bytes=2 * GIB, memory__memoryDOTusage_in_bytes=3 * GIB),
            0,
        ),
        (
            "3:memory:/job\n1:cpu:/",
            dict(memory__job__memoryDOTlimit_in_bytes=2 * GIB, memory__job__memoryDOTusage_in_bytes=GIB),
            1,
        ),
        ("3:memory:/", dict(memory__memoryDOTlimit_in_bytes=2**63 - 4096, memory__memoryDOTusage_in_bytes=0), 3),
    ],
)
def test_what_control_groups_leave_counts(linux, groups, files, left):
    linux(proc__meminfo=f"MemAvailable: {3 * 2**20} kB", proc__self__cgroup=groups)
    linux(**{f"cgroup__{name}": content for name, content in files.items()})
    assert memory.available_memory() == left * GIB


def test_a_process_whose_name_is_not_text_has_a_peak(linux, tmp_path):
    linux(proc__7__status="")
    (tmp_path / "proc" / "7" / "status").write_bytes(b"Name:\t\xff\x85VmHWM: 1 kB\nVmHWM:\t    12 kB\n")
    assert memory.peak_rss(7) == 12 * 1024
