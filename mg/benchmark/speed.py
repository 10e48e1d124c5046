"""How fast every model encodes, decodes and trains, compared with a PyTorch network of the same kind.

Each network runs in its own process, so that peak memory is measured per network and thread pools don't interfere. A
model and its peer take turns, and the ratio is taken pair by pair: a temporary slowdown of the machine hits both.
Weights and inputs are random; a training step is forward, backward and AdamW with L1 and KL losses.
"""

import json
import logging
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from mg import runtime
from mg.benchmark.peers import Peer, missing, peer_of
from mg.benchmark.speed_worker import Job, Worker, WorkerError
from mg.checkpoints import atomic_write
from mg.config import require, to_dict
from mg.deploy.autoencoder import SETTINGS_FILE
from mg.models import list_models, model_class
from mg.models.registry import merge_config
from mg.plain_text import text_table

_logger = logging.getLogger(__name__)

# Frames x height x width for each model: small clips that need no padding on any axis.
DEFAULT_SIZES = {
    "tae": "16x64x64",
    "image_vae": "4x64x64",
    "temporal_vae": "17x64x64",
    "hunyuan_vae": "17x64x64",
    "dc_ae": "8x128x128",
}
CUDA_SIZES = {
    "tae": "32x256x256",
    "image_vae": "32x256x256",
    "temporal_vae": "17x256x256",
    "hunyuan_vae": "17x256x256",
    "dc_ae": "16x256x256",
}
PACKAGES = ("mindspore", "numpy", "torch", "diffusers", "onnxruntime", "openvino")


@dataclass(kw_only=True)
class SpeedConfig:
    """Measure how fast models encode, decode and train, compared with a PyTorch network of the same kind.

    Args:
        models: names; by default all.
        parts: encode | decode | train.
        sizes: of the clips, frames x height x width, such as 16x64x64; by default one for each model.
        batch: clips per call.
        runs: pairs of timed runs, after one that compiles.
        threads: processors that a process may use.
        engines: mindspore, and onnxruntime, openvino and torch for exported models; these do not train.
        precisions: fp32 | tf32, on CUDA | fp16 | bf16; one that an engine only emulates here is left out.
        compile: whether engine torch compiles networks; by default on CUDA.
        peer: also measure diffusers' network, if there is one.
        peer_settings: how peers run: channels_last | compile | autocast, instead of weights in fp16 or bf16; by default
            the first, and on CUDA the first two. Of these, training takes only the first.
        operations: count floating-point operations, in an extra process for each row.
        growth: factors, such as 1 2 4, to scale frames, area and batch by, one at a time: writes growth.json and
            growth_MODEL.svg, curves of model and peer, instead of the comparison; for the first engine and precision.
        configs: overrides of models' configs by name, such as {tae: {ch: 32}}.
        device: auto | ascend | gpu | cpu for MindSpore, with peers on the CPU, and only if the models run there too;
            cuda for exported models and peers, with clips that start and end in the host's memory.
        mode: graph | pynative | auto: graph, but pynative for encode and decode on a CPU, as in the commands.
        output_path: folder for speed.json.
    """

    models: list[str] = field(default_factory=list)
    parts: list[Literal["encode", "decode", "train"]] = field(default_factory=lambda: ["encode", "decode", "train"])
    sizes: list[str] = field(default_factory=list)
    batch: int = 1
    runs: int = 5
    threads: int = 2
    engines: list[Literal["mindspore", "onnxruntime", "openvino", "torch"]] = field(
        default_factory=lambda: ["mindspore"]
    )
    precisions: list[Literal["fp32", "tf32", "fp16", "bf16"]] = field(default_factory=lambda: ["fp32"])
    compile: bool | None = None
    peer: bool = True
    peer_settings: list[Literal["channels_last", "compile", "autocast"]] | None = None
    operations: bool = True
    growth: list[int] = field(default_factory=list)
    configs: dict[str, dict] = field(default_factory=dict)
    device: Literal["auto", "ascend", "gpu", "cpu", "cuda"] = "auto"
    mode: Literal["auto", "graph", "pynative"] = "auto"
    output_path: str = "outputs/benchmark_speed"

    def __post_init__(self):
        for name in ("batch", "threads"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(1 <= self.runs <= 1000, self, "runs", "from 1 to 1000")
        for name in ("parts", "engines", "precisions"):
            require(bool(getattr(self, name)), self, name, "one or more")
        require(all(factor >= 1 for factor in self.growth), self, "growth", "factors of at least 1")
        for size in self.sizes:
            _parse_size(size)
        for name in (*self.models, *self.configs):
            merge_config(model_class(name).default_config, self.configs.get(name, {}), name)

    def jobs(self, device: str) -> Iterator[Job]:
        """What to measure, in order, as jobs for the first engine and precision."""
        sizes = CUDA_SIZES if device == "cuda" else DEFAULT_SIZES
        for name in self.models or list_models():
            for size, part in product(self.sizes or [sizes[name]], self.parts):
                yield Job(
                    task="run",
                    engine=self.engines[0],
                    part=part,
                    shape=(self.batch, 3, *_parse_size(size)),
                    model=name,
                    config=self.configs.get(name, {}),
                    precision=self.precisions[0],
                    device=device,
                    mode="graph" if part == "train" and self.mode == "auto" else runtime.chosen_mode(self.mode, device),
                    threads=self.threads,
                    compile=self.compile,
                )


def set_up(device: str, mode: str) -> str:
    """Prepare MindSpore -> the device to measure on. With cuda MindSpore only exports, on the CPU.

    Raises:
        ValueError: the device is not available.
    """
    if device != "cuda":
        return runtime.setup(device, mode).device
    runtime.setup("cpu", mode)
    return "cuda"


def _parse_size(size: str) -> tuple[int, int, int]:
    """16x64x64 -> (16, 64, 64)"""
    parts = size.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"sizes has {size!r}; a size is frames x height x width, such as 16x64x64")
    frames, height, width = map(int, parts)
    return frames, height, width


@dataclass
class Timing:
    """What one process measured.

    Attributes:
        said: the worker's answer to its job, see `Worker`.
        times: seconds of the calls after the first, in order; the first of them shows whether a second clip of the same
            shape compiles again.
        first: seconds of the first call.
        finish: the worker's last answer, see `Worker.finish`.
    """

    said: dict
    first: float
    times: list[float] = field(default_factory=list)
    finish: dict = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def figures(self, shape: tuple[int, ...]) -> dict:
        """The figures reported for every network; `shape` is that of the clips."""
        frames, operations = shape[0] * shape[2], self.finish.get("operations")
        return {
            "seconds": self.median,
            "times": self.times,
            "frames_per_second": frames / self.median,
            "first_call_seconds": self.first,
            "compile_seconds": self.said["compile_seconds"] + max(self.first - self.median, 0.0),
            "build_seconds": self.said["build_seconds"],
            "peak_rss_mb": _megabytes(self.finish["peak_rss"]),
            "peak_device_mb": _megabytes(self.finish.get("peak_device")),
            "operations_per_frame": None if operations is None else operations / frames,
        }


def measure_speed(config: SpeedConfig) -> dict:
    """Measure, and rewrite `speed.json` after each row, so that a killed run keeps its results so far.

    Returns:
        "records": one for each model, size, part, engine and precision that ran; "skipped": lines on what was not
        measured and why; "failed": the same for failures; and the settings, versions and machine.

    Raises:
        ValueError: the device is not available.
    """
    device = set_up(config.device, config.mode)
    found, path = describe(config), Path(config.output_path) / "speed.json"
    no_peer = no_peers(config, device)
    if config.peer and no_peer:
        found["skipped"].append(f"no peers: {no_peer}")
    with TemporaryDirectory() as exports:
        for job, precision, engine in product(config.jobs(device), config.precisions, config.engines):
            job = replace(job, engine=engine, precision=precision, folder=f"{exports}/{job.model}_{size_of(job.shape)}")
            label = f"{job.model} {size_of(job.shape)} {job.part} {engine} {precision}"
            reason = left_out(job)
            if reason:
                found["skipped"].append(f"{label}: {reason}")
                continue
            with row_of(found, label, path):
                found["records"].append(measure(job, config, no_peer))
    write(found, path)
    return found


def no_peers(config: SpeedConfig, device: str) -> str | None:
    """Why no peers are measured; None if they are."""
    if not config.peer:
        return "not requested"
    return missing() if device in ("cpu", "cuda") else f"peers run on the CPU, the models on {device}"


def export_once(job: Job) -> None:
    """Export the job's model to its folder, in a process of its own, unless it is there.

    Raises:
        WorkerError: it cannot be exported.
    """
    if not (Path(job.folder) / SETTINGS_FILE).exists():
        with Worker(replace(job, task="export", engine="mindspore", mode="graph", precision="fp32", device="cpu")):
            pass  # the folder is written once the worker answers


def left_out(job: Job) -> str | None:
    """Why this is not measured; None if it is."""
    if job.engine == "mindspore":
        if job.device == "cuda" or job.precision == "tf32":
            return "device cuda, and tf32, are for exported models; MindSpore's own is --device gpu"
        emulated = job.precision == "bf16" and job.device == "cpu"
        return "bf16 is emulated on CPUs, and its speed is meaningless" if emulated else None
    if job.part == "train":
        return "only MindSpore trains"
    if find_spec(job.engine) is None:
        return f"{job.engine} is not installed: pip install {job.engine}"
    cuda, of_cpu = job.device == "cuda", set(_of_cpu("flags").split())
    if (cuda and job.engine == "openvino") or job.precision not in _precisions(job.engine, cuda):
        return f"{job.engine} has no {job.precision} here"
    if not cuda and job.precision == "bf16" and not {"avx512_bf16", "amx_bf16"} & of_cpu:
        return "this CPU has no bf16"
    if not cuda and job.precision == "fp16" and not {"avx512_fp16", "amx_fp16"} & of_cpu:
        return "this CPU has no fp16"
    return "exported models need square frames" if job.shape[3] != job.shape[4] else None


def _precisions(engine: str, cuda: bool) -> set[str]:
    """What an engine of exported models has; `mg.deploy.load` refuses the rest."""
    low = {"torch": {"fp16", "bf16"}, "openvino": {"bf16"}, "onnxruntime": {"fp16"} if cuda else set()}[engine]
    return {"fp32", *low, *(["tf32"] if cuda else [])}


def measure(job: Job, config: SpeedConfig, no_peer: str | None, reference: bool = True) -> dict:
    """A record of a model and, unless `no_peer` says why not, of its peer, measured at the same time.

    Args:
        reference: also count the operations of the model without its rewrites.
    """
    overall = merge_config(model_class(job.model).default_config, job.config, job.model)
    peer = None if no_peer else peer_of(job.model, overall)
    reason = no_peer or (None if peer else "diffusers has no such network")
    counted = count(job, reference) if config.operations and job.engine == "mindspore" else {}
    with ExitStack() as stack:
        if job.engine != "mindspore":
            if job.folder is None:
                job = replace(job, folder=stack.enter_context(TemporaryDirectory()))
            export_once(job)
        jobs = [job] if peer is None else [job, _peer_job(job, peer, config)]
        timings = take_turns([stack.enter_context(Worker(each)) for each in jobs], config.runs)
    own = timings[0]
    own.finish |= counted
    record = {
        "model": job.model,
        "config": job.config,
        "part": job.part,
        "engine": job.engine,
        "precision": job.precision,
        "device": job.device,
        "mode": job.mode,
        "batch": job.shape[0],
        "size": size_of(job.shape),
        **own.figures(job.shape),
        "of_the_originals_operations": None,
        "peer": None,
        "no_peer": reason,
        "ratio": None,
    }
    if "reference_operations" in counted:
        record["of_the_originals_operations"] = counted["operations"] / counted["reference_operations"]
    if peer is not None:
        record["peer"] = {"name": peer.name, "settings": list(jobs[1].settings), **timings[1].figures(job.shape)}
        record["ratio"] = pairwise_ratio(own.times, timings[1].times)
    return record


def _peer_job(job: Job, peer: Peer, config: SpeedConfig) -> Job:
    device = "cuda" if job.device == "cuda" else "cpu"
    settings = config.peer_settings
    if settings is None:
        settings = ["channels_last", "compile"] if device == "cuda" else ["channels_last"]
    return Job(
        "run",
        "peer",
        job.part,
        job.shape,
        peer.kind,
        peer.config,
        job.precision,
        device,
        threads=job.threads,
        by_frame=peer.by_frame,
        settings=tuple(each for each in settings if job.part != "train" or each == "channels_last"),
    )


def take_turns(workers: list[Worker], runs: int) -> list[Timing]:
    """Time `runs` calls of each worker, one call of each in turn, after a first one that compiles."""
    timings = [Timing(worker.said, worker.run()) for worker in workers]
    for _ in range(runs):
        for worker, timing in zip(workers, timings):
            timing.times.append(worker.run())
    for worker, timing in zip(workers, timings):
        timing.finish = worker.finish()
    return timings


def count(job: Job, reference: bool) -> dict[str, int]:
    """The "operations" of a call of a model in MindSpore, and the "reference_operations" of one without rewrites; both
    are counted in compiled graphs, whatever the job's mode."""
    with Worker(replace(job, task="count", mode="graph", reference=reference)) as worker:
        return worker.said


def pairwise_ratio(times: list[float], peer_times: list[float]) -> dict[str, float]:
    """Our time divided by the peer's, pair by pair: below 1 is faster."""
    ratios = [own / other for own, other in zip(times, peer_times, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def size_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[2:]))


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def describe(config: Any, packages: Sequence[str] = PACKAGES) -> dict:
    """An empty result with the settings, versions and machine of a run."""
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "records": [],
        "skipped": [],
        "failed": [],
        "settings": to_dict(config),
        "versions": {"python": platform.python_version(), **versions},
        "cpu": _of_cpu("model name") or platform.processor(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


@contextmanager
def row_of(found: dict, label: str, path: Path) -> Iterator[None]:
    """Measure a row of the results: if its worker fails, note that instead, and write the results so far to `path`."""
    _logger.info("%s", label)
    try:
        yield
    except WorkerError as error:
        _logger.warning("%s: %s", label, error)
        found["failed"].append(f"{label}: {error}")
    write(found, path)


def write(found: dict, path: Path) -> None:
    """Write the results of a run as a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _of_cpu(name: str) -> str:
    """An entry of /proc/cpuinfo for the first processor; "" if not on Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


COLUMNS = (
    "model", "part", "engine", "mode", "precision", "size", "seconds", "frames/s", "peak MB", "compile s",
    "GFLOP/frame", "of original", "peer s", "peer MB", "time/peer's",
)  # fmt: skip


def format_table(found: dict) -> str:
    """What was measured, as text: a row for each record, the names of peers, and what was left out."""
    table: list[Sequence] = [COLUMNS]
    peers = {}
    for record in found["records"]:
        peer, ratio = record["peer"] or {}, record["ratio"] or {}
        if peer:
            peers[record["model"]] = " ".join([peer["name"], *peer["settings"]])
        cells = [
            *(record[key] for key in ("model", "part", "engine")),
            record["mode"] if record["engine"] == "mindspore" else "-",
            record["precision"],
            record["size"] if record["batch"] == 1 else f"{record['batch']}x {record['size']}",
            *(_number(_peak(record) if key == "peak_mb" else record[key], digits) for key, digits in _DIGITS.items()),
            _number(record["operations_per_frame"] and record["operations_per_frame"] / 1e9, 3),
            _number(record["of_the_originals_operations"], 3),
            _number(peer.get("seconds"), 3),
            _number(_peak({**peer, "device": record["device"]}) if peer else None, 0),
            _number(ratio.get("median"), 2),
        ]
        table.append(cells)
    rows = text_table(table, numbers=False)
    rows += [f"peer of {model}: diffusers' {name}" for model, name in peers.items()]
    alone = {record["model"]: record["no_peer"] for record in found["records"] if record["no_peer"]}
    rows += [f"no peer of {model}: {reason}" for model, reason in alone.items()]
    rows += [f"left out: {line}" for line in found["skipped"]]
    rows += [f"FAILED: {line}" for line in found["failed"]]
    return "\n".join(dict.fromkeys(rows))  # the axes of growth share their first record


_DIGITS = {"seconds": 3, "frames_per_second": 2, "peak_mb": 0, "compile_seconds": 1}


def _peak(record: dict) -> float | None:
    """Megabytes of the process, or of the GPU for engines that tell."""
    return record["peak_device_mb" if record["device"] == "cuda" else "peak_rss_mb"]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
