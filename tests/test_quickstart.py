"""The quickstarts run from photographs to scored reconstructions and to judged generated clips, and print where they
are."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mg.cli.make_clips import Options
from mg.config import parse_config
from mg.data.index import read_index
from mg.generation.config import GenerateConfig
from mg.generation.samples import read_rows
from mg.generation.training.config import DenoiserTrainConfig

ROOT = Path(__file__).parents[1]


def quickstart(script, *arguments):
    run = subprocess.run(
        [ROOT / "scripts" / script, *arguments],
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run


@pytest.mark.full
def test_quickstart(tmp_path):
    run = quickstart("quickstart.sh", tmp_path, "--max_steps", "2")
    records = [json.loads(line) for line in (tmp_path / "train" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]

    kinds = ["", "real_"] if (tmp_path / "clips" / "real.json").exists() else [""]
    assert kinds[1:] or "pip cannot fetch" in run.stderr
    for kind in kinds:
        check_results(tmp_path, kind, run.stdout)


def check_results(output_path, kind, told):
    folder = output_path / f"{kind}reconstructions"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["mean"]) == {"reconstruction", "baseline"}
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    clips = len(read_index(output_path / "clips" / f"{kind}test.csv"))
    assert len(rows) == clips
    assert all(float(row["psnr"]) > 10 for row in rows)
    assert len(list((folder / "side_by_side").glob("*.mp4"))) == clips
    summary = json.loads((output_path / f"{kind}benchmark" / "summary.json").read_text())
    assert {"tae", "trained", "inflated", "baseline_8x8", "baseline_dct"} <= set(summary["models"])
    report = output_path / f"{kind}benchmark" / "report.html"
    for path in (output_path / "train" / "loss.png", folder / "side_by_side", folder / "metrics.csv", report):
        assert str(path) in told
        assert path.exists()


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_quickstart_of_generation(tmp_path):
    told = quickstart("quickstart_generation.sh", tmp_path, "--max_steps", "2", "--validation.clips", "2").stdout
    samples = {row.name: row for row in read_rows(tmp_path / "samples").values()}
    prompts = (ROOT / "assets" / "texts" / "quickstart.txt").read_text().splitlines()
    assert [row.prompt for name, row in samples.items() if name.startswith("text_")] == prompts
    assert set(prompts) <= {row.caption for row in read_index(tmp_path / "clips" / "train.csv")}
    assert all(row.status == "ok" for row in samples.values())
    assert {name: row.frames for name, row in samples.items() if not name.startswith("text_")} == {
        "first_frame_0000": 8,
        "first_frame_0001": 8,
        "long_0000": 3 * (8 - 2) + 2,
    }
    judged = json.loads((tmp_path / "judged" / "judged.json").read_text())
    assert set(judged["captions"]) == {"all", "1", "2"} and judged["first_frames"]["kept"] > 60
    assert judged["captions"]["all"]["different"] == 24 and judged["captions"]["1"]["different"] == 4
    assert judged["validation"]["trained"] < judged["validation"]["untrained"]
    for path in (
        tmp_path / "samples" / "index.html",
        tmp_path / "train" / "loss.png",
        tmp_path / "judged" / "judged.json",
    ):
        assert str(path) in told and path.exists()


def test_test_clips_show_photographs_that_nothing_was_trained_on():
    from mg.data.synthetic import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS

    assert not set(TEST_PHOTOGRAPHS) & set(TRAIN_PHOTOGRAPHS)
    recipe = (ROOT / "configs" / "image_vae" / "train" / "quickstart.yaml").read_text()
    assert "csv_path: outputs/photographs/images.csv" in recipe  # which make_images writes from TRAIN_PHOTOGRAPHS


def test_the_quickstarts_generation_has_the_settings_of_its_training(tmp_path):
    folder = ROOT / "configs" / "generation" / "quickstart"
    trained = parse_config(
        DenoiserTrainConfig, "Train.", [str(folder / "train.yaml"), "--latents_path", str(tmp_path), "--resume"]
    )
    generated = parse_config(GenerateConfig, "Generate.", [str(folder / "inference.yaml")])
    for section, fields in {
        "vae": ("scaling_factor", "shift_factor"),
        "text_encoder": ("type", "from_pretrained", "model_max_length"),
        "scheduler": ("type",),
        "model": ("type",),
    }.items():
        for field in fields:
            assert getattr(getattr(trained, section), field) == getattr(getattr(generated, section), field), field
    clips = parse_config(Options, "Make.", [str(folder / "clips.yaml"), "--output_dir", str(tmp_path)])
    assert generated.size == (clips.size, clips.size) and generated.fps == clips.fps
    assert (generated.frames - 1) * generated.frame_interval < clips.num_frames
    script = (ROOT / "scripts" / "quickstart_generation.sh").read_text()
    for taken in (f"image_size {clips.size}", f"num_frames {generated.frames}", f"stride {generated.frame_interval}"):
        assert f"{taken} " in script, taken
