"""The configs of released models, and the page that samples are looked at on."""

import json
from pathlib import Path

import numpy as np
import pytest

from mg.config import parse_config
from mg.data.video import write_image, write_video
from mg.diffusion.schedules import create_schedule
from mg.generation import gallery
from mg.generation.config import GenerateConfig, given
from mg.generation.gallery import write_gallery
from mg.generation.requests import read_requests
from mg.generation.samples import SampleRow, read_rows, record

ROOT = Path(__file__).parents[1]
ORIGINALS = json.loads((ROOT / "tests/data/generation/inference_configs.json").read_text(encoding="utf-8"))
# What is told in another way here: where files lie, and a switch that was renamed.
OTHER = {"from_pretrained", "save_dir", "prompt_path", "cache_dir"}
RENAMED = {"enable_flashattn": "enable_flash_attn"}


def parse(name: str) -> GenerateConfig:
    return parse_config(GenerateConfig, "Generate.", [str(ROOT / f"configs/generation/{name}.yaml")])


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_config_has_the_originals_values(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse(name)
    assert read_requests(config)
    create_schedule(**given(config.scheduler))
    for key, wanted in ORIGINALS[name].items():
        section = getattr(config, key)
        values = wanted if isinstance(wanted, dict) else {key: wanted}
        for field, value in values.items():
            if field not in OTHER:
                found = section if field == key else getattr(section, RENAMED.get(field, field))
                assert found == value, (key, field)


def test_every_config_is_there():
    files = {
        str(path.relative_to(ROOT / "configs/generation")) for path in (ROOT / "configs/generation").rglob("*.yaml")
    }
    assert files >= {f"{name}.yaml" for name in ORIGINALS}


def test_every_field_of_a_config_has_a_comment():
    for path in (ROOT / "configs/generation").rglob("inference/*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for before, line in zip(["", *lines], lines):
            told = (
                "#" in line or before.startswith("#") or line.strip() in ("", "type: t5", "type: iddpm", "type: rflow")
            )
            names_itself = line.strip().startswith(
                ("- ", "type: ", "num_sampling_steps", "num_classes", "condition: text")
            )
            section = line.endswith(":") or line == "dtype: bf16"
            assert told or names_itself or section, f"{path.name}: {line}"


# The page.


@pytest.fixture
def samples(tmp_path):
    """A video with a reference, an image, and one that failed."""
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    write_video(tmp_path / "sample_0000.mp4", frames, 8)
    write_image(tmp_path / "sample_0001.png", frames[0])
    write_image(tmp_path / "references" / "cat.png", frames[0])
    told = {"seed": 42, "aes": None, "scheduler": {"type": "iddpm", "cfg_scale": 7.0, "cfg_channel": None}}
    shape = dict(height=16, width=16, fps=8.0, settings=told)
    video = SampleRow(
        "sample_0000", "a <cat>", file="sample_0000.mp4", frames=4, pictures=["references/cat.png"], **shape
    )
    image = SampleRow("sample_0001", "", file="sample_0001.png", frames=1, **shape)
    failed = SampleRow("sample_0002", "a dog", "error", "none.png: no such file")
    record(tmp_path, [failed, image])
    record(tmp_path, [video])
    return tmp_path


def page_of(folder: Path) -> str:
    write_gallery(folder, list(read_rows(folder).values()))
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_page_shows_samples_and_what_failed_and_needs_nothing_else(samples):
    page = page_of(samples)
    assert page.count('src="data:video/mp4') == 1 and page.count('src="data:image/png') == 2
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page
    for said in (
        "2 samples",
        "a &lt;cat&gt;",
        "(no prompt)",
        "4 frames of 16 x 16",
        "seed 42",
        "type iddpm, cfg_scale 7.0",
    ):
        assert said in page
    assert "none.png: no such file" in page and "cfg_channel" not in page and "<dt>aes" not in page


def test_a_page_has_a_limited_length(samples, monkeypatch):
    first = [samples / "sample_0000.mp4", samples / "references" / "cat.png"]
    monkeypatch.setattr(gallery, "MOST_BYTES", sum(path.stat().st_size for path in first))
    page = page_of(samples)
    assert page.count('src="data:') == 2 and "sample_0001.png, 1 frame of 16 x 16: not in this page" in page


def test_rows_come_in_the_order_of_names_and_a_broken_line_is_named(samples):
    assert list(read_rows(samples)) == ["sample_0000", "sample_0001", "sample_0002"]
    (samples / "samples.jsonl").write_text("{}\n{", encoding="utf-8")
    with pytest.raises(ValueError, match="samples.jsonl, line 1"):
        read_rows(samples)
