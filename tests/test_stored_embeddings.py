"""Embeddings of texts on disk: what the encoder gives, resumed, shared over ranks, every fault named."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_text import clip_folder, t5_folder
from workers import finish, start

from mg.cli.encode_text import main
from mg.data import DataError
from mg.generation.config import GenerateConfig
from mg.generation.requests import read_requests
from mg.runtime import Runtime
from mg.text import TextEncoder, clean_caption, create_text_encoder, open_embeddings, store
from mg.text.store import EncodeTextConfig, TextEncoderConfig, encode_texts

ROOT = Path(__file__).parents[1]
PROMPTS = ["A cat, www.cats.com", "a dog", "A cat, www.cats.com", "", "ünï \u2028 code|", "and 3 more dogs"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {"t5": t5_folder(folder / "t5"), "clip": clip_folder(folder / "clip")}


@pytest.fixture
def configure(tmp_path, folders):
    def configure(type="t5", length=12, **options) -> EncodeTextConfig:
        encoder = TextEncoderConfig(str(folders[type]), type, length)
        settings = dict(prompt=PROMPTS, output_path=str(tmp_path / "stored"), mode="pynative")
        settings |= options
        return EncodeTextConfig(encoder, **settings)

    return configure


def contents(folder: Path) -> dict:
    stored = open_embeddings(folder)
    return {text: stored.read(text).tobytes() for text in stored}


@pytest.mark.parametrize("type", ["t5", "clip"])
def test_stored_embeddings_are_what_the_encoder_gives(tmp_path, folders, configure, type):
    report = encode_texts(configure(type))
    assert (report.total, report.mine, report.encoded, report.there, report.failed) == (5, 5, 5, 0, [])
    encoder, stored = create_text_encoder(type, folders[type], 12), open_embeddings(tmp_path / "stored")
    cleaned = [clean_caption(prompt, times=2) for prompt in PROMPTS]
    assert list(stored) == list(dict.fromkeys(cleaned)) and len(stored) == 5 and isinstance(stored, TextEncoder)
    for name in ("type", "output_dim", "model_max_length", "has_mask", "config"):
        assert getattr(stored, name) == getattr(encoder, name)
    for asked in (cleaned, PROMPTS):  # what was cleaned is found by what it was before, too
        for found, wanted in zip(stored.encode(asked), encoder.encode(cleaned)):
            if wanted is None:
                assert found is None
            else:
                assert found.dtype == wanted.dtype
                np.testing.assert_array_equal(found, wanted)


def test_embeddings_are_stored_for_the_prompts_of_inference(tmp_path, configure):
    """JSON and |n| in prompts, and scores, are no part of a text, or part of it, for both alike."""
    path = tmp_path / "prompts.txt"
    lines = ['a dog{"reference_path": "x", "mask_strategy": "0"}', "|0|a cat|2|A dog, again", "", "and 3 more dogs"]
    path.write_text("\n".join(lines), encoding="utf-8")
    encode_texts(configure(prompt=[], prompt_path=str(path), aes=6.5, camera_motion="pan left"))
    loops = {"loop": 3, "condition_frame_length": 1}
    asked = GenerateConfig(image_size=[16, 16], prompt_path=str(path), aes=6.5, camera_motion="pan left", **loops)
    texts = {text for request in read_requests(asked) for text in request.texts}
    stored = open_embeddings(tmp_path / "stored")
    assert len(texts) == len(stored) == 5 and all(text in stored for text in texts)


def test_padding_is_not_stored(tmp_path, configure):
    encode_texts(configure(prompt=["a dog"], length=120, shard_size=1))
    (line,) = (tmp_path / "stored" / "index.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["name"] == "a dog" and row["shape"] == [1, 4, 16]
    assert open_embeddings(tmp_path / "stored").read("a dog").shape == (4, 16)
    (shard,) = (tmp_path / "stored").glob("*.safetensors")
    assert shard.stat().st_size < 2**16 + 4 * 16 * 4 + 1


def test_a_text_that_is_not_stored_is_named(tmp_path, configure):
    encode_texts(configure())
    said = "there is no embedding of 'a zebra xxx.*[.]{3}'; store it with mg-encode-text, or give a text encoder"
    with pytest.raises(DataError, match=said) as error:
        open_embeddings(tmp_path / "stored").encode(["a dog", "a zebra " + "x" * 200])
    assert "\n" not in str(error.value) and "a dog" in open_embeddings(tmp_path / "stored")
    with pytest.raises(DataError, match="no text embeddings here, embeddings.json is missing"):
        open_embeddings(tmp_path)
    (tmp_path / "stored" / "embeddings.json").write_text('{"encoder": 3}')
    with pytest.raises(DataError, match="embeddings.json: does not describe text embeddings"):
        open_embeddings(tmp_path / "stored")


def test_captions_of_a_csv_are_cleaned_only_on_request(tmp_path, configure):
    (tmp_path / "index.csv").write_text('path,text\na.mp4,"A Cat, twice"\nb.mp4,\nc.mp4,"A Cat, twice"\n')
    csv = dict(prompt=[], csv_path=str(tmp_path / "index.csv"))
    encode_texts(configure(**csv))
    assert list(open_embeddings(tmp_path / "stored")) == ["A Cat, twice", ""]
    with pytest.raises(DataError, match="no embedding of 'a cat, twice'"):
        open_embeddings(tmp_path / "stored").read("a cat, twice")
    encode_texts(configure(**csv, clean=True, output_path=str(tmp_path / "cleaned")))
    assert list(open_embeddings(tmp_path / "cleaned")) == ["a cat, twice", ""]
    (tmp_path / "index.csv").write_text("path\na.mp4\n")
    with pytest.raises(DataError, match="no row has a caption; it needs a column 'caption' or 'text'"):
        encode_texts(configure(**csv))


def test_a_stopped_run_continues_and_ranks_store_what_one_process_does(tmp_path, configure, monkeypatch):
    encode_texts(configure(output_path=str(tmp_path / "whole")))
    states, seen = store._states, []

    def stopping(encoder, text):
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return states(encoder, text)

    monkeypatch.setattr(store, "_states", stopping)
    monkeypatch.setattr(store, "_SECONDS", -1)  # so that every text has a shard
    with pytest.raises(KeyboardInterrupt):
        encode_texts(configure())
    assert len(open_embeddings(tmp_path / "stored")) == 3
    reports = [encode_texts(configure(), rank, 2) for rank in (0, 1)]
    assert [(report.mine, report.encoded, report.there) for report in reports] == [(3, 1, 2), (2, 1, 1)]
    assert contents(tmp_path / "stored") == contents(tmp_path / "whole") and len(seen) == 6
    assert list(contents(tmp_path / "stored")) == list(contents(tmp_path / "whole"))  # in their order


def test_a_failed_text_affects_no_other_and_is_retried_on_request(tmp_path, configure, monkeypatch):
    states = store._states

    def failing(encoder, text):
        if text == "a dog":
            raise ValueError("it barks")
        return states(encoder, text)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_states", failing)
        report = encode_texts(configure())
    assert report.encoded == 4 and report.failed == [("a dog", "it barks")]
    with pytest.raises(DataError, match="no embedding of 'a dog'; it barks"):
        open_embeddings(tmp_path / "stored").encode(["a dog"])
    assert (encode_texts(configure()).encoded, encode_texts(configure(retry_failed=True)).encoded) == (0, 1)


def test_a_folder_of_other_settings_is_refused(tmp_path, configure, folders):
    encode_texts(configure(prompt=["a dog"]))
    with pytest.raises(ValueError, match="model_max_length was 12 and is 20 now.*another output_path$"):
        encode_texts(configure(length=20))
    with pytest.raises(ValueError, match="encoder.sha256 was "):
        encode_texts(
            EncodeTextConfig(
                TextEncoderConfig(str(t5_folder(tmp_path / "other", num_layers=1)), "t5", 12),
                prompt=["a dog"],
                output_path=str(tmp_path / "stored"),
            )
        )


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(prompt=["a cat{}{}"]), "prompt 0: the JSON after a prompt cannot be read"),
        (dict(prompt=[], csv_path="x", aes=6.5), "aes is 6.5; it must be left out with csv_path"),
        (dict(prompt=[]), "of prompt, prompt_path and csv_path none is given; give one"),
        (dict(prompt_path="x"), "of prompt, prompt_path and csv_path prompt and prompt_path are given; give one"),
        (dict(shard_size=0), "shard_size is 0; it must be at least 1"),
    ],
)
def test_wrong_settings_are_named(configure, options, said):
    with pytest.raises(ValueError, match=said):
        encode_texts(configure(**options))


def test_the_command_stores_a_file_of_prompts(tmp_path, folders, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("A Cat\n\na dog\nA Cat\n", encoding="utf-8")
    options = ["--ckpt_path", folders["t5"], "--text_encoder.model_max_length", 12, "--prompt_path"]
    options += [tmp_path / "prompts.txt", "--save_dir", tmp_path / "stored", "--embeddings_dtype", "bf16"]
    monkeypatch.setattr("mg.runtime.setup", lambda *_: Runtime("cpu"))
    monkeypatch.setattr("sys.argv", ["mg-encode-text", *map(str, options)])
    assert main() == 0
    assert "3 texts encoded, 0 were there, 0 failed; see " in capsys.readouterr().out
    stored = open_embeddings(tmp_path / "stored")
    assert list(stored) == ["a cat", "", "a dog"]
    wanted, _ = create_text_encoder("t5", folders["t5"], 12).encode(["a cat"])
    np.testing.assert_allclose(stored.encode(["a cat"])[0], wanted, rtol=2**-8, atol=0)


@pytest.mark.full
def test_two_workers_store_what_one_stores(tmp_path, folders, configure):
    encode_texts(configure(output_path=str(tmp_path / "one")))
    options = [f"--ckpt_path={folders['t5']}", "--text_encoder.model_max_length=12", "--device=cpu", "--prompt"]
    logs = tmp_path / "logs"
    script = ROOT / "scripts" / "encode_text.py"
    said = finish(start(logs, script, *options, *PROMPTS, f"--output_path={tmp_path / 'two'}"), logs, timeout=600)
    assert "(rank 0 has 3 of 5)" in said and "(rank 1 has 2 of 5)" in said
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2
