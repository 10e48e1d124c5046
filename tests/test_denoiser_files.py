"""The networks' weights in files: the originals' are known, converted there and back, and started from."""

import json
import logging
import sys

import denoisers
import numpy as np
import pytest
from arrays import relative_error
from denoisers import CASES, DATA, array, config_of, inputs, pixart_weights
from test_denoisers import TINY

from mg.checkpoints import CheckpointError, read_state_dict, write_state_dict
from mg.cli import convert as convert_command
from mg.diffusion.networks import DENOISERS, create_denoiser
from mg.models import create_model, from_pretrained

CONFIGS = {"stdit": TINY | {"input_size": [1, 4, 4]}, "stdit2": TINY, "stdit3": TINY, "dit": TINY}


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run mg-convert in this process: its exit code and all that it said."""

    def convert(src, target, *options):
        arguments = ["--src", src, "--target", target, *options]
        monkeypatch.setattr(sys, "argv", ["mg-convert", *map(str, arguments)])
        code = 0
        try:
            convert_command.run()
        except SystemExit as stopped:
            code = stopped.code or 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return convert


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name in some:
        assert some[name].shape == others[name].shape and some[name].tobytes() == others[name].tobytes(), name


def weights_of(network) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy() for name, parameter in network.named_weights()}


# The originals' own.


@pytest.mark.parametrize("case", CASES)
def test_the_originals_weights_are_known_by_their_tensors_and_come_back_to_the_bit(tmp_path, convert, case):
    source, name = DATA / case / "weights.safetensors", case.partition("_")[0]
    assert DENOISERS.model_name(source) == name
    original = tmp_path / "original.safetensors"
    write_state_dict(original, {f"module.{key}": value for key, value in denoisers.read(case).items()})
    original.with_suffix(".json").write_text(json.dumps({"model": name, **config_of(case)}))
    assert convert(original, tmp_path / "ours.ckpt")[0] == 0
    assert json.loads((tmp_path / "ours.json").read_text())["model"] == name
    assert convert(tmp_path / "ours.ckpt", tmp_path / "theirs", "--to", "original")[0] == 0
    assert_equal(read_state_dict(tmp_path / "theirs"), denoisers.read(case))


@pytest.mark.parametrize("case, other", [("stdit2", "stdit3"), ("stdit3", "dit"), ("dit_text", "stdit")])
def test_weights_of_another_network_are_refused(case, other):
    with pytest.raises(CheckpointError, match=f"holds a model other than '{other}': its tensors are those of "):
        create_denoiser(other, DATA / case / "weights.safetensors")


def test_an_autoencoder_is_no_denoiser_and_the_other_way_round(tmp_path):
    with pytest.raises(ValueError, match="there is no model 'stdit2'; the models are dc_ae, "):
        create_model("stdit2")
    with pytest.raises(CheckpointError, match="match no known model; give its name"):
        from_pretrained(DATA / "stdit2" / "weights.safetensors")
    with pytest.raises(ValueError, match="there is no network 'tae'"):
        create_denoiser("tae")


@pytest.mark.parametrize("name", ["stdit2", "stdit3"])
def test_a_released_folder_is_read_by_its_own_config(tmp_path, convert, name):
    """As OpenSora-STDiT-v2-stage3 and -v3 are published: config.json of their classes, with keys of all sorts."""
    config = config_of(name) | {"enable_flash_attn": True, "input_size": [None, None, None], "drop_path": 0.0}
    described = {"architectures": [f"STDiT{name[-1]}"], "model_type": f"STDiT{name[-1]}", "torch_dtype": "float32"}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**described, **config}))
    write_state_dict(tmp_path / "hub" / "model.safetensors", denoisers.read(name))
    network = create_denoiser(f"STDiT{name[-1]}-XL/2", tmp_path / "hub")
    assert network.config["qk_norm_legacy"] == (name == "stdit2") and not network.config["enable_flash_attn"]
    found = network(**inputs(name, "mask"))
    assert relative_error(found, array(name, "out")) < 1e-4
    assert convert(tmp_path / "hub", tmp_path / "ours")[0] == 0
    assert convert(tmp_path / "ours", tmp_path / "again", "--to", "original")[0] == 0
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["architectures"] == described["architectures"] and again["input_size"] == [None, None, None]
    assert create_denoiser(name, tmp_path / "again").config == network.config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_is_saved_and_built_again(tmp_path, name):
    network = create_denoiser(name, **CONFIGS[name])
    network.save_pretrained(tmp_path)
    again = create_denoiser(name, tmp_path)
    assert again.config == network.config
    assert_equal(weights_of(again), weights_of(network))


@pytest.mark.parametrize("tokens", [3, 9])
def test_a_null_caption_of_another_length_is_cut_or_its_last_row_repeated(tokens):
    """A network for longer captions than those that the weights were trained for, or for shorter ones."""
    stored = denoisers.read("stdit3")["y_embedder.y_embedding"]
    network = create_denoiser("stdit3", DATA / "stdit3" / "weights.safetensors", **config_of("stdit3") | {
        "model_max_length": len(stored) + tokens - 6
    })  # fmt: skip
    wanted = np.concatenate([stored, np.repeat(stored[-1:], 3, axis=0)])[: len(stored) + tokens - 6]
    np.testing.assert_array_equal(network.null_caption, wanted)


def test_positions_of_another_size_are_computed_and_not_read():
    """Weights of Open-Sora 1.0 for 16 frames serve 64."""
    config = config_of("stdit") | {"input_size": [6, 8, 10]}
    network = create_denoiser("stdit", DATA / "stdit" / "weights.safetensors", **config)
    weights = weights_of(network)
    assert weights["pos_embed"].shape == (1, 20, 64) and weights["pos_embed_temporal"].shape == (1, 6, 64)
    assert weights["pos_embed"].any() and weights["pos_embed_temporal"].any()


# What older networks leave.


@pytest.mark.parametrize("name, new", [
    ("stdit", {"attn_temp"}),
    ("stdit2", {"attn_temp", "q_norm", "k_norm", "scale_shift_table_temporal", "t_block_temp", "csize_embedder"}),
    ("stdit3", {"temporal_blocks", "q_norm", "k_norm", "fps_embedder"}),
])  # fmt: skip
def test_training_starts_from_pixart(tmp_path, convert, caplog, name, new):
    torch = pytest.importorskip("torch")
    state = pixart_weights(name, CONFIGS[name])
    source = tmp_path / "PixArt-XL-2-512x512.pth"
    torch.save({"state_dict": {key: torch.from_numpy(value) for key, value in state.items()}}, source)
    with caplog.at_level(logging.INFO, "mg"):
        started = weights_of(create_denoiser(name, source, **CONFIGS[name]))
    said = caplog.text
    assert " 0 missing, 0 of another shape" in said and " new (" in said
    assert all(any(part in key for key in started) for part in new)
    lacking = {key for key in started if key.replace("spatial_blocks", "blocks") not in state}
    assert all(any(part in key for key in lacking) for part in new)
    patches, caption = "x_embedder.proj.weight", "y_embedder.y_embedding"
    np.testing.assert_array_equal(started[patches], state[patches][:, :, None])
    np.testing.assert_array_equal(started[caption], state[caption][[0, 1, 1, 1]])
    settings = DENOISERS.model_class(name).settings
    for key in started.keys() - lacking - {patches, caption, *settings}:
        np.testing.assert_array_equal(started[key], state[key.replace("spatial_blocks", "blocks")])

    source.with_suffix(".json").write_text(json.dumps({"model": name, **CONFIGS[name]}))
    code, said = convert(source, tmp_path / "start.ckpt", "--model", name)
    assert code == 0 and f"{len(lacking - {*settings})} new (" in said
    assert {*weights_of(create_denoiser(name, tmp_path / "start.ckpt"))} == {*started}


def test_a_file_that_pixart_could_not_have_written_is_refused(tmp_path):
    """One of the network's own with a hole, and PixArt's with one."""
    own = {key: value for key, value in denoisers.read("stdit2").items() if "t_block_temp" not in key}
    write_state_dict(tmp_path / "own.safetensors", own)
    with pytest.raises(CheckpointError, match="2 missing .t_block_temp.1.weight, t_block_temp.1.bias"):
        create_denoiser("stdit2", tmp_path / "own.safetensors", **config_of("stdit2"))
    state = pixart_weights("stdit2", CONFIGS["stdit2"])
    del state["blocks.0.mlp.fc1.bias"]
    write_state_dict(tmp_path / "pixart.safetensors", state)
    with pytest.raises(CheckpointError, match="1 missing .blocks.0.mlp.fc1.bias"):
        create_denoiser("stdit2", tmp_path / "pixart.safetensors", **TINY)


def test_dit_of_images_is_read_for_classes_and_is_a_start_for_texts(tmp_path, caplog):
    """DiT-XL-2-256x256.pt, whose patches have no time."""
    config = {**TINY, "input_size": [2, 4, 4], "condition": "label_10"}
    state = weights_of(create_denoiser("dit", **config))
    del state["pos_embed_spatial"], state["pos_embed_temporal"]
    image = {**state, "x_embedder.proj.weight": state["x_embedder.proj.weight"][:, :, 0]}
    source = tmp_path / "DiT-XL-2-256x256.safetensors"
    write_state_dict(source, {**image, "pos_embed": np.zeros((1, 4, 24), np.float32)})
    assert DENOISERS.model_name(source) == "dit"
    found = weights_of(create_denoiser("dit", source, **config))
    assert all(np.array_equal(found[key], state[key]) for key in state) and len(found) == len(state) + 2
    with caplog.at_level(logging.INFO, "mg"):
        texts = weights_of(create_denoiser("dit", source, **config | {"condition": "text"}))
    assert "5 new (y_embedder.y_embedding, y_embedder.y_proj.fc1.weight," in caplog.text
    assert np.array_equal(texts["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
