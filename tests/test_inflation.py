"""Inflating an image VAE to a TAE: names, identity in time, the way back, and the command line."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_vaes import TINY, TINY_TAE, image_vae

from mg.checkpoints import CheckpointError, read_state_dict, write_state_dict
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.tae.inflation import config_from_image_vae, image_config, inflate, to_image_vae
from mg.models.tae.tae import TemporalAutoencoder

ROOT = Path(__file__).parents[1]
SD35 = {  # the config.json of SD3.5's VAE
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def names_in_diffusers(config: dict) -> dict[str, str]:
    """Our names of an image VAE's parameters, and diffusers'."""
    shapes = ImageAutoencoder.weight_shapes(image_config(config))
    return ImageAutoencoder.formats["diffusers"].names(shapes, config)


def from_diffusers(state: dict, config: dict) -> dict:
    given = image_config(config)
    return ImageAutoencoder.fit(state, given, ImageAutoencoder.weight_shapes(given))[0]


def to_ldm(state: dict, prefix: str = "") -> dict:
    """diffusers' names -> latent diffusion's, as its torch code writes them."""
    ours = {theirs: ldm for ldm, theirs in names_in_diffusers(TINY_TAE).items()}
    renamed = {}
    for name, array in state.items():
        name = prefix + ours[name].replace(".gamma", ".weight").replace(".beta", ".bias")
        renamed[name] = array[..., None, None] if array.ndim == 2 else array
    return renamed


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Names.


def test_names_and_shapes_are_those_of_mindones_checkpoints():
    lines = (Path(__file__).parent / "data" / "tae_names.txt").read_text().splitlines()
    wanted = {name: ast.literal_eval(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    shapes = TemporalAutoencoder.weight_shapes(config_from_image_vae(SD35))
    assert shapes == wanted and list(shapes) == list(wanted)
    assert len(shapes) == 388 and sum(map(math.prod, shapes.values())) == 114_472_801


def test_the_config_of_sd35_gives_the_specifications_tae_config():
    from mg.models.tae.tae import TAE_CONFIG

    assert config_from_image_vae(SD35) == {**TAE_CONFIG, "resolution": 1024, "norm_num_groups": 32}


@pytest.mark.parametrize("quant", (False, True))
def test_names_and_shapes_are_those_of_diffusers(quant):
    diffusers = pytest.importorskip("diffusers")
    given = {**TINY, "use_quant_conv": quant, "use_post_quant_conv": quant}
    model = diffusers.AutoencoderKL(**given)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = config_from_image_vae(dict(model.config))
    assert {name: array.shape for name, array in image_vae(config).items()} == wanted


def test_the_full_image_vae_has_244_tensors():
    assert len(names_in_diffusers(config_from_image_vae(SD35))) == 244


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        ({"_class_name": "AutoencoderDC"}, "_class_name is AutoencoderDC"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"act_fn": "gelu"}, "act_fn is gelu"),
        ({"norm_num_groups": 48}, "and of 48"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"block_out_channels": [32, 48]}, "multiple of the first"),
        ({"block_out_channels": [40, 80]}, "and of 32"),
        ({"block_out_channels": "wide"}, "list of whole numbers"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"scaling_factor": "one"}, "scaling_factor is one"),
    ),
)
def test_an_architecture_without_a_temporal_counterpart_is_refused(change, reason):
    with pytest.raises(CheckpointError, match=reason):
        config_from_image_vae({**TINY, **change})


def test_the_config_of_our_own_image_vae_gives_the_same_tae():
    keys = ("z_channels", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "scaling_factor", "shift_factor")
    ours = {key: TINY_TAE[key] for key in keys}
    assert config_from_image_vae({**ours, "resolution": 32}) == TINY_TAE == config_from_image_vae(TINY)


# Inflation.


def test_temporal_layers_start_as_the_identity_and_attention_without_effect():
    state, report = inflate(image_vae(), TINY_TAE)
    assert {name: array.shape for name, array in state.items()} == TemporalAutoencoder.weight_shapes(TINY_TAE)
    assert all(array.dtype == np.float32 for array in state.values())
    assert len(report.used) == len(image_vae()) and report.complete and not report.unexpected
    weight = state["encoder.down.0.downsample_temp.conv.weight"]  # (C, C, 1, 3)
    np.testing.assert_array_equal(weight[:, :, 0, 1], np.eye(32))
    assert not weight[:, :, 0, ::2].any()
    np.testing.assert_array_equal(state["decoder.up.0.block.0.nin_shortcut.conv_temp.weight"][:, :, 0, 0], np.eye(32))
    attention = "encoder.mid.attn_1.1"
    assert not state[f"{attention}.proj_out.weight"].any() and not state[f"{attention}.proj_out.bias"].any()
    assert (state[f"{attention}.norm.gamma"] == 1).all() and not state[f"{attention}.norm.beta"].any()
    queries = state[f"{attention}.to_q.weight"]
    assert 0.015 < queries.std() < 0.025 and np.abs(queries).max() <= 0.04
    assert not np.array_equal(queries, state[f"{attention}.to_k.weight"])


def test_inflation_is_deterministic():
    assert_equal(inflate(image_vae(), TINY_TAE)[0], inflate(image_vae(), TINY_TAE)[0])


def test_every_dialect_of_names_inflates_to_the_same_tae():
    state = image_vae()
    wanted = inflate(state, TINY_TAE)[0]
    old = {}
    for name, array in state.items():
        for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new_name}.", f".{old_name}.")
        old[name] = array
    assert old.keys() != state.keys()
    for dialect in (old, to_ldm(state), to_ldm(state, "first_stage_model."), from_diffusers(state, TINY_TAE)):
        found, report = inflate(dialect, TINY_TAE)
        assert_equal(found, wanted)
        assert sorted(report.used) == sorted(dialect) and not report.unexpected


def test_tensors_next_to_a_prefixed_vae_are_left_over_by_name():
    others = {"model.diffusion_model.x_embedder.weight": np.ones(3), "text_encoders.t5.encoder.w": np.ones(3)}
    state, report = inflate(to_ldm(image_vae(), "first_stage_model.") | others, TINY_TAE)
    assert_equal(state, inflate(image_vae(), TINY_TAE)[0])
    assert report.unexpected == list(others)


def test_weights_that_do_not_fit_are_refused_with_their_names():
    state = image_vae()
    lacking = {name: array for name, array in state.items() if name != "encoder.conv_norm_out.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing \(encoder\.conv_norm_out\.bias\)") as raised:
        inflate(lacking, TINY_TAE)
    assert raised.value.report.missing == ["encoder.conv_norm_out.bias"]
    with pytest.raises(CheckpointError, match=r"encoder\.conv_out\.bias \(9,\), wanted \(8,\)"):
        inflate(state | {"encoder.conv_out.bias": np.ones(9)}, TINY_TAE)
    deeper = config_from_image_vae({**TINY, "layers_per_block": 2})
    with pytest.raises(CheckpointError, match="left over"):
        inflate(image_vae(deeper), TINY_TAE)


@pytest.mark.parametrize("quant", (False, True))
def test_the_way_to_a_tae_and_back_changes_no_bit(quant):
    config = {**TINY_TAE, "use_quant_conv": quant, "use_post_quant_conv": quant}
    state = image_vae(config)
    assert_equal(to_image_vae(inflate(state, config)[0], config), state)
    assert_equal(ImageAutoencoder.original_weights(from_diffusers(state, config), config), state)


def test_a_missing_parameter_is_named_on_the_way_back():
    state = inflate(image_vae(), TINY_TAE)[0]
    del state["decoder.norm_out.gamma"]
    with pytest.raises(CheckpointError, match=r"decoder\.norm_out\.gamma is missing"):
        to_image_vae(state, TINY_TAE)


# mindone's checkpoints.


def test_mindones_prefixes_and_leftovers_go():
    tae = inflate(image_vae(), TINY_TAE)[0]
    trained = {f"autoencoder._backbone.{name}": array for name, array in tae.items()}
    leftovers = {
        "autoencoder.encoder.down.0.block.0.temb_proj.weight": np.ones(2),
        "moment1.encoder.conv_in.conv_spat.weight": np.ones(2),
        "logvar": np.zeros(()),
        "global_step": np.array(3),
    }
    shapes = TemporalAutoencoder.weight_shapes(TINY_TAE)
    found, report = TemporalAutoencoder.fit(trained | leftovers, TINY_TAE, shapes)
    assert_equal(found, tae)
    assert report.unexpected == list(leftovers) and len(report.used) == len(tae)


# Files and the command line.


@pytest.fixture(scope="module")
def diffusers_vae(tmp_path_factory):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**TINY)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("form", ("folder", "single file", "pt"))
def test_every_source_gives_the_weights_that_diffusers_has(diffusers_vae, tmp_path, dtype, form):
    import copy

    import torch
    from safetensors.torch import save_file

    model = copy.deepcopy(diffusers_vae[0]).to(getattr(torch, dtype))
    wanted = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    others = {}
    if form == "folder":
        model.save_pretrained(tmp_path / "vae")
        source = tmp_path
    elif form == "single file":
        others = {"model.diffusion_model.w": torch.ones(2), "text_encoders.clip_l.logit_scale": torch.ones(1)}
        source = tmp_path / "sd.safetensors"
        state = {name: tensor.contiguous() for name, tensor in to_ldm(model.state_dict(), "first_stage_model.").items()}
        save_file(state | others, source)
    else:
        source = tmp_path / "vae.pt"
        torch.save({"state_dict": model.state_dict(), "global_step": 5}, source)
    state, report = inflate(read_state_dict(source), TINY_TAE)
    assert sorted(report.unexpected) == sorted(others)
    assert_equal(to_image_vae(state, TINY_TAE), wanted)


def run_tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/inflate_vae_to_tae.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def write_vae(folder: Path, config: dict | None = TINY) -> Path:
    write_state_dict(folder / "diffusion_pytorch_model.safetensors", image_vae())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "diffusion_pytorch_model.safetensors"


def test_the_tool_writes_the_tae_its_config_and_its_report(tmp_path):
    source, target = write_vae(tmp_path / "vae"), tmp_path / "models" / "tae_vae2d.ckpt"
    done = run_tool("--src", source, "--target", target, "--report", tmp_path / "names.txt")
    assert (done.returncode, done.stderr) == (0, "")
    assert "120 used, 0 missing, 0 of another shape, 0 left over" in done.stdout
    assert_equal(read_state_dict(target), inflate(image_vae(), TINY_TAE)[0])
    assert json.loads(target.with_suffix(".json").read_text()) == {"model": "tae", **TINY_TAE}
    assert (tmp_path / "names.txt").read_text().splitlines() == [f"used {name}" for name in image_vae()]


def test_the_tool_leaves_out_nothing_of_a_single_file_checkpoint(tmp_path):
    source, target = tmp_path / "sd.safetensors", tmp_path / "tae.safetensors"
    others = {"model.diffusion_model.w": np.ones(2), "cond_stage_model.w": np.ones(2)}
    write_state_dict(source, to_ldm(image_vae(), "first_stage_model.") | others, "bf16")
    source.with_suffix(".json").write_text(json.dumps(TINY))
    done = run_tool("--src", source, "--target", target, "--dtype", "bf16", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "120 used, 0 missing, 0 of another shape, 2 left over" in done.stdout
    assert all(f"left over {name}\n" in done.stdout for name in others)
    assert "used first_stage_model.encoder.conv_in.weight\n" in done.stdout
    wanted = ImageAutoencoder.original_weights(from_diffusers(read_state_dict(source), TINY_TAE), TINY_TAE)
    assert_equal(to_image_vae(read_state_dict(target), TINY_TAE), wanted)


@pytest.mark.parametrize("wrong", ("architecture", "config", "truncated", "pickle", "target"))
def test_the_tool_ends_with_one_line_and_code_2_and_writes_nothing(tmp_path, wrong):
    source, target = write_vae(tmp_path / "vae", None), tmp_path / "out" / "tae.ckpt"
    reason = "config.json"
    if wrong == "config":
        (tmp_path / "vae" / "config.json").write_text(json.dumps({**TINY, "act_fn": "gelu"}))
        reason = "config.json: act_fn is gelu"
    elif wrong == "truncated":
        source.write_bytes(source.read_bytes()[:-1])
        reason = "cut short"
    elif wrong == "pickle":
        torch = pytest.importorskip("torch")
        source = tmp_path / "vae" / "vae.pt"
        torch.save({"w": torch.zeros(1), "when": Path("x")}, source)
        reason = "1 left over (w)"
    elif wrong == "target":
        target = tmp_path / "out" / "tae.pt"
        reason = "must end in .ckpt or .safetensors"
    done = run_tool("--src", source, "--target", target)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and reason in done.stderr
    assert str(target if wrong == "target" else source.parent) in done.stderr
    assert not target.parent.exists()
