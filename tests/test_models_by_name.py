"""A model is found by its name, and weights that say no name by their tensors; users' own models join the others."""

import ast
import subprocess
import sys
from pathlib import Path

import mg  # isort: skip  # before MindSpore

import numpy as np
import pytest
import tiny_models
from training_runs import TwoConvs

from mg import models
from mg.benchmark.contestants import read_models
from mg.benchmark.quality import BenchmarkConfig
from mg.checkpoints import CheckpointError, write_state_dict
from mg.config import parse_config
from mg.inference.loading import ClipsConfig, load_model
from mg.models import VideoAutoencoder, create_model, from_pretrained, list_models, model_class, model_name, recognise
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.registry import AUTOENCODERS
from mg.models.tae.tae import TemporalAutoencoder

DATA = Path(__file__).parent / "data"
CONFIGS = {
    "dc_ae": tiny_models.DC_AE,
    "hunyuan_vae": tiny_models.SMALL_HUNYUAN_VAE,
    "image_vae": {"ch": 8, "ch_mult": [1, 1], "num_res_blocks": 1, "norm_num_groups": 4, "z_channels": 4},
    "tae": {
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 4,
        "attn_type": "spat_only",
        "temporal_downsample_level": [0],
        "temporal_upsample_level": [1],
    },
    "temporal_vae": tiny_models.SMALL_TEMPORAL_VAE,
}
RELEASED = {  # as diffusers has them
    "SD3.5": {},
    "SDXL": {"z_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True},
}


def weights(name: str, dialect: str = "ours") -> dict[str, np.ndarray]:
    """A small model's, in our names, the original's, or ours as PyTorch would have them."""
    model = model_class(name)
    config = {**model.default_config, **CONFIGS[name]}
    state = {parameter: np.zeros(shape, np.float32) for parameter, shape in model.weight_shapes(config).items()}
    if dialect == "original":
        return model.original_weights(state, config)
    if dialect == "torch":
        return {key.replace(".gamma", ".weight").replace(".beta", ".bias"): value for key, value in state.items()}
    return state


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.fixture
def write(tmp_path):
    """Weights without a config next to them."""

    def write(state: dict, file: str = "weights.safetensors") -> Path:
        write_state_dict(tmp_path / file, state)
        return tmp_path / file

    return write


@pytest.fixture
def registry(monkeypatch):
    """Models that a test registers are gone after it."""
    monkeypatch.setattr(AUTOENCODERS, "_own", dict(AUTOENCODERS._own))


# By tensors.


@pytest.mark.parametrize("name", ["dc_ae", "hunyuan_vae", "tae", "temporal_vae"])
def test_every_released_checkpoint_is_one_models(name):
    lines = (DATA / f"{name}_names.txt").read_text().splitlines()
    shapes = {key: ast.literal_eval(shape) for key, shape in (line.split(" ", 1) for line in lines)}
    assert recognise(shapes) == [name]


@pytest.mark.parametrize("released", RELEASED)
def test_released_image_vaes_are_recognised_in_our_names_and_diffusers(released):
    config = {**ImageAutoencoder.default_config, **RELEASED[released]}
    ours = ImageAutoencoder.weight_shapes(config)
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in ours.items()}
    theirs = {name: array.shape for name, array in ImageAutoencoder.original_weights(arrays, config).items()}
    assert recognise(ours) == recognise(theirs) == ["image_vae"]


@pytest.mark.parametrize("dialect", ["ours", "original", "torch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_other_sizes_are_recognised_in_every_dialect(write, name, dialect):
    assert model_name(write(weights(name, dialect))) == name


@pytest.mark.parametrize(
    "name, prefix, dialect",
    [
        ("image_vae", "first_stage_model.", "torch"),
        ("image_vae", "vae.", "original"),
        ("hunyuan_vae", "vae.", "original"),
        ("tae", "autoencoder._backbone.", "original"),
    ],
)
def test_a_model_is_recognised_within_a_larger_file(write, name, prefix, dialect):
    others = {
        "model.diffusion_model.w": np.ones(2, np.float32),
        "text_encoders.clip_l.encoder.w": np.ones(2, np.float32),
        "moment1.encoder.conv_in.weight": np.ones(2, np.float32),
        "autoencoder.encoder.down.0.block.0.temb_proj.weight": np.ones(2, np.float32),
    }
    assert model_name(write(prefixed(prefix, weights(name, dialect)) | others)) == name


def test_an_old_attentions_names_are_an_image_vaes(write):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = weights("image_vae", "original")
    for new_name, old_name in old.items():
        state = {name.replace(new_name, old_name): value for name, value in state.items()}
    assert any(".proj_attn." in name for name in state) and model_name(write(state)) == "image_vae"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth", ".bin", ""])
def test_a_file_of_any_format_is_recognised_and_loads_if_its_sizes_are_given(tmp_path, write, suffix):
    state = {name: np.full_like(value, 0.5) for name, value in weights("image_vae", "original").items()}
    if suffix in (".pt", ".pth", ".bin"):
        torch = pytest.importorskip("torch")
        path = tmp_path / f"weights{suffix}"
        torch.save({"state_dict": {name: torch.from_numpy(value) for name, value in state.items()}}, path)
    elif suffix:
        path = write(state, f"weights{suffix}")
    else:
        path = write(state, "pipeline/vae/diffusion_pytorch_model.safetensors").parents[1]
    model = from_pretrained(path, **CONFIGS["image_vae"])
    assert model.name == "image_vae"
    assert all((p.asnumpy() == 0.5).all() for _, p in model.named_weights())


def test_a_config_that_says_no_name_leaves_it_to_the_tensors(tmp_path, write):
    path = write(weights("tae"))
    path.with_suffix(".json").write_text(str(CONFIGS["tae"]).replace("'", '"'))
    assert from_pretrained(path).config.items() >= CONFIGS["tae"].items()


def test_another_size_without_a_config_is_an_error_that_asks_for_it(write):
    path = write(weights("image_vae"))
    with pytest.raises(CheckpointError, match=r"does not fit this image_vae: .*give its config \(config\.json"):
        from_pretrained(path)


def test_a_whole_model_is_recognised_before_its_part_which_can_be_requested(write):
    path = write(weights("temporal_vae", "original"))
    assert model_name(path) == "temporal_vae"
    spatial = models.stored_config(path, "image_vae")
    assert (spatial["z_channels"], spatial["use_quant_conv"]) == (4, True)
    assert model_name(write(prefixed("spatial_vae.", weights("image_vae")), "part.ckpt")) == "image_vae"


def without(part: str, state: dict) -> dict:
    return {name: value for name, value in state.items() if not name.startswith(part)}


def nobodys() -> dict[str, dict]:
    image = weights("image_vae", "original")
    return {
        "others": {"layers.0.weight": np.ones((2, 2), np.float32), "head.bias": np.ones(2, np.float32)},
        "half": without("decoder.", image),
        "volumes": {name: np.stack([value] * 3, -1) if value.ndim == 4 else value for name, value in image.items()},
        "more layers": image | {"decoder.mid_block.resnets.0.conv_y.weight": np.ones((8, 8), np.float32)},
        "causal": without("quant_conv.", weights("hunyuan_vae", "original")),
    }


@pytest.mark.parametrize("kind", nobodys())
def test_weights_of_no_known_model_ask_for_a_name(write, kind):
    path = write(nobodys()[kind])
    with pytest.raises(CheckpointError) as error:
        from_pretrained(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "match no known model" in said and "\n" not in said
    assert "give its name, name= or" in said and ", ".join(list_models()) in said


def test_weights_that_fit_two_models_ask_which(write, registry):
    @mg.register_model
    class AnotherTAE(TemporalAutoencoder):
        name = "another_tae"

    path = write(weights("tae"))
    with pytest.raises(CheckpointError, match="match another_tae or tae; give its name"):
        from_pretrained(path, **CONFIGS["tae"])
    assert from_pretrained(path, "another_tae", **CONFIGS["tae"]).name == "another_tae"


@pytest.mark.parametrize("wrong", ["tae", "image_vae", "hunyuan_vae", "temporal_vae"])
def test_a_name_that_contradicts_the_tensors_is_an_error(write, wrong):
    path = write(weights("dc_ae", "original"))
    for build in (create_model, lambda name, path: from_pretrained(path, name)):
        with pytest.raises(CheckpointError, match=f"a model other than '{wrong}': its tensors are those of 'dc_ae'"):
            build(wrong, path)


def test_commands_recognise_the_model_of_a_file(tmp_path, write):
    path, config = write(weights("image_vae")), CONFIGS["image_vae"]
    plain = BenchmarkConfig(csv_path="x.csv", models=[str(path)], output_path=str(tmp_path / "out"))
    assert [contestant.settings["name"] for contestant in read_models(plain.models)] == ["image_vae"]
    options = [f"--model.config.{key}={value}" for key, value in config.items()]
    given = parse_config(ClipsConfig, "", ["--ckpt_path", str(path), "--csv_path", "x.csv", *options])
    assert load_model(given).name == "image_vae"


# Models of one's own.


def test_a_registered_model_is_built_listed_and_loaded_by_name(tmp_path, registry):
    @mg.register_model
    class Mine(TwoConvs):
        name = "mine"

    assert "mine" in mg.list_models() and type(mg.create_model("mine", z_channels=3)) is Mine
    mg.create_model("mine").save_pretrained(tmp_path)
    assert type(mg.from_pretrained(tmp_path)) is Mine
    assert mg.register_model(Mine) is Mine  # once more is no harm


class Nameless(VideoAutoencoder):
    pass


class Unconfigured(VideoAutoencoder):
    name = "unconfigured"


class Taken(TwoConvs):
    name = "tae"


@pytest.mark.parametrize(
    "given, message",
    [
        (Taken, "Taken cannot be registered; a model 'tae' already exists"),
        (Nameless, "Nameless cannot be registered; its class must have a name"),
        (Unconfigured, "Unconfigured cannot be registered; its class must have a default_config"),
        (dict, "a model is a subclass of mg.models.VideoAutoencoder"),
        ("tae", "'tae' cannot be registered; a model is a subclass"),
    ],
)
def test_what_cannot_be_registered_is_named(given, message):
    before = list_models()
    with pytest.raises(ValueError, match=message):
        mg.register_model(given)
    assert list_models() == before


# `import mg`.


def test_mg_gives_its_functions_but_imports_mindspore_only_for_them():
    program = """
import sys, mg
assert {"create_model", "from_pretrained", "list_models", "register_model"} <= set(dir(mg)) & set(mg.__all__)
assert not hasattr(mg, "nothing")
assert "mindspore" not in sys.modules and "numpy" not in sys.modules
assert "tae" in mg.list_models()
assert "mindspore" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_in_the_packages_all_exists():
    for package in (mg, models):
        assert all(hasattr(package, name) for name in package.__all__)
