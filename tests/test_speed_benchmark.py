"""The speed benchmark: rows for what was asked, ratios pair by pair, and operations that are torch's own count."""

import json
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from tiny_models import SMALL_HUNYUAN_VAE, SMALL_TEMPORAL_VAE

from mg import runtime
from mg.benchmark import growth, speed
from mg.benchmark.operations import count_operations
from mg.benchmark.peers import PeerNetwork, count_torch_operations, missing, peer_of
from mg.benchmark.speed import SpeedConfig, format_table, measure_speed, pairwise_ratio, take_turns
from mg.benchmark.speed_worker import Job, Worker, WorkerError
from mg.models import create_model
from mg.models.layers.forms import set_form

ROOT = Path(__file__).parents[1]
IMAGE_VAE = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "norm_num_groups": 4}
SHAPE = (1, 3, 2, 16, 16)

needs_torch = pytest.mark.skipif(missing() is not None, reason="torch and diffusers are not there")


def a_config(path: Path, **options) -> SpeedConfig:
    return SpeedConfig(
        **{
            "models": ["image_vae"],
            "parts": ["encode"],
            "sizes": ["2x16x16"],
            "configs": {"image_vae": IMAGE_VAE},
            "runs": 2,
            "threads": 1,
            "device": "cpu",
            "output_path": str(path),
            **options,
        }
    )


def job(**options) -> Job:
    return Job(
        **{
            "task": "run",
            "engine": "mindspore",
            "part": "encode",
            "shape": SHAPE,
            "model": "image_vae",
            "config": IMAGE_VAE,
            **options,
        }
    )


class FakeWorker:
    """A worker whose times are known; `calls` has the order in which all of them ran."""

    calls: list[str] = []

    def __init__(self, each: Job):
        self.name, self.runs = each.engine, 0
        self.said = {"build_seconds": 0.5, "compile_seconds": 0.0, "device": "cpu"}
        if each.task == "count":
            self.said = {"operations": 600 * each.shape[2], "reference_operations": 800 * each.shape[2]}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self) -> float:
        self.calls.append(self.name)
        self.runs += 1
        return 5.0 if self.runs == 1 else {"mindspore": 1.0, "peer": 2.0}[self.name] * self.runs

    def finish(self) -> dict:
        return {"peak_rss": 3 * 2**20, **({"operations": 1200} if self.name == "peer" else {})}


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(FakeWorker, "calls", [])
    monkeypatch.setattr(speed, "Worker", FakeWorker)
    monkeypatch.setattr(speed, "missing", lambda: None)
    return FakeWorker


def test_a_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians():
    found = pairwise_ratio([1.0, 4.0, 10.0], [2.0, 2.0, 50.0])
    assert found == {"median": 0.5, "min": 0.2, "max": 2.0}
    with pytest.raises(ValueError):
        pairwise_ratio([1.0], [1.0, 2.0])


def test_networks_take_turns_after_a_first_call_each(fake_workers):
    timings = take_turns([fake_workers(job()), fake_workers(job(engine="peer"))], runs=3)
    assert fake_workers.calls == ["mindspore", "peer"] * 4
    assert [timing.first for timing in timings] == [5.0, 5.0]
    assert [timing.times for timing in timings] == [[2.0, 3.0, 4.0], [4.0, 6.0, 8.0]]


def test_the_table_and_the_file_have_a_row_for_all_that_was_asked(tmp_path, fake_workers):
    config = a_config(
        tmp_path,
        models=["image_vae", "dc_ae"],
        parts=["encode", "train"],
        precisions=["fp32", "bf16"],
        sizes=["2x16x16", "4x32x32"],
        batch=2,
    )
    found = measure_speed(config)
    assert json.loads((tmp_path / "speed.json").read_text()) == found
    rows = [(record["model"], record["size"], record["part"], record["precision"]) for record in found["records"]]
    sizes, parts = config.sizes, config.parts
    assert rows == [(name, size, part, "fp32") for name in config.models for size in sizes for part in parts]
    assert sum("bf16 is emulated" in line for line in found["skipped"]) == len(rows)  # said, and not measured

    first = found["records"][0]
    assert first["seconds"] == 2.5 and first["frames_per_second"] == 4 / 2.5  # of two clips of two frames
    assert first["compile_seconds"] == 2.5 and first["peak_rss_mb"] == 3
    assert first["operations_per_frame"] == 300 and first["of_the_originals_operations"] == 0.75
    assert first["ratio"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert first["peer"]["operations_per_frame"] == 300 and first["peer"]["frames_per_second"] == 4 / 5.0
    table = format_table(found)
    assert "no peer of dc_ae: diffusers has no such network" in table
    assert [line.split()[:2] for line in table.splitlines()[1:3]] == [["image_vae", "encode"], ["image_vae", "train"]]


def test_on_cuda_exports_and_peers_run_there_and_one_export_serves_all_rows(tmp_path, fake_workers, monkeypatch):
    jobs = []

    class Recorder(fake_workers):
        def __init__(self, each: Job):
            super().__init__(each)
            jobs.append(each)
            self.name = "peer" if each.engine == "peer" else "mindspore"
            if each.task == "export":
                Path(each.folder).mkdir()
                (Path(each.folder) / "deploy.json").write_text("{}")

        def finish(self) -> dict:
            return {**super().finish(), "peak_device": 2 * 2**20}

    monkeypatch.setattr(speed, "Worker", Recorder)
    monkeypatch.setattr(speed, "find_spec", lambda name: name)
    engines = ["mindspore", "onnxruntime", "openvino", "torch"]
    found = measure_speed(a_config(tmp_path, engines=engines, precisions=["tf32", "bf16"], device="cuda"))
    rows = [(record["engine"], record["precision"]) for record in found["records"]]
    assert rows == [("onnxruntime", "tf32"), ("torch", "tf32"), ("torch", "bf16")]
    assert [(each.task, each.device) for each in jobs] == [("export", "cpu"), *[("run", "cuda")] * 6]
    peers = [(each.precision, each.settings) for each in jobs if each.engine == "peer"]
    assert peers == [(precision, ("channels_last", "compile")) for precision in ("tf32", "tf32", "bf16")]
    assert "2 " in format_table(found) and len(found["skipped"]) == 5


def test_a_missing_peer_is_reported_and_a_failure_costs_one_row(tmp_path, fake_workers, monkeypatch):
    monkeypatch.setattr(speed, "missing", lambda: "torch is not there")
    run = fake_workers.run

    def no_memory(worker):
        if len(worker.calls) == 3:  # the second row's first call
            raise WorkerError("out of memory")
        return run(worker)

    monkeypatch.setattr(fake_workers, "run", no_memory)
    found = measure_speed(a_config(tmp_path, sizes=["2x16x16", "4x16x16"]))
    assert [record["size"] for record in found["records"]] == ["2x16x16"]
    assert found["records"][0]["peer"] is None and "peer" not in fake_workers.calls
    for line in ("left out: no peers: torch is not there", "FAILED: image_vae 4x16x16 encode mindspore fp32: out of"):
        assert line in format_table(found)


@pytest.mark.parametrize(
    "measure, options, file, rows",
    [
        (measure_speed, dict(sizes=["2x16x16", "4x16x16"]), "speed.json", ["2x16x16"]),
        # the first size on all axes, area
        (growth.measure_growth, dict(growth=[4], peer=False), "growth.json", ["2x16x16"] * 3 + ["2x32x32"]),
    ],
)
def test_a_killed_run_leaves_its_rows(tmp_path, fake_workers, monkeypatch, measure, options, file, rows):
    run = fake_workers.run

    def killed(worker):
        if len(worker.calls) == 6:  # those of a network and its peer, or of two sizes without
            raise KeyboardInterrupt
        return run(worker)

    monkeypatch.setattr(fake_workers, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(a_config(tmp_path, **options))
    left = json.loads((tmp_path / file).read_text())
    assert [record["size"] for record in left["records"]] == rows


def test_cost_grows_along_one_axis_at_a_time_and_is_plotted(tmp_path, fake_workers):
    found = growth.measure_growth(a_config(tmp_path, growth=[1, 4], batch=2))
    grown = [(record["axis"], record["factor"], record["batch"], record["size"]) for record in found["records"]]
    assert grown == [
        ("area", 1, 2, "2x16x16"),
        ("batch", 1, 2, "2x16x16"),
        ("frames", 1, 2, "2x16x16"),
        ("area", 4, 2, "2x32x32"),
        ("batch", 4, 8, "2x16x16"),
        ("frames", 4, 2, "8x16x16"),
    ]
    assert all(record["ratio"]["median"] == 0.5 for record in found["records"])
    drawn = (tmp_path / "growth_image_vae.svg").read_text(encoding="utf-8")
    names = ("image_vae from 2x16x16", "image_vae: encode", "AutoencoderKL, frames as the batch: encode")
    for text in (*names, "seconds", "GFLOP", "peak memory, MB", "frames", "pixels of a frame", "clips at once"):
        assert f">{text}<" in drawn, text
    assert json.loads((tmp_path / "growth.json").read_text()) == found
    assert growth.grown((1, 3, 2, 16, 16), "area", 6) == (1, 3, 2, 32, 48)


@needs_torch
@pytest.mark.full
def test_operations_of_a_training_step_are_as_many_as_torch_counts():
    """Forward and backward of the same architecture, in the papers' form; by default they are fewer."""
    with Worker(job(task="count", part="train", reference=True)) as worker:
        counted = worker.said
    peer = PeerNetwork(peer_of("image_vae", create_model("image_vae", **IMAGE_VAE).config), SHAPE, "fp32", 1)
    train = peer.trainer()
    assert counted["operations"] < counted["reference_operations"] == count_torch_operations(lambda: train(0))


@needs_torch
@pytest.mark.full
def test_operations_of_encode_and_decode_are_as_many_as_torch_counts():
    runtime.setup("cpu", "graph")
    model = set_form(create_model("image_vae", **IMAGE_VAE), "paper")
    peer = PeerNetwork(peer_of("image_vae", model.config), SHAPE, "fp32", 1)
    x, z = (Tensor(np.zeros(shape, np.float32)) for shape in (SHAPE, model.latent_shape(SHAPE)))
    encode, decode = peer.encoder(), peer.decoder()
    for ours, theirs in ((lambda: model.encode(x), encode), (lambda: model.decode(z, 2), decode)):
        with count_operations() as count:
            ours()
            ours()  # not compiled again, but run
        assert count.total == 2 * count_torch_operations(lambda run=theirs: run(0))


@needs_torch
@pytest.mark.parametrize("name, config", [("hunyuan_vae", SMALL_HUNYUAN_VAE), ("temporal_vae", SMALL_TEMPORAL_VAE)])
def test_peers_take_clips_of_any_size(name, config):
    peer = peer_of(name, create_model(name, **config).config)
    network = PeerNetwork(peer, (1, 3, 4, 15, 17), "fp32", 1)
    assert network.shape == ((1, 3, 4, 16, 18) if peer.by_frame else (1, 3, 5, 16, 18))
    network.encoder()(0)
    network.decoder()(0)


def test_operations_are_counted_only_in_graph_mode():
    with pytest.raises(RuntimeError, match="graph"), count_operations():
        pass


@needs_torch
@pytest.mark.full
def test_a_model_and_its_peer_are_measured_in_processes_of_their_own(tmp_path):
    config = a_config(tmp_path, operations=False, mode="pynative")
    record = measure_speed(config)["records"][0]
    assert len(record["times"]) == len(record["peer"]["times"]) == 2
    assert record["ratio"] == pairwise_ratio(record["times"], record["peer"]["times"])
    assert record["peer"]["name"] == "AutoencoderKL, frames as the batch" and record["peer"]["operations_per_frame"] > 0
    assert 50 < record["peer"]["peak_rss_mb"] < 5000 and record["peak_rss_mb"] != record["peer"]["peak_rss_mb"]


@needs_torch
def test_a_peer_trains_channels_last_but_neither_compiled_nor_under_autocast(tmp_path):
    peer = peer_of("image_vae", create_model("image_vae", **IMAGE_VAE).config)
    config = a_config(tmp_path, peer_settings=["channels_last", "compile", "autocast"])
    settings = {part: speed._peer_job(job(part=part), peer, config).settings for part in ("encode", "train")}
    assert settings == {"encode": ("channels_last", "compile", "autocast"), "train": ("channels_last",)}
    network = PeerNetwork(peer, SHAPE, "fp32", 1, settings=settings["train"])
    weight = network.network.encoder.conv_in.weight
    before = weight.detach().clone()
    network.trainer()(0)
    assert weight.stride()[1] == 1 and not (weight == before).all()


@needs_torch
@pytest.mark.parametrize("precision, settings", [("bf16", ("channels_last",)), ("bf16", ("autocast",))])
def test_settings_of_a_peer_change_its_values_little(precision, settings):
    import torch

    peer = peer_of("image_vae", create_model("image_vae", **IMAGE_VAE).config)
    plain = PeerNetwork(peer, SHAPE, "fp32", 1)
    other = PeerNetwork(peer, SHAPE, precision, 1, settings=settings)
    kinds = {parameter.dtype for parameter in other.network.parameters()}
    assert kinds == {torch.float32 if "autocast" in settings else torch.bfloat16}
    found = []
    for network in (plain, other):
        seen = []
        network._runner(
            lambda x, network=network, seen=seen: _seen(network.network.encode(x), seen), [network.clip(0)]
        )(0)
        found.append(seen[0].latent_dist.mode().float())
    error = (found[0] - found[1]).abs().max() / found[0].abs().max()
    assert 1e-5 < error < 0.1


def _seen(value, seen):
    seen.append(value)
    return value.latent_dist.mode()


@needs_torch
def test_a_worker_is_idle_between_jobs_and_reports_errors():
    peer = peer_of("image_vae", create_model("image_vae", **IMAGE_VAE).config)
    with Worker(job(engine="peer", model=peer.kind, config=peer.config, by_frame=True)) as worker:
        assert worker.run() > 0
        state = Path(f"/proc/{worker._process.pid}/stat")
        if state.exists():
            assert state.read_text().rpartition(")")[2].split()[0] == "T"  # stopped
        worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match="ended by signal 9"):
            worker.run()
    with pytest.raises(WorkerError, match="KeyError: 'fp7'"):
        Worker(job(engine="peer", model=peer.kind, config=peer.config, by_frame=True, precision="fp7"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "tea"], "there is no model 'tea'; the models are dc_ae"),
        (["--sizes", "16x64"], "sizes has '16x64'; a size is frames x height x width"),
        (["--sizes", "16x0x64"], "sizes has '16x0x64'"),
        (["--parts", "encrypt"], "parts is"),
        (["--runs", "0"], "runs is 0; it must be from 1 to 1000"),
        (["--configs", '{"tae": {"chh": 8}}'], "tae has no config key 'chh'; did you mean 'ch'?"),
        (["--peer_settings", "channel_last"], "peer_settings is"),
        (["--size", "16x64x64"], "unknown option 'size'; did you mean 'sizes'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_speed.py", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "benchmark_speed.py"), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and message in said.err, said.err


@pytest.mark.full
def test_an_exported_model_is_measured_too_and_has_as_many_operations(tmp_path):
    pytest.importorskip("onnxruntime")
    found = measure_speed(a_config(tmp_path, parts=["encode", "train"], engines=["onnxruntime"], peer=False))
    assert not found["failed"] and found["skipped"] == [
        "image_vae 2x16x16 train onnxruntime fp32: only MindSpore trains"
    ]
    record = found["records"][0]
    assert record["engine"] == "onnxruntime" and record["compile_seconds"] > 0
    assert record["operations_per_frame"] == 5906432 / 2  # of encode, as MindSpore's graph and torch have it
