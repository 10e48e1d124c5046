"""Captions and names hold anything: what is written of them is read again, and a line is a line to every reader."""

import csv
import io
import json
import os
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from training_runs import TwoConvs

from mg.benchmark.results import ResultRow, Results, read_rows
from mg.checkpoints import atomic_write
from mg.config import run_command_line
from mg.data.index import IndexRow
from mg.data.loader import ClipLoader, DataConfig
from mg.data.video import write_image, write_video
from mg.evaluation.pairs import EvaluateConfig, evaluate_folders, format_table
from mg.inference.encode import EncodeConfig, encode_csv
from mg.inference.loading import ModelSection
from mg.inference.outputs import output_names
from mg.inference.reconstruction import InferenceConfig, reconstruct_csv
from mg.latents import LatentsRow, open_latents, record
from mg.latents import read_rows as read_latents
from mg.plain_text import csv_line, encoded, json_line, one_line, printable, split_lines, text_table
from mg.training.logs import read_log

BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
ANYTHING = ["\0", "\x1b[31m", '"', "'", ",", ";", "\t", "\\", "\\n", "猫 🐈", "\udcff", "\ud800", *BREAKS]
TEXTS = [f"a{text}b" for text in ANYTHING] + ["".join(ANYTHING)]


def holds_lost(text: str) -> bool:
    """Whether it has what neither a CSV in UTF-8 nor a file's name holds."""
    return any(character in "\0\udcff\ud800" for character in text)


def test_a_table_aligns_numbers_to_the_right_and_texts_to_the_left():
    rows = [["clip", "PSNR", "x"], ["a.mp4", 1.25, ""]]
    assert text_table(rows) == ["clip   PSNR  x", "a.mp4  1.25"]
    assert text_table([["a", "model"], ["bc", "d"]], numbers=False) == ["a   model", "bc  d"]
    assert text_table([["a", "model"], ["bc", "d"]]) == ["a   model", "bc      d"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_line_is_one_line_to_every_reader_and_holds_the_text(text):
    line = encoded(json_line({"caption": text}))
    assert len(line.decode().splitlines()) == 1 and json.loads(line) == {"caption": text}
    for shown in (printable(text), one_line(text), one_line(ValueError(text))):
        assert len(shown.splitlines()) == 1 and shown.encode() and "\x1b" not in shown and "\0" not in shown
    again = encoded(csv_line([text, 1.5])).decode()
    assert again.endswith("\n") and again.count("\n") == 1 + text.count("\n")
    (cells,) = csv.reader(io.StringIO(again, newline=""))
    read = text.replace("\0", "\\x00").replace("\udcff", "\\udcff").replace("\ud800", "\\ud800")
    assert cells == [read, "1.5"]


def test_lines_end_only_at_line_feeds():
    assert split_lines("a\u2028b\n\nc\x85d\n") == ["a\u2028b", "", "c\x85d"]
    assert split_lines("") == [] and split_lines("a\nb") == ["a", "b"]


def test_an_error_without_a_message_is_named_by_its_type():
    assert one_line(MemoryError()) == "MemoryError" and one_line(ValueError("a\n b")) == "a b"


def test_the_latents_index_returns_any_caption_and_name(tmp_path):
    rows = [LatentsRow(f"{i}{text}.mp4", text, "error", one_line(text)) for i, text in enumerate(TEXTS)]
    record(tmp_path, rows, {row.name: i for i, row in enumerate(rows)})
    assert list(read_latents(tmp_path).values()) == rows
    text = (tmp_path / "index.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["caption"] for line in text.splitlines()] == TEXTS
    assert "猫 🐈" in text  # what people can read stays so


def test_a_latents_index_that_an_earlier_version_wrote_is_read(tmp_path):
    row = {"name": "a.mp4", "caption": "x\u2028y\u2029z\x85", "status": "error", "error": "no"}
    (tmp_path / "index.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_latents(tmp_path)["a.mp4"].caption == "x\u2028y\u2029z\x85"


def test_results_return_any_name_that_is_valid_utf_8(tmp_path):
    rows = [ResultRow(text, f"o{i}", "model", error="no") for i, text in enumerate(TEXTS)]
    results = Results(tmp_path / "a.csv", rows[:5])
    for row in rows[5:]:
        results.add(row)
    found = read_rows(tmp_path / "a.csv")
    assert [row.output for row in found] == [row.output for row in rows]
    for row, again in zip(rows, found):
        assert again.name == row.name or holds_lost(row.name)


def test_a_log_is_read_whatever_a_line_holds(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "note": "a\u2028b"}\n{"step": 1}\n{"ste', encoding="utf-8")
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl", 9)] == [0, 1]


def test_output_names_are_names_of_files(tmp_path):
    long = "x" * 300
    names = [
        *(f"{text}.mp4" for text in TEXTS),
        f"{long}.mp4",
        f"{long}y.mp4",
        f"{'猫' * 200}.mp4",
        "d/" * 200 + "a.mp4",
    ]
    names += [f"{'n' * 246}.mp4", "/", "..", "a/..", ".mp4"]
    outputs = output_names(names)
    assert len({output.lower() for output in outputs}) == len(names)
    for output in outputs:
        assert len(os.fsencode(output)) <= 251 and printable(output) == output and "/" not in output
        write_image(tmp_path / f"{output}.png", np.zeros((2, 2, 3), np.uint8))
    assert len(list(tmp_path.iterdir())) == len(names)
    assert output_names(names) == outputs


def test_a_file_may_have_as_long_a_name_as_the_file_system_takes(tmp_path):
    for name in ("x" * 251 + ".mp4", "é" * 125 + ".mp4", "a" * 255):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


@pytest.fixture
def set_of_names(tmp_path):
    """Images under names that hold anything that a file's may, and their CSV, with captions likewise."""
    folder, lines = tmp_path / "images", ["video,caption\n"]
    for number, text in enumerate(ANYTHING):
        name = f"{number}.png" if holds_lost(text) else f"{number}{text}.png"
        write_image(folder / name, np.full((16, 16, 3), number * 9, np.uint8))
        caption = text.encode("utf-8", "ignore").decode()
        lines.append(csv_line([name, f"x{caption}x"]) if "\0" not in caption else f"{name},x\0x\n")
    (tmp_path / "set.csv").write_bytes(encoded("".join(lines)))
    TwoConvs({}).save_weights(tmp_path / "w.ckpt")
    settings = dict(csv_path=str(tmp_path / "set.csv"), video_folder=str(folder), image_size=16, mode="pynative")
    return dict(settings, model=ModelSection(str(tmp_path / "w.ckpt")), output_path=str(tmp_path / "out"))


def test_any_name_and_caption_goes_through_latents(tmp_path, set_of_names):
    report = encode_csv(EncodeConfig(**set_of_names))
    assert (report.encoded, report.failed) == (len(ANYTHING), [])
    latents = open_latents(tmp_path / "out")
    captions = [f"x{text.encode('utf-8', 'ignore').decode()}x" for text in ANYTHING]
    assert [clip.caption for clip in latents.values()] == captions
    assert encode_csv(EncodeConfig(**set_of_names)).there == len(ANYTHING)


def test_any_name_goes_through_reconstruction_and_its_metrics(tmp_path, set_of_names):
    report = reconstruct_csv(InferenceConfig(**set_of_names))
    assert not report.failed
    with open(tmp_path / "out" / "metrics.csv", encoding="utf-8", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [result.name for result in report.results]
    assert len(list((tmp_path / "out" / "reconstruction").iterdir())) == len(ANYTHING)


def test_any_name_of_a_file_goes_through_a_comparison_of_folders(tmp_path):
    names = [f"{i}{text}.png" for i, text in enumerate(ANYTHING) if text != "\0" and text != "\ud800"]
    for folder in ("real", "made"):
        write_image(tmp_path / folder / "a.png", np.zeros((16, 16, 3), np.uint8))
        for name in names:
            (tmp_path / folder / name).write_bytes((tmp_path / folder / "a.png").read_bytes())
    config = EvaluateConfig(
        real_video_dir=str(tmp_path / "real"),
        generated_video_dir=str(tmp_path / "made"),
        metric=["psnr"],
        mode="pynative",
    )
    report = evaluate_folders(config)
    assert len(report.rows("ok")) == len(names) + 1
    table = format_table(report, config)
    assert len(table.splitlines()) == 1 + len(names) + 1 + 1 + len(report.described) and table.encode()
    with open(Path(config.output_path) / "metrics.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(names) + 1
    json.loads((Path(config.output_path) / "metrics.json").read_text(encoding="utf-8"))


def test_videos_of_any_name_are_loaded_and_one_that_cannot_be_read_is_one_line_of_the_log(tmp_path, caplog):
    names = [f"{i}{text}.mp4" for i, text in enumerate(ANYTHING) if text not in ("\0", "\ud800")]
    write_video(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / "a.mp4").read_bytes())
    broken = [f"broken{name}" for name in names]
    for name in broken:
        (tmp_path / name).write_bytes(b"no video")
    size = dict(sample_n_frames=2, image_size=16, crop_size=16, batch_size=2 * len(names))
    config = DataConfig(**size, image_ratio=0.0, num_workers=1, max_bad_share=0.5)
    rows = [IndexRow(tmp_path / name, name) for name in names + broken]
    with closing(ClipLoader(rows, config).batches()) as batches:
        assert set(next(batches).names) == set(names)
    said = [message for message in caplog.messages if message.startswith("skipped a file")]
    assert len(said) == len(broken) and all(len(message.splitlines()) == 1 for message in said)


def test_a_command_prints_names_that_the_terminal_cannot(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", line_buffering=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as stopped:
        run_command_line(lambda: print("猫\udcff") or 0)
    assert stopped.value.code == 0 and terminal.buffer.getvalue() == rb"\u732b\udcff" + b"\n"
