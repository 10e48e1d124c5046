"""A process of the speed benchmark: holds one network, and runs and times it on request.

    python -m mg.benchmark.speed_worker

It reads one order per line from standard input, the first one a job as JSON, and answers each with a line of JSON on
standard output. Between orders, `Worker` at the other end stops the process, so that its threads disturb no others.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mg.deploy.engines import whole_instruction_set
from mg.launcher import end_with_parent
from mg.memory import peak_rss

_LIMIT = ExitStack()  # lifts, until the process ends, the limit that is for MindSpore's oneDNN
_TOTAL_STEPS = 10_000  # of the learning rate's schedule


@dataclass(frozen=True)
class Job:
    """What a worker does.

    Attributes:
        task: run; stream: time a video's way through the model; or with MindSpore: count the operations of a run, or
            export the model to `folder`.
        engine: mindspore | onnxruntime | openvino | torch, these for an exported model | peer.
        part: encode | decode | train.
        shape: of the clips, (B, C, T, H, W); of a stream's tiles, in which 0 is the model's own size.
        model, config: the model's name and overrides of its config; for a peer the class and its config.
        device: of the engine; cuda for an exported model or a peer.
        by_frame: for a peer: it works on images.
        settings: for a peer, see `mg.benchmark.peers.PeerNetwork`.
        compile: for engine torch, see `mg.deploy.load`.
        folder: of an exported model.
        checkpoint: the model's weights; None for random ones.
        stream: arguments of `mg.benchmark.stream_parts.measure`.
        threads: number of processors that the process may use; for a stream only the engine.
        reference: also count the operations of the papers' form, see `mg.models.layers.forms`.
    """

    task: str
    engine: str
    part: str
    shape: tuple[int, ...]
    model: str
    config: dict
    precision: str = "fp32"
    device: str = "cpu"
    mode: str = "graph"
    threads: int = 1
    by_frame: bool = False
    folder: str | None = None
    reference: bool = False
    settings: tuple[str, ...] = ()
    compile: bool | None = None
    checkpoint: str | None = None
    stream: dict | None = None


class WorkerError(RuntimeError):
    """A worker that could not do its job; the message says why, in one line."""


class Worker:
    """A process for a job, as seen by its parent; leaving the `with` block ends the process.

    Attributes:
        said: its answer to the job: the device and the seconds for building and for compiling before any call; or the
            counts.
    """

    def __init__(self, job: Job):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed on exit
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.threads))
        # By default OpenMP threads busy-wait for each other. If other processes compete for the processors, each wait
        # then costs a scheduler time slice: torch was seen to take 90 times as long for a small net.
        threads["OMP_WAIT_POLICY"] = "passive"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mg.benchmark.speed_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **threads},
        )
        try:
            self.said = self._ask(json.dumps(asdict(job)))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            with suppress(OSError):  # a broken pipe
                file.close()

    def run(self) -> float:
        """Seconds of one call; the first one compiles."""
        return self._ask("run")["seconds"]

    def finish(self) -> dict:
        """Peak memory in bytes of the process ("peak_rss") and the device ("peak_device") and, for networks that can
        tell, the "operations" of one call."""
        return self._ask("finish")

    def _ask(self, order: str) -> dict:
        with suppress(OSError):
            self._process.send_signal(signal.SIGCONT)
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise WorkerError(answer["error"])
        self._process.send_signal(signal.SIGSTOP)
        with suppress(AttributeError):  # older Pythons on macOS have no waitid
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # until it has stopped
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        memory = "; Linux kills processes this way when memory runs out" if code == -signal.SIGKILL else ""
        return f"the process {ended}{memory}" + (f": {lines[-1]}" if lines and code >= 0 else "")


def main() -> None:
    """Answer orders until there are no more."""
    end_with_parent()  # while stopped, it would outlive its parent
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        job = json.loads(sys.stdin.readline())
        job = Job(**{**job, "shape": tuple(job["shape"]), "settings": tuple(job["settings"])})
        if job.task != "stream" and hasattr(os, "sched_setaffinity"):  # Linux only
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
        if job.engine != "mindspore":
            _LIMIT.enter_context(whole_instruction_set())
        if job.task != "run":
            answer({"count": _count, "export": _export, "stream": _stream}[job.task](job))
            return
        start = time.perf_counter()
        network = _NETWORKS[job.engine](job)
        run = network.runner(job.part)
        built = time.perf_counter() - start
        answer({"build_seconds": built, "compile_seconds": network.compile_seconds, "device": network.device})
        number = 0
        for order in sys.stdin:
            if order.strip() == "run":
                start = time.perf_counter()
                run(number)
                answer({"seconds": time.perf_counter() - start})
                number += 1
            else:
                answer({"peak_rss": peak_rss(), **network.finish(run)})
    except Exception as error:  # of any kind: the parent reports it
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]})


class _MindSporeNetwork:
    """A model of this toolkit with random weights."""

    compile_seconds = 0.0  # the first call compiles

    def __init__(self, job: Job):
        from mg import runtime
        from mg.models import create_model, from_pretrained

        self.device = runtime.setup(job.device, job.mode).device
        self.job = job
        if job.checkpoint is None:
            self.model = create_model(job.model, dtype=job.precision, **job.config)
        else:
            self.model = from_pretrained(job.checkpoint, job.model, job.precision, **job.config)
        self.model.sample_deterministic = True

    def runner(self, part: str) -> Callable[[int], object]:
        """A function that runs the part on one of two inputs, alternating by the number it gets."""
        from mindspore import Tensor

        clips, frames = _clips(self.job.shape), self.job.shape[2]
        if part == "train":
            step, noise = self._train_step(), _normal(self.model.latent_shape(self.job.shape))

            def train(number: int) -> None:
                step.accumulate(clips[number % 2], noise[number % 2])
                if self.job.task == "run":  # an update has no products to count and compiles slowly
                    step.update()

            return train
        if part == "encode":
            clips = [Tensor(x) for x in clips]
            return lambda number: self.model.encode(clips[number % 2]).z.asnumpy()  # waits for the result
        latents = [Tensor(z) for z in _normal(self.model.latent_shape(self.job.shape))]
        return lambda number: self.model.decode(latents[number % 2], frames).asnumpy()

    def _train_step(self):
        from mg.losses.reconstruction import AutoencoderLoss, LossConfig
        from mg.training.optim import OptimConfig
        from mg.training.step import TrainStep

        loss = AutoencoderLoss(LossConfig(perceptual_weight=0.0))
        return TrainStep(self.model, loss, OptimConfig(), _TOTAL_STEPS, self.job.precision)

    def finish(self, run) -> dict:
        import mindspore as ms

        return {} if self.device == "cpu" else {"peak_device": ms.runtime.max_memory_allocated()}


class _Peer:
    """A diffusers network with random weights."""

    compile_seconds = 0.0  # the first call compiles

    def __init__(self, job: Job):
        from mg.benchmark.peers import Peer, PeerNetwork

        self.device = job.device
        peer = Peer(job.model, job.model, job.config, job.by_frame)
        self.network = PeerNetwork(peer, job.shape, job.precision, job.threads, job.device, job.settings)

    def runner(self, part: str) -> Callable[[int], object]:
        return {"encode": self.network.encoder, "decode": self.network.decoder, "train": self.network.trainer}[part]()

    def finish(self, run) -> dict:
        from mg.benchmark.peers import count_torch_operations

        peak = _peak_of_cuda() if self.device == "cuda" else {}
        if "compile" in self.network.settings:  # what is compiled has no operators to count
            return peak
        return {"operations": count_torch_operations(lambda: run(0)), **peak}


class _ExportedNetwork:
    """A model written by `_export`, in an engine of `mg.deploy`; its networks have exactly the clip's size."""

    def __init__(self, job: Job):
        from mg.deploy import load
        from mg.deploy.engines import opener

        self.job, self.device = job, job.device
        options = (job.engine, job.precision, job.device, job.threads, job.compile)
        opener(*options)  # imports the engine, which is no part of compiling
        start = time.perf_counter()
        self.model = load(job.folder, *options)
        self.compile_seconds = time.perf_counter() - start

    def runner(self, part: str) -> Callable[[int], object]:
        clips, frames = _clips(self.job.shape), self.job.shape[2]
        if part == "encode":
            return lambda number: self.model.encode(clips[number % 2])
        latents = _normal(self.model.latent_shape(self.job.shape))
        return lambda number: self.model.decode(latents[number % 2], frames)

    def finish(self, run) -> dict:
        from mg.deploy import operations

        networks = json.loads((Path(self.job.folder) / "deploy.json").read_text(encoding="utf-8"))["networks"]
        calls: Counter = Counter()
        for name, network in self.model.networks.items():
            network.run = _counted(network.run, calls, name)
        run(0)
        total = sum(times * operations(Path(self.job.folder) / networks[name]["file"]) for name, times in calls.items())
        on_cuda = self.job.engine == "torch" and self.device == "cuda"
        return {"operations": total, **(_peak_of_cuda() if on_cuda else {})}


_NETWORKS: dict[str, Any] = {
    "mindspore": _MindSporeNetwork,
    "onnxruntime": _ExportedNetwork,
    "openvino": _ExportedNetwork,
    "torch": _ExportedNetwork,
    "peer": _Peer,
}


def _peak_of_cuda() -> dict:
    import torch

    return {"peak_device": torch.cuda.max_memory_allocated()}


def _counted(run: Callable, calls: Counter, name: str) -> Callable:
    def counted(x):
        calls[name] += 1
        return run(x)

    return counted


def _export(job: Job) -> dict:
    """Write the model's networks to the job's folder: at the size of its clips, or as a stream's overlapping tiles."""
    from mg.deploy.export import export_model

    _, _, frames, size, _ = job.shape
    overlaps: dict[str, Any] = dict.fromkeys(
        ("encode_overlap", "decode_overlap", "spatial_overlap"), None if job.stream else 0
    )
    export_model(_MindSporeNetwork(job).model, job.folder, frames=frames or None, size=size or None, **overlaps)
    return {}


def _stream(job: Job) -> dict:
    """The "times" of a stream; and the "size" of its frames, "tiling", "device" and "peak_rss"."""
    from mg.benchmark.stream_parts import measure

    network = _NETWORKS[job.engine](job)
    if job.engine == "mindspore":
        from mg.deploy.networks import tiling_of

        _, _, frames, size, _ = job.shape
        network.model.enable_tiling(**vars(tiling_of(network.model, frames or None, size or None, None, None, None)[0]))
    found = measure(network.model, **job.stream)
    return {**found, "tiling": asdict(network.model.tiling), "device": network.device, "peak_rss": peak_rss()}


def _count(job: Job) -> dict:
    """Operations of a call and, if requested, of the same call in the papers' form."""
    from mg.benchmark.operations import count_operations
    from mg.models.layers.forms import set_form

    def counted(plain: bool) -> int:
        network = _MindSporeNetwork(job)
        set_form(network.model, "paper" if plain else None)
        run = network.runner(job.part)
        with count_operations() as count:
            run(0)
        return count.total

    found = {"operations": counted(False)}
    if job.reference:
        found["reference_operations"] = counted(True)
    return found


def _clips(shape: tuple[int, ...]) -> list:
    import numpy as np

    return [np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32) for seed in range(2)]


def _normal(shape: tuple[int, ...]) -> list:
    import numpy as np

    return [np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in range(2)]


if __name__ == "__main__":
    main()
