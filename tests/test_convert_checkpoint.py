"""tools/convert_checkpoint.py: to the original's names and back, bit for bit; one line and exit code 2 for mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from commands import run_here

from mg.checkpoints import read_state_dict, write_state_dict
from mg.models import create_model, from_pretrained
from mg.models.dc_ae.dc_ae import VideoDCAE
from mg.models.hunyuan_vae.hunyuan_vae import HunyuanVAE
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.tae.tae import TemporalAutoencoder
from mg.models.temporal_vae.temporal_vae import TEMPORAL_VAE_CONFIG, OpenSoraVAE
from mg.models.temporal_vae.weights import config_from_open_sora, config_to_open_sora

ROOT = Path(__file__).parents[1]
MODELS = {model.name: model for model in (VideoDCAE, HunyuanVAE, ImageAutoencoder, TemporalAutoencoder, OpenSoraVAE)}
CONFIGS = {
    "dc_ae": {
        "encoder_width_list": [32, 32, 32, 32, 64, 64],
        "decoder_width_list": [32, 32, 32, 64, 64, 64],
        "encoder_depth_list": [1, 2, 1, 1, 2, 1],
        "decoder_depth_list": [2, 1, 1, 1, 1, 2],
        "latent_channels": 16,
    },
    "hunyuan_vae": {
        "block_out_channels": [8, 12, 16],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "spatial_compression_ratio": 2,
    },
    "image_vae": {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "norm_num_groups": 8, "z_channels": 4},
    "tae": {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4},
    "temporal_vae": {
        "spatial_block_out_channels": [32, 64],
        "spatial_layers_per_block": 1,
        "filters": 32,
        "channel_multipliers": [1, 2, 1],
        "temporal_downsample": [True, False],
        "num_res_blocks": 2,
        "micro_frame_size": None,
        "shift": [0.1, -0.2, 0.3, 0.0],
        "scale": [1.5, 2.25, 3.1, 0.7],
    },
}
AN_ORIGINAL_NAME = {  # as the originals' own files have it, and ours
    "dc_ae": ("decoder.stages.0.op_list.0.main.conv.conv.bias", "decoder.stages.0.upsample.conv.bias"),
    "hunyuan_vae": ("decoder.up_blocks.1.upsamplers.0.conv.conv.bias", "decoder.up.1.upsample.conv.bias"),
    "image_vae": ("encoder.down_blocks.0.resnets.0.norm1.weight", "encoder.down.0.block.0.norm1.gamma"),
    "tae": ("encoder.conv_in.conv_temp.weight", "encoder.conv_in.conv_temp.weight"),
    "temporal_vae": (
        "temporal_vae.decoder.conv_blocks.0.conv.weight",
        "temporal_vae.decoder.up.1.upsample.conv.weight",
    ),
}


def random_weights(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    config = {**MODELS[name].default_config, **CONFIGS[name]}
    rng = np.random.default_rng(seed)
    shapes = MODELS[name].weight_shapes(config)
    return {parameter: rng.normal(size=shape).astype(np.float32) for parameter, shape in shapes.items()}


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name in some:
        assert some[name].shape == others[name].shape and some[name].tobytes() == others[name].tobytes(), name


@pytest.fixture
def convert(monkeypatch):
    """Run the tool in this process: its exit code."""

    def convert(model, src, target, *options) -> int:
        arguments = [*(["--model", model] if model else []), "--src", src, "--target", target, *options]
        return run_here(monkeypatch, "tools/convert_checkpoint.py", *arguments) or 0

    return convert


def write(path: Path, name: str, state: dict) -> Path:
    """A file of weights with its config next to it."""
    write_state_dict(path, state)
    path.with_suffix(".json").write_text(json.dumps({"model": name, **CONFIGS[name]}))
    return path


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("first, second", [(".ckpt", ".safetensors"), (".safetensors", ".ckpt")])
def test_ours_to_the_originals_names_and_back_is_bit_equal(tmp_path, convert, name, first, second):
    ours = random_weights(name)
    source = write(tmp_path / f"ours{first}", name, ours)
    assert convert(name, source, tmp_path / f"original{second}", "--to", "original") == 0
    original = read_state_dict(tmp_path / f"original{second}")
    their_name, our_name = AN_ORIGINAL_NAME[name]
    assert original[their_name].tobytes() == ours[our_name].tobytes()
    assert convert(None, tmp_path / f"original{second}", tmp_path / f"again{first}") == 0
    assert_equal(read_state_dict(tmp_path / f"again{first}"), ours)
    model_config = {**MODELS[name].default_config, **CONFIGS[name]}
    assert json.loads((tmp_path / "again.json").read_text()) == {"model": name, **model_config}


FORMATS = [(name, format) for name, model in MODELS.items() for format in model.formats]


@pytest.mark.parametrize("name, format", FORMATS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_format_is_written_and_read_again_to_the_bit(tmp_path, convert, name, format, dtype):
    source = write(tmp_path / "ours.ckpt", name, random_weights(name))
    assert convert(name, source, tmp_path / "rounded", "--dtype", dtype) == 0
    assert convert(None, tmp_path / "rounded", tmp_path / "theirs", "--to", format, "--dtype", dtype) == 0
    assert (tmp_path / "theirs" / MODELS[name].formats[format].file).is_file()
    assert convert(None, tmp_path / "theirs", tmp_path / "again", "--dtype", dtype) == 0
    files = [tmp_path / folder / "model.safetensors" for folder in ("rounded", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert from_pretrained(tmp_path / "theirs").config == from_pretrained(tmp_path / "rounded").config


def test_tencents_names_and_config_are_those_of_its_file(tmp_path, convert):
    source = write(tmp_path / "ours.ckpt", "hunyuan_vae", random_weights("hunyuan_vae"))
    assert convert(None, source, tmp_path / "tencent", "--to", "tencent") == 0
    state = read_state_dict(tmp_path / "tencent")
    assert all(name.startswith("vae.") for name in state)
    assert "vae.encoder.down_blocks.0.downsamplers.0.conv.conv.weight" in state
    described = json.loads((tmp_path / "tencent" / "config.json").read_text())
    levels = len(CONFIGS["hunyuan_vae"]["block_out_channels"])
    wanted = {
        "_class_name": "AutoencoderKLCausal3D",
        "down_block_types": ["DownEncoderBlockCausal3D"] * levels,
        "time_compression_ratio": 4,
        "sample_size": 256,
        "sample_tsize": 64,
    }
    assert wanted.items() <= described.items() and "temporal_compression_ratio" not in described


def test_one_of_several_state_dicts_is_converted_by_its_key(tmp_path, convert, capsys):
    torch = pytest.importorskip("torch")
    ours = random_weights("image_vae")
    ema, raw = ({key: torch.from_numpy(array + extra) for key, array in ours.items()} for extra in (0, 1))
    torch.save({"state_dict": raw, "ema": ema}, tmp_path / "x.ckpt")
    (tmp_path / "x.json").write_text(json.dumps({"model": "image_vae", **CONFIGS["image_vae"]}))
    assert convert(None, tmp_path / "x.ckpt", tmp_path / "new") == 2
    assert "several state dicts (state_dict, ema)" in capsys.readouterr().err
    assert convert(None, tmp_path / "x.ckpt", tmp_path / "new", "--key", "ema") == 0
    assert_equal(read_state_dict(tmp_path / "new"), ours)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_pytorchs_files_to_ours_and_back_is_bit_equal(tmp_path, convert, name, suffix):
    torch = pytest.importorskip("torch")
    config = {**MODELS[name].default_config, **CONFIGS[name]}
    original = MODELS[name].original_weights(random_weights(name), config)
    source = tmp_path / f"original{suffix}"
    torch.save({key: torch.from_numpy(array) for key, array in original.items()}, source)
    source.with_suffix(".json").write_text(json.dumps(MODELS[name].original_config(config)))
    assert convert(name, source, tmp_path / "ours") == 0
    assert_equal(read_state_dict(tmp_path / "ours"), random_weights(name))
    assert from_pretrained(tmp_path / "ours").name == name
    assert convert(name, tmp_path / "ours", tmp_path / "again.safetensors", "--to", "original") == 0
    assert_equal(read_state_dict(tmp_path / "again.safetensors"), original)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_names_are_those_of_the_model_that_is_built(name):
    model = create_model(name, **CONFIGS[name])
    shapes = MODELS[name].weight_shapes(model.config)
    assert shapes == {parameter: tuple(p.shape) for parameter, p in model.named_weights()}


def test_a_folder_for_the_originals_library(tmp_path, convert, capsys):
    source = write(tmp_path / "ours.ckpt", "image_vae", random_weights("image_vae"))
    assert convert("image_vae", source, tmp_path / "hub", "--to", "original") == 0
    described = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert described["_class_name"] == "AutoencoderKL" and described["block_out_channels"] == [32, 32]
    assert (tmp_path / "hub" / "diffusion_pytorch_model.safetensors").is_file()
    numbers = sum(array.size for array in random_weights("image_vae").values())
    assert f"{tmp_path / 'hub'}: {len(random_weights('image_vae'))} tensors, {numbers:,} parameters" in (
        capsys.readouterr().out
    )
    assert convert("image_vae", tmp_path / "hub", tmp_path / "again.ckpt") == 0
    assert_equal(read_state_dict(tmp_path / "again.ckpt"), random_weights("image_vae"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_stays_as_it_is_there_and_back(tmp_path, convert, dtype):
    source = write(tmp_path / "ours.ckpt", "dc_ae", random_weights("dc_ae"))
    assert convert("dc_ae", source, tmp_path / "a.safetensors", "--to", "original", "--dtype", dtype) == 0
    assert convert("dc_ae", tmp_path / "a.safetensors", tmp_path / "b.ckpt", "--dtype", dtype) == 0
    assert convert("dc_ae", tmp_path / "b.ckpt", tmp_path / "c.safetensors", "--to", "original", "--dtype", dtype) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_tensors_that_are_not_parameters_are_left_out_and_named(tmp_path, convert, capsys):
    source = write(tmp_path / "ours.ckpt", "dc_ae", {**random_weights("dc_ae"), "ema.decay": np.ones(1, np.float32)})
    assert convert("dc_ae", source, tmp_path / "new.ckpt") == 0
    assert "1 left over (ema.decay)" in capsys.readouterr().out
    assert_equal(read_state_dict(tmp_path / "new.ckpt"), random_weights("dc_ae"))


def mistakes(folder: Path) -> dict[str, tuple[list, str]]:
    """Arguments and what is to be said about them."""
    state = random_weights("dc_ae")
    good = write(folder / "good.ckpt", "dc_ae", state)
    bias = "decoder.project_out.bias"
    fewer = write(folder / "fewer.ckpt", "dc_ae", {name: array for name, array in state.items() if name != bias})
    shaped = write(folder / "shaped.ckpt", "dc_ae", {**state, bias: np.zeros(4, np.float32)})
    (folder / "bare").mkdir()
    bare = folder / "bare" / "bare.ckpt"
    write_state_dict(bare, state)
    strange = write(folder / "strange.ckpt", "dc_ae", state)
    strange.with_suffix(".json").write_text(json.dumps({"latents": 16}))
    new = folder / "new.ckpt"
    return {
        "no source": (["dc_ae", folder / "none.ckpt", new], "none.ckpt"),
        "itself": (["dc_ae", good, good], "would overwrite the source"),
        "its own folder": (["dc_ae", folder / "bare", folder / "bare"], "would overwrite the source"),
        "pt": (["dc_ae", good, folder / "new.pt"], "new.pt: weights are written to .safetensors or .ckpt"),
        "missing": (["dc_ae", fewer, new], f"fewer.ckpt does not fit this dc_ae: {len(state) - 1} used, 1 missing"),
        "shape": (["dc_ae", shaped, new], f"1 of another shape ({bias} (4,), wanted (3,))"),
        "no config": (["dc_ae", bare, new], "put its config next to it"),
        "another model": (["tae", good, new], "holds a model other than 'tae'"),
        "strange config": (["dc_ae", strange, new], "strange.json: dc_ae has no config key 'latents'"),
        "no format": (
            ["dc_ae", good, new, "--to", "tencent"],
            "--to is 'tencent'; dc_ae can be written as ours, original, open_sora (Open-Sora 2.0)",
        ),
        "no model": (["dcae", good, new], "there is no model 'dcae'; the models are dc_ae, hunyuan_vae, image_vae,"),
    }


def test_mistakes_are_one_line_and_leave_no_file(tmp_path, convert, capsys):
    for name, (arguments, message) in mistakes(tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        assert convert(*arguments) == 2, name
        said = capsys.readouterr().err.strip()
        assert message in said and said.startswith("error: ") and "\n" not in said, name
        assert sorted(tmp_path.rglob("*")) == before, name


def test_the_command_of_the_specification(tmp_path):
    source = write(tmp_path / "ours.ckpt", "dc_ae", random_weights("dc_ae"))
    command = (
        f"{sys.executable} tools/convert_checkpoint.py --model dc_ae --src {source} --target {tmp_path / 'x.ckpt'}"
    )
    run = subprocess.run(command.split(), capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert_equal(read_state_dict(tmp_path / "x.ckpt"), random_weights("dc_ae"))


@pytest.mark.parametrize("name, config", [("dc_ae", tiny_models.DC_AE), ("temporal_vae", tiny_models.TEMPORAL_VAE)])
def test_the_originals_own_file_there_and_back_is_bit_equal(tmp_path, convert, name, config):
    data = ROOT / "tests" / "data" / name
    source = tmp_path / "original.safetensors"
    source.write_bytes((data / "weights.safetensors").read_bytes())
    source.with_suffix(".json").write_text(json.dumps(config))
    assert convert(name, source, tmp_path / "ours.ckpt") == 0
    model = from_pretrained(tmp_path / "ours.ckpt")
    assert model.name == name and config.items() <= model.config.items()
    assert convert(name, tmp_path / "ours.ckpt", tmp_path / "again.safetensors", "--to", "original") == 0
    assert_equal(read_state_dict(tmp_path / "again.safetensors"), read_state_dict(data / "weights.safetensors"))


# Open-Sora 1.2's VAE: a folder as it is published, and its spatial half, which is an image VAE.


def test_a_published_folder_of_open_sora_is_known_by_its_config(tmp_path, convert):
    source = write(tmp_path / "ours.ckpt", "temporal_vae", random_weights("temporal_vae"))
    assert convert("temporal_vae", source, tmp_path / "hub", "--to", "original") == 0
    described = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert described["model_type"] == "VideoAutoencoderPipeline" and described["micro_frame_size"] is None
    model = from_pretrained(tmp_path / "hub")
    assert model.name == "temporal_vae" and CONFIGS["temporal_vae"].items() <= model.config.items()
    assert_equal({n: p.asnumpy() for n, p in model.named_weights()}, random_weights("temporal_vae"))


def test_the_released_sizes_need_not_be_said():
    described = config_to_open_sora(TEMPORAL_VAE_CONFIG, TEMPORAL_VAE_CONFIG)
    assert described["vae_temporal"] == {"type": "VAE_Temporal_SD", "from_pretrained": None}
    assert {**TEMPORAL_VAE_CONFIG, **config_from_open_sora(described)} == TEMPORAL_VAE_CONFIG
    with pytest.raises(ValueError, match="vae_2d is .*VideoAutoencoderKLTemporalDecoder.*; only VideoAutoencoderKL"):
        config_from_open_sora({"vae_2d": {"type": "VideoAutoencoderKLTemporalDecoder"}})


def test_the_tensors_scale_and_shift_override_the_config_next_to_them(tmp_path, convert):
    config = {**TEMPORAL_VAE_CONFIG, **CONFIGS["temporal_vae"]}
    state = OpenSoraVAE.original_weights(
        random_weights("temporal_vae"), {**config, "scale": 2.0, "shift": [1, 2, 3, 4]}
    )
    source = write(tmp_path / "original.safetensors", "temporal_vae", state)
    assert convert("temporal_vae", source, tmp_path / "ours.ckpt") == 0
    stored = json.loads((tmp_path / "ours.json").read_text())
    assert (stored["scale"], stored["shift"]) == (2.0, [1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("to", ["ours", "original"])
def test_the_spatial_half_comes_out_as_an_image_vae_and_goes_in_again(tmp_path, convert, to):
    ours = random_weights("temporal_vae")
    source = write(tmp_path / "ours.ckpt", "temporal_vae", ours)
    assert convert("temporal_vae", source, tmp_path / "pipeline", "--to", to) == 0
    assert convert("image_vae", tmp_path / "pipeline", tmp_path / "sdxl", "--to", "original") == 0
    described = json.loads((tmp_path / "sdxl" / "config.json").read_text())
    assert described["block_out_channels"] == [32, 64] and described["use_quant_conv"]
    names = set(read_state_dict(tmp_path / "sdxl"))
    assert "quant_conv.weight" in names and "decoder.up_blocks.1.resnets.1.conv1.weight" in names

    spatial = from_pretrained(tmp_path / "pipeline", "image_vae")
    model = create_model("temporal_vae", **CONFIGS["temporal_vae"])
    before = {n: p.asnumpy().copy() for n, p in model.named_weights() if n.startswith("temporal_vae.")}
    model.spatial_vae.load_weights(tmp_path / "sdxl")
    after = {n: p.asnumpy() for n, p in model.named_weights()}
    wanted = {n: value for n, value in ours.items() if n.startswith("spatial_vae.")}
    assert_equal(after, {**wanted, **before})
    assert_equal({f"spatial_vae.{n}": p.asnumpy() for n, p in spatial.named_weights()}, wanted)


def test_a_spatial_half_is_not_taken_for_a_whole_model(tmp_path, convert, capsys):
    write(tmp_path / "image.ckpt", "image_vae", random_weights("image_vae"))
    assert convert("image_vae", tmp_path / "image.ckpt", tmp_path / "sdxl", "--to", "original") == 0
    assert convert("temporal_vae", tmp_path / "sdxl", tmp_path / "new.ckpt") == 2
    assert "holds a model other than 'temporal_vae'" in capsys.readouterr().err


# HunyuanVideo's VAE: one list of names in diffusers' folder and Open-Sora's file, a prefix before each in Tencent's.


def test_diffusers_reads_the_folder_that_is_written_for_it(tmp_path, convert):
    diffusers = pytest.importorskip("diffusers")
    ours = random_weights("hunyuan_vae")
    source = write(tmp_path / "ours.ckpt", "hunyuan_vae", ours)
    assert convert("hunyuan_vae", source, tmp_path / "hub", "--to", "original") == 0
    theirs, info = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info.values()) and CONFIGS["hunyuan_vae"].items() <= dict(theirs.config).items()
    read = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    assert_equal(read, HunyuanVAE.original_weights(ours, {**HunyuanVAE.default_config, **CONFIGS["hunyuan_vae"]}))

    theirs.save_pretrained(tmp_path / "again")
    assert from_pretrained(tmp_path / "again").name == "hunyuan_vae"
    assert convert("hunyuan_vae", tmp_path / "again", tmp_path / "again.ckpt") == 0
    assert_equal(read_state_dict(tmp_path / "again.ckpt"), ours)


def test_tencents_file_is_read_with_its_prefix_and_other_contents(tmp_path, convert, capsys):
    torch = pytest.importorskip("torch")
    ours, config = random_weights("hunyuan_vae"), {**HunyuanVAE.default_config, **CONFIGS["hunyuan_vae"]}
    state = {f"vae.{name}": torch.from_numpy(p) for name, p in HunyuanVAE.original_weights(ours, config).items()}
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(1)}, "epoch": 3}, tmp_path / "pytorch_model.pt")
    described = {**config, "_class_name": "AutoencoderKLCausal3D", "sample_size": 256, "sample_tsize": 64}
    described["time_compression_ratio"] = described.pop("temporal_compression_ratio")
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert convert("hunyuan_vae", tmp_path / "pytorch_model.pt", tmp_path / "ours" / "vae.ckpt") == 0
    assert "1 left over (loss.logvar)" in capsys.readouterr().out
    assert_equal(read_state_dict(tmp_path / "ours" / "vae.ckpt"), ours)
    assert json.loads((tmp_path / "ours" / "vae.json").read_text()) == {"model": "hunyuan_vae", **config}


@pytest.fixture
def average(monkeypatch):
    """Run tools/average_checkpoints.py in this process: its exit code."""

    return lambda *arguments: run_here(monkeypatch, "tools/average_checkpoints.py", *arguments) or 0


def test_an_average_has_the_shares_of_its_sources_whatever_their_format(tmp_path, convert, average):
    states = [random_weights("tae", seed) for seed in range(2)]
    first = write(tmp_path / "first.safetensors", "tae", states[0])
    second = write(tmp_path / "second.ckpt", "tae", states[1])
    assert convert("tae", second, tmp_path / "mindone", "--to", "mindone") == 0

    for target, shares, options in (
        ("equal.ckpt", (0.5, 0.5), []),
        ("folder", (0.75, 0.25), ["--shares", 3, 1]),
    ):
        assert average("--src", first, tmp_path / "mindone", "--target", tmp_path / target, *options) == 0
        model = from_pretrained(tmp_path / target)
        for name, parameter in model.named_weights():
            expected = shares[0] * states[0][name].astype(np.float64) + shares[1] * states[1][name]
            np.testing.assert_array_equal(parameter.asnumpy(), expected.astype(np.float32), err_msg=name)


def test_what_has_no_average_is_one_line_and_leaves_no_file(tmp_path, average, capsys):
    tae = write(tmp_path / "tae.ckpt", "tae", random_weights("tae"))
    dc_ae = write(tmp_path / "dc_ae.ckpt", "dc_ae", random_weights("dc_ae"))
    other = write(tmp_path / "other.ckpt", "tae", random_weights("tae"))
    other.with_suffix(".json").write_text(json.dumps({"model": "tae", **CONFIGS["tae"], "scaling_factor": 2.0}))
    new = tmp_path / "new.ckpt"
    for arguments, message in (
        ([tae, "--target", new], "must be at least two checkpoints"),
        ([tae, dc_ae, "--target", new], "is a dc_ae and"),
        ([tae, other, "--target", new], "scaling_factor is 2.0 and 1.5305"),
        ([tae, tae, "--target", new, "--shares", 1], "as many numbers as there are checkpoints, 2"),
        ([tae, tae, "--target", new, "--shares", 1, -1], "numbers above 0"),
        ([tae, tae, "--target", tae], "would overwrite the source"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert average("--src", *arguments) == 2, arguments
        said = capsys.readouterr().err.strip()
        assert message in said and said.startswith("error: ") and "\n" not in said, said
        assert sorted(tmp_path.rglob("*")) == before, arguments
