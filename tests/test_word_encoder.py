"""The text encoder that takes no download: the same one everywhere, tells texts apart, and is read as any T5 is."""

import hashlib

import numpy as np
import pytest
from commands import run_here

from mg.checkpoints import read_state_dict
from mg.data.clip_folder import write_csv
from mg.text import create_text_encoder
from mg.text.words import make_word_encoder, words_of

TEXTS = ["a cat, the camera moves left", "a cat, the camera moves right", "the camera, a cat moves left", "Two dogs!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    make_word_encoder(folder, words_of(TEXTS))
    return folder


def test_words_are_those_of_the_texts_in_lower_case():
    assert words_of(TEXTS[:1] + TEXTS[3:]) == ["!", ",", "a", "camera", "cat", "dogs", "left", "moves", "the", "two"]


def test_texts_differ_by_words_and_by_their_order(folder):
    encoder = create_text_encoder("t5", folder, model_max_length=12)
    y, mask = encoder.encode([*TEXTS, "A CAT , the camera moves left"])
    assert y.shape == (5, 1, 12, 64) and mask.sum(1).tolist() == [8, 8, 8, 4, 8]
    np.testing.assert_array_equal(y[4], y[0])  # neither case nor spaces matter
    assert min(np.abs(y[0] - other).max() for other in y[1:4]) > 1
    assert encoder.tokenizer("a unicorn and a griffin", 12).ids.tolist()[1:3] == [2, 2]  # words that it does not know


def test_the_states_have_about_the_norm_that_a_denoiser_expects(folder):
    y, mask = create_text_encoder("t5", folder, model_max_length=12).encode(TEXTS[:1])
    np.testing.assert_allclose(np.square(y[0, 0][mask[0]]).mean(), (4096**0.5 / 64**0.5 / 2) ** 2, rtol=1e-3)


def test_the_same_words_and_seed_are_the_same_files(folder, tmp_path):
    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    make_word_encoder(tmp_path / "again", words_of(reversed(TEXTS)))
    assert digests(tmp_path / "again") == digests(folder)
    make_word_encoder(tmp_path / "other", words_of(TEXTS), seed=1)
    weights = [read_state_dict(path / "model.safetensors")["shared.weight"] for path in (folder, tmp_path / "other")]
    assert not np.array_equal(*weights)


def test_the_command_takes_the_captions_of_a_csv(folder, tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "clips.csv", ("video", "caption"), [("a.mp4", text) for text in TEXTS])
    arguments = ["--csv_path", tmp_path / "clips.csv", "--output_dir", tmp_path / "made"]
    run_here(monkeypatch, "tools/make_text_encoder.py", *arguments)
    assert "a text encoder for 11 words" in capsys.readouterr().out
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_no_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no words"):
        make_word_encoder(tmp_path, [])
