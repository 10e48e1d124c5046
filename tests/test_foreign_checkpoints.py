"""Weights as people find them: in any folder, under any name, among other training state."""

import argparse
import collections
import dataclasses
import datetime
import enum
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from mg.checkpoints import CheckpointError, open_state_dict, read_state_dict, where_from, write_state_dict
from mg.cli.inflate import Options, read_tae_config
from mg.config import parse_config
from mg.models import create_model, from_pretrained, list_models, model_class, model_name, stored_config
from mg.models.hunyuan_vae.hunyuan_vae import HunyuanVAE
from mg.models.image_vae.image_vae import ImageAutoencoder
from mg.models.tae.tae import TemporalAutoencoder

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
IMAGE = {"ch": 8, "ch_mult": [1, 1], "num_res_blocks": 1, "norm_num_groups": 4, "z_channels": 4}
TAE = {**IMAGE, "ch": 32, "norm_num_groups": 32, "temporal_downsample_level": [0], "temporal_upsample_level": [1]}
CONFIGS = {
    "dc_ae": tiny_models.DC_AE,
    "hunyuan_vae": tiny_models.SMALL_HUNYUAN_VAE,
    "image_vae": IMAGE,
    "tae": TAE,
    "temporal_vae": tiny_models.SMALL_TEMPORAL_VAE,
}
STATE = {"encoder.conv.weight": torch.arange(12.0).reshape(3, 4), "decoder.conv.bias": torch.ones(3)}


def config_of(name: str) -> dict:
    return {**model_class(name).default_config, **CONFIGS[name]}


def random_weights(name: str) -> dict[str, np.ndarray]:
    """A small model's, in our names."""
    rng = np.random.default_rng(0)
    shapes = model_class(name).weight_shapes(config_of(name))
    return {parameter: rng.normal(size=shape).astype(np.float32) for parameter, shape in shapes.items()}


def assert_equal(some, others) -> None:
    assert some.keys() == others.keys()
    for name in some:
        assert some[name].shape == others[name].shape and some[name].tobytes() == others[name].tobytes(), name


def assert_is_state(path, key: str | None = None) -> None:
    assert_equal(read_state_dict(path, key), {name: tensor.numpy() for name, tensor in STATE.items()})


# Folders.


def shards(folder: Path, index: str, suffix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for i, (name, tensor) in enumerate(STATE.items()):
        file = f"{index.split('.')[0]}-{i + 1:05d}-of-{len(STATE):05d}{suffix}"
        if suffix == ".safetensors":
            write_state_dict(folder / file, {name: tensor.numpy()})
        else:
            torch.save({name: tensor}, folder / file)
        names[name] = file
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": names}))


@pytest.mark.parametrize("below", ["", "model", "vae"])
@pytest.mark.parametrize(
    "index, suffix",
    [
        ("model.safetensors.index.json", ".safetensors"),
        ("pytorch_model.bin.index.json", ".bin"),
        ("anything_at_all.fp16.index.json", ".bin"),
        ("diffusion_pytorch_model.safetensors.index.fp16.index.json", ".safetensors"),
    ],
)
def test_any_index_in_a_folder_is_found(tmp_path, below, index, suffix):
    shards(tmp_path / below, index, suffix)
    (tmp_path / "config.json").write_text('{"model": "tae"}')
    assert_is_state(tmp_path)
    assert_is_state(tmp_path / below / index)
    with open_state_dict(tmp_path) as state:
        assert state.config_file == tmp_path / "config.json"


def test_a_checkpoint_of_open_soras_training_is_its_model(tmp_path):
    shards(tmp_path / "model", "pytorch_model.bin.index.json", ".bin")
    shards(tmp_path / "model", "model.safetensors.index.json", ".safetensors")
    shards(tmp_path / "optimizer", "pytorch_optim.bin.index.json", ".bin")
    for name in ("lr_scheduler", "ema.pt", "running_states.bin"):
        torch.save({"state": {0: torch.zeros(1)}}, tmp_path / name)
    assert_is_state(tmp_path)


def test_the_only_weight_file_of_a_folder_is_taken_and_several_are_named(tmp_path):
    torch.save(STATE, tmp_path / "hunyuan_video_vae_bf16.pth")
    assert_is_state(tmp_path)
    torch.save(MOMENTS, tmp_path / "optimizer.bin")
    assert_is_state(tmp_path)
    torch.save(STATE, tmp_path / "another.pt")
    with pytest.raises(CheckpointError, match=r"several weight files \(another.pt, hunyuan_video_vae_bf16.pth\); name"):
        read_state_dict(tmp_path)


def test_a_json_that_is_not_an_index_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config.json: is JSON, but not a weight index .* name the weight file"):
        read_state_dict(tmp_path / "config.json")


# Content, whatever the name.


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.bin", "x.th", "x.pt.tmp", "last", "v1.2"])
@pytest.mark.parametrize("written", ["zip", "legacy", "safetensors", "mindspore"])
def test_files_are_recognised_by_their_content(tmp_path, name, written):
    path = tmp_path / name
    if written in ("zip", "legacy"):
        torch.save({"state_dict": STATE, "epoch": 3}, path, _use_new_zipfile_serialization=written == "zip")
    else:
        other = tmp_path / {"safetensors": "w.safetensors", "mindspore": "w.ckpt"}[written]
        write_state_dict(other, {key: tensor.numpy() for key, tensor in STATE.items()})
        other.rename(path)
    assert_is_state(path)


@pytest.mark.parametrize("extra", range(0, 256, 16))
def test_a_safetensors_file_is_never_taken_for_pytorchs(tmp_path, extra):
    text = json.dumps({"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode().ljust(512 + extra)
    (tmp_path / "w.bin").write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2")
    assert read_state_dict(tmp_path / "w.bin")["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n\n<html>", "is a web page"),
        (b'{"error": "Unauthorized"}', "is JSON, not weights"),
        (b"GGUF\3\0\0\0", "is a GGUF file; safetensors, PyTorch's and MindSpore's can be read"),
        (b"weights", "not a weight file that can be read"),
    ],
)
def test_files_that_are_not_weights_are_named_as_what_they_are(tmp_path, content, reason):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_state_dict(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_next_to_a_vae_is_read_as_in_torch(tmp_path, dtype):
    from safetensors.torch import save_file

    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    save_file({"x": every}, tmp_path / "w.safetensors")
    torch.save({"x": every}, tmp_path / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        np.testing.assert_array_equal(read_state_dict(tmp_path / file)["x"], every.float().numpy())


# Where the state dict is in a PyTorch file.

MOMENTS = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
NESTED = {
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "lightning": {"state_dict": STATE, "optimizer_states": [MOMENTS], "lr_schedulers": [], "callbacks": {}},
    "model": {"model": STATE, "optimizer": MOMENTS, "step": torch.tensor(3), "best": torch.tensor(0.5)},
    "module": {"module": STATE, "param_shapes": [{"x": torch.Size([3])}], "ds_config": {}, "optimizer": None},
    "ema": {"ema": STATE, "opt": MOMENTS},
    "gan": {"generator": STATE, "discriminator": {"w": torch.ones(1)}, "optimizer_g": MOMENTS, "disc_opt": MOMENTS},
    "vae": {"vae": STATE, "lpips_loss": {"w": torch.ones(1)}},
    "twice": {"state_dict": {"model": STATE}, "args": None},
    "thrice": {"model": {"module": {"state_dict": STATE}}},
    "unusual": {"my_tokenizer": STATE, "optimizer": MOMENTS},
    "unusual beside a count": {"my_tokenizer": STATE, "step": torch.tensor(1)},
    "flat": {**STATE, "optimizer": MOMENTS, "epoch": 3, "ema": {"encoder.conv.weight": torch.ones(1)}},
    "list": [STATE, MOMENTS["param_groups"]],
    "tuple": ({"state_dict": STATE}, 3),
    "halves": {
        "encoder": {"conv.weight": STATE["encoder.conv.weight"]},
        "decoder": {"conv.bias": STATE["decoder.conv.bias"]},
        "optimizer": MOMENTS,
    },
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", NESTED)
def test_the_state_dict_is_found_where_training_put_it(tmp_path, kind, zipped):
    torch.save(NESTED[kind], tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert_is_state(tmp_path / "x.ckpt")


def test_one_of_several_state_dicts_is_chosen_by_its_key(tmp_path):
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    torch.save({"model": other, "ema": STATE, "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x.pt: holds several state dicts \(model, ema\); .* mg-convert --key"):
        read_state_dict(tmp_path / "x.pt")
    assert_is_state(tmp_path / "x.pt", "ema")
    with pytest.raises(CheckpointError, match=r"holds no dict 'emma'; it holds model, ema"):
        read_state_dict(tmp_path / "x.pt", "emma")
    write_state_dict(tmp_path / "x.safetensors", {"x": np.ones(1)})
    with pytest.raises(CheckpointError, match="holds its tensors directly, not in a dict 'ema'"):
        read_state_dict(tmp_path / "x.safetensors", "ema")


@pytest.mark.parametrize(
    "content, reason",
    [
        (
            {"optimizer": MOMENTS, "epoch": 3},
            r"holds no state dict; it holds optimizer \(dict\), epoch \(int\)",
        ),
        ({"w": np.ones(3), "v": np.ones(3)}, r"it holds w \(numpy.*\), v \("),
        ([], "holds no state dict"),
        (3, "holds no state dict, but an object of type int"),
        (torch.nn.Linear(2, 2), r"but an object of type torch.nn.modules.linear.Linear; save its state_dict\(\)"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_without_a_state_dict_is_described_by_its_contents(tmp_path, content, reason, zipped):
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=reason):
        read_state_dict(tmp_path / "x.pt")


def test_pickles_and_zips_from_other_programs_are_named_as_such(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": [1]}))
    np.savez(tmp_path / "arrays.npz", w=np.ones(1))
    for file, reason in (
        ("script.pt", r"holds a TorchScript model; load it with torch.jit.load and save its state_dict\(\)"),
        ("plain.pkl", "is a pickle, but not one that torch.save wrote"),
        ("arrays.npz", "is a zip file, but not one of PyTorch's"),
    ):
        with pytest.raises(CheckpointError, match=f"{file}: {reason}"):
            read_state_dict(tmp_path / file)


# Other contents next to the tensors.


class Stage(enum.Enum):
    TRAIN = "train"


@dataclasses.dataclass
class Settings:
    lr: float = 1e-4
    stage: Stage = Stage.TRAIN


class Settings2(dict):
    """As EasyDict, ConfigDict and their like are."""

    def __getattr__(self, name):
        return self[name]


class List2(list):
    pass


class Wrapped(torch.Tensor):
    pass


Point = collections.namedtuple("Point", "x y")


class _Called:
    """An object whose pickle calls something, and puts a state into what comes out."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.mkdir, (Path(self.target),), {"a": 1}


def omegaconf_like() -> object:
    """As OmegaConf's DictConfig is pickled: a class that is not there when the file is read, with metadata that names
    types."""
    module = types.ModuleType("omegaconf_")
    sys.modules["omegaconf_"] = module
    for name in ("DictConfig", "AnyNode", "ContainerMetadata"):
        setattr(module, name, type(name, (), {"__module__": "omegaconf_"}))
    config, node, metadata = module.DictConfig(), module.AnyNode(), module.ContainerMetadata()
    vars(metadata).update(ref_type=dict, element_type=list, key_type=int, flags={"readonly": None})
    vars(node).update(_val=3, _parent=config, _metadata=metadata)
    vars(config).update(_content={"lr": node}, _metadata=metadata, _parent=None)
    return config


BESIDE = {
    "numpy scalars": [np.float64(3), np.float32(1), np.int64(2), np.bool_(True), np.str_("x")],
    "numpy arrays": {"mean": np.ones((2, 3)), "names": np.array(["a", None], object)},
    "plain values": [1, 2**80, 1.5, "x", b"x", None, True, (1, (2, 3)), 1j, range(3), slice(1, 2), bytearray(b"xy")],
    "sets": [{1, "a", (2, 3)}, frozenset({1, (2, 3)}), set()],
    "containers": [collections.deque([1, 2]), collections.Counter("aab"), collections.defaultdict(list, a=[1])],
    "states": collections.defaultdict(dict, {0: {"exp_avg": torch.ones(2)}}),
    "arguments": argparse.Namespace(lr=1e-4, path=Path("x"), shape=(1, 2)),
    "classes": {"type": Settings, "function": json.dumps, "dtype": torch.float16, "device": torch.device("cpu")},
    "settings": [Settings(), Stage.TRAIN, Point(1, 2), Settings2(a=1, b=Settings2(c=[1])), List2([1, 2])],
    "times": [datetime.datetime(2024, 1, 1), datetime.timedelta(1)],
    "random": [np.random.get_state(), torch.get_rng_state(), np.random.default_rng(0)],
    "odd keys": {(1, 2): 3, Stage.TRAIN: 1, Settings: {"best": 1.0}, 2**80: 1, 1.5: 2, None: 3, frozenset({1}): 1},
    "complex and quantized": [torch.ones(2, dtype=torch.complex64)],
    "objects": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]),
    "modules": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)),
    "omegaconf": omegaconf_like(),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", BESIDE)
def test_other_training_state_next_to_the_tensors_is_skipped(tmp_path, kind, protocol):
    torch.save(
        {"hyper": BESIDE[kind], "state_dict": STATE, "last": BESIDE[kind]},
        tmp_path / "x.ckpt",
        pickle_protocol=protocol,
    )
    assert_is_state(tmp_path / "x.ckpt")


@pytest.mark.parametrize("kind", BESIDE)
def test_other_training_state_is_skipped_in_files_older_than_pytorch_1_6(tmp_path, kind):
    torch.save({"state_dict": STATE, "hyper": BESIDE[kind]}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert_is_state(tmp_path / "x.ckpt")


def test_nothing_that_a_file_names_is_imported_or_called(tmp_path):
    sys.modules["gone"] = gone = types.ModuleType("gone")
    gone.Thing = type("Thing", (), {"__module__": "gone"})
    torch.save({"state_dict": STATE, "a": gone.Thing(), "b": _Called(tmp_path / "made")}, tmp_path / "x.pt")
    del sys.modules["gone"]
    before = set(sys.modules)
    assert_is_state(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists() and "gone" not in sys.modules and set(sys.modules) == before


@pytest.mark.parametrize("wrap", ["parameter", "with attributes", "subclass", "tied", "transposed"])
def test_tensors_of_every_kind_are_read(tmp_path, wrap):
    tensor = torch.arange(6.0).reshape(2, 3)
    made = {
        "parameter": torch.nn.Parameter(tensor),
        "with attributes": torch.nn.Parameter(tensor.clone()),
        "subclass": tensor.as_subclass(Wrapped),
        "tied": tensor,
        "transposed": tensor.t().contiguous().t(),
    }[wrap]
    if wrap == "with attributes":
        made.is_norm = True
    torch.save({"x.w": made, "y.w": made}, tmp_path / "x.pt")
    found = read_state_dict(tmp_path / "x.pt")
    assert np.array_equal(found["x.w"], tensor.numpy()) and np.array_equal(found["y.w"], tensor.numpy())


def test_tensors_of_an_npu_are_read_as_torch_npu_wrote_them(tmp_path, monkeypatch):
    for name in ("torch_npu", "torch_npu.utils", "torch_npu.utils.storage"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def _rebuild_npu_tensor(*_):
        raise AssertionError

    _rebuild_npu_tensor.__module__ = "torch_npu.utils.storage"
    _rebuild_npu_tensor.__qualname__ = "_rebuild_npu_tensor"
    sys.modules["torch_npu.utils.storage"]._rebuild_npu_tensor = _rebuild_npu_tensor

    class OnNPU:
        def __init__(self, tensor):
            self.tensor = tensor

        def __reduce__(self):
            return _rebuild_npu_tensor, (*self.tensor.__reduce_ex__(2)[1][:6], 2)  # 2: a format of CANN's

    torch.save({name: OnNPU(tensor) for name, tensor in STATE.items()}, tmp_path / "x.pt")
    assert_is_state(tmp_path / "x.pt")


def test_a_stable_diffusion_checkpoint_of_lightnings_holds_its_vae(tmp_path):
    ours, config = random_weights("image_vae"), config_of("image_vae")
    vae = ImageAutoencoder.formats["latent_diffusion"].weights(ours, config)
    state = {f"first_stage_model.{name}": torch.from_numpy(array) for name, array in vae.items()}
    state |= {
        "betas": torch.ones(3),
        "model_ema.decay": torch.tensor(0.99),
        "model.diffusion_model.input_blocks.0.weight": torch.ones(2),
        "cond_stage_model.transformer.text_model.encoder.layers.0.weight": torch.ones(2),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2),
    }
    leftovers = {"callbacks": {Settings: {"best_model_score": torch.tensor(1.0)}}, "optimizer_states": [MOMENTS]}
    torch.save({"state_dict": state, "global_step": np.int64(3), **leftovers}, tmp_path / "v1-5-pruned.ckpt")
    model = from_pretrained(tmp_path / "v1-5-pruned.ckpt", **IMAGE)
    assert_equal({name: p.asnumpy() for name, p in model.named_weights()}, ours)


# Names.

PREFIXES = ("module.", "_orig_mod.", "model.", "vae.", "first_stage_model.", "module.vae._orig_mod.", "any.thing.1.")


def renamed(state: dict, change) -> dict:
    return {change(name): value for name, value in state.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_recognised_and_read_with_any_prefix(tmp_path, name, prefix):
    ours, config, model = random_weights(name), config_of(name), model_class(name)
    beside = {"text_encoder.encoder.w": np.ones(2), "moment1.encoder.w": np.ones(2), "step": np.array(3)}
    for state in (ours, model.original_weights(ours, config)):
        path = tmp_path / "x.safetensors"
        write_state_dict(path, renamed(state, lambda key: prefix + key) | beside)
        assert model_name(path) == name
        with open_state_dict(path) as opened:
            found, report = model.fit(opened, config, model.weight_shapes(config))
        assert_equal(found, ours)
        assert report.complete and sorted(report.unexpected) == sorted(beside)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._orig_mod."]
)
def test_wrappers_within_names_are_skipped(tmp_path, wrapper):
    ours, config = random_weights("hunyuan_vae"), config_of("hunyuan_vae")
    state = renamed(HunyuanVAE.original_weights(ours, config), lambda key: key.replace(".conv1.", f".{wrapper}conv1."))
    write_state_dict(tmp_path / "x.ckpt", renamed(state, lambda key: f"{wrapper}{key}"))
    assert model_name(tmp_path / "x.ckpt") == "hunyuan_vae"
    assert_equal(
        HunyuanVAE.fit(read_state_dict(tmp_path / "x.ckpt"), config, HunyuanVAE.weight_shapes(config))[0], ours
    )


def test_weights_are_chosen_over_their_moments_and_averages(tmp_path):
    ours, config = random_weights("tae"), config_of("tae")
    state = renamed(ours, lambda key: f"ae.{key}")
    for copy in ("ema", "moment1", "exp_avg"):
        state |= renamed({key: value + 1 for key, value in ours.items()}, lambda key, copy=copy: f"{copy}.{key}")
    found, report = TemporalAutoencoder.fit(state, config, TemporalAutoencoder.weight_shapes(config))
    assert_equal(found, ours)
    assert len(report.unexpected) == 3 * len(ours)


def test_the_files_of_comfyui_have_the_names_that_comfyui_reads():
    """As its converter makes them of diffusers' (comfy/diffusers_convert.py), for the released sizes."""
    config = HunyuanVAE.default_config
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in HunyuanVAE.weight_shapes(config).items()}
    shapes = {name: array.shape for name, array in HunyuanVAE.formats["comfyui"].weights(arrays, config).items()}
    assert len(shapes) == 248
    released = {
        "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3),
        "encoder.down.0.block.0.conv1.conv.weight": (128, 128, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.0.downsample.conv.conv.bias": (128,),
        "encoder.down.1.block.0.nin_shortcut.conv.weight": (256, 128, 1, 1, 1),
        "encoder.mid.attn_1.norm.bias": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1, 1),
        "encoder.mid.attn_1.proj_out.bias": (512,),
        "encoder.mid.block_2.conv2.conv.weight": (512, 512, 3, 3, 3),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.conv.weight": (32, 512, 3, 3, 3),
        "quant_conv.weight": (32, 32, 1, 1, 1),
        "post_quant_conv.bias": (16,),
        "decoder.up.3.block.2.conv2.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up.3.upsample.conv.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.conv.weight": (128, 256, 1, 1, 1),
        "decoder.conv_out.conv.bias": (3,),
    }
    assert released.items() <= shapes.items() and "decoder.up.0.upsample.conv.conv.weight" not in shapes
    assert "encoder.down.3.downsample.conv.conv.weight" not in shapes


@pytest.mark.parametrize("torch_names", [True, False])
def test_comfyuis_repackaged_file_in_bf16_is_read_to_the_bit(tmp_path, torch_names):
    from safetensors.torch import save_file

    ours, config = random_weights("hunyuan_vae"), config_of("hunyuan_vae")
    rounded = {name: torch.from_numpy(array).bfloat16() for name, array in ours.items()}
    wanted = {name: tensor.float().numpy() for name, tensor in rounded.items()}
    state = HunyuanVAE.formats["comfyui"].weights(wanted, config)
    if torch_names:  # latent diffusion's own, without the convolutions' `conv`
        state = {f"{n.rpartition('.')[0]}.{_torch(n)}": array for n, array in wanted.items()}
    path = tmp_path / "hunyuan_video_vae_bf16.safetensors"
    save_file({name: torch.from_numpy(array.copy()).bfloat16() for name, array in state.items()}, path)
    assert model_name(path) == "hunyuan_vae"
    model = from_pretrained(path, **CONFIGS["hunyuan_vae"])
    assert_equal({name: p.asnumpy() for name, p in model.named_weights()}, wanted)


def _torch(name: str) -> str:
    return {"gamma": "weight", "beta": "bias"}.get(name.rpartition(".")[2], name.rpartition(".")[2])


@pytest.mark.parametrize("format", ["ours", *ImageAutoencoder.formats])
def test_an_image_vae_is_read_in_every_format_it_is_published_in(format):
    ours, config = random_weights("image_vae"), config_of("image_vae")
    state = ours if format == "ours" else ImageAutoencoder.formats[format].weights(ours, config)
    assert_equal(ImageAutoencoder.fit(state, config, ImageAutoencoder.weight_shapes(config))[0], ours)


# What is left over is counted in the file's own names.


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_that_a_model_does_not_use_are_left_over(tmp_path, name):
    config, model = config_of(name), model_class(name)
    foreign = {"blocks.0.w": np.ones(2, np.float32), "encoder.of.another.w": np.ones(3, np.float32)}
    _, report = model.fit(foreign, config, model.weight_shapes(config))
    assert not report.used and sorted(report.unexpected) == sorted(foreign)
    write_state_dict(tmp_path / "x.ckpt", random_weights(name) | foreign)
    report = create_model(name, **CONFIGS[name]).load_weights(tmp_path / "x.ckpt")
    assert report.complete and sorted(report.unexpected) == sorted(foreign)


# Models that are none of these.


@pytest.mark.parametrize(
    "config, said",
    [
        ({"_class_name": "AutoencoderKLWan", "z_dim": 16}, "describes an AutoencoderKLWan,"),
        ({"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [1]}, "describes an AutoencoderKLCogVideoX,"),
        ({"_class_name": "AutoencoderDC", "latent_channels": 32}, "describes an AutoencoderDC,"),
        ({"_class_name": "HunyuanVideoTransformer3DModel"}, "describes a HunyuanVideoTransformer3DModel,"),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "describes a T5EncoderModel,"),
        ({"model_type": "OpenSoraVAE_V1_3"}, "describes an OpenSoraVAE_V1_3,"),
        ({"model": "wan_vae"}, "there is no model 'wan_vae'; the models are"),
    ],
)
def test_a_config_of_an_unsupported_model_is_named_as_such(tmp_path, config, said):
    write_state_dict(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"w": np.ones(2, np.float32)})
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    for ask in (
        from_pretrained,
        model_name,
        lambda path: create_model("tae", path),
        lambda path: stored_config(path, "image_vae"),
        lambda path: TemporalAutoencoder(pretrained=path),
    ):
        with pytest.raises(CheckpointError) as raised:
            ask(tmp_path)
        message = str(raised.value)
        assert message.startswith(f"{tmp_path / 'vae' / 'config.json'}: {said}") and "\n" not in message
        assert "image_vae (AutoencoderKL), " in message and all(name in message for name in list_models())


def test_inflating_another_models_folder_says_which_it_is(tmp_path):
    create_model("dc_ae", **CONFIGS["dc_ae"]).save_pretrained(tmp_path)
    with (
        open_state_dict(tmp_path) as image,
        pytest.raises(CheckpointError, match="a model other than 'image_vae': see"),
    ):
        read_tae_config(image)


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"_class_name": "AutoencoderKLHunyuanVideo", "block_out_channels": "128"}, "block_out_channels is 128"),
        ({"model": "dc_ae", "encoder_width_list": 3}, "cannot build dc_ae from it"),
        ({"model": "tae", "chs": 3}, "tae has no config key 'chs'; did you mean 'ch'?"),
        ([1], "must hold a JSON object"),
    ],
)
def test_a_config_of_which_no_model_can_be_built_is_named(tmp_path, config, reason):
    write_state_dict(tmp_path / "model.ckpt", {"w": np.ones(2, np.float32)})
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())  # as Windows' editors write
    with pytest.raises(CheckpointError, match=reason) as raised:
        from_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")


# Nothing there.

MISSING = ["nope", "nope.v1.2", "models/nope.safetensors", "nope/"]


@pytest.mark.parametrize("path", MISSING)
def test_a_missing_path_is_reported_as_missing(tmp_path, path):
    for ask in (
        read_state_dict,
        from_pretrained,
        lambda path: create_model("dc_ae", path),
        lambda path: TemporalAutoencoder(pretrained=path),
        lambda path: create_model("image_vae", **IMAGE).load_weights(path),
    ):
        with pytest.raises(CheckpointError, match="nope[^ ]*: no such file or folder$"):
            ask(tmp_path / path)


def test_messages_say_where_released_weights_come_from(tmp_path):
    for path, hint in (
        ("models/sdxl_vae", "get the folder vae of PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers on Hugging Face"),
        ("models/F32T4C128_AE.safetensors", "get it from hpcai-tech/Open-Sora-v2-Video-DC-AE on Hugging Face"),
    ):
        with pytest.raises(CheckpointError, match=f"{path}: no such file or folder; {hint}$"):
            from_pretrained(tmp_path / path)


def test_every_model_that_a_shipped_config_names_can_be_had():
    import yaml

    named = set()
    for file in (ROOT / "configs").rglob("*.yaml"):
        model = yaml.safe_load(file.read_text()).get("model") or {}
        named |= {model.get(key) for key in ("from_pretrained", "spatial_from_pretrained")}
    named = {path for path in named if path and path.startswith("models/")}
    assert len(named) > 3 and all(where_from(path) for path in named)


def test_a_missing_script_is_not_a_config():
    with pytest.raises(ValueError, match=r"nowhere\.py: configs are YAML files here, and there is no such file;"):
        parse_config(Options, "", ["nowhere.py"])


# Config and weights are read once, and together.


@pytest.mark.parametrize(
    "build",
    [from_pretrained, pytest.param(lambda path: create_model("temporal_vae", path), marks=pytest.mark.full)],
)
def test_a_file_without_a_config_is_opened_once(tmp_path, monkeypatch, build):
    from mg.checkpoints import state_dict

    config = config_of("temporal_vae")
    weights = model_class("temporal_vae").original_weights(random_weights("temporal_vae"), config)
    write_state_dict(tmp_path / "w.safetensors", weights)
    opened, open_file = [], state_dict._open_file
    monkeypatch.setattr(state_dict, "_open_file", lambda *given: opened.append(given[0]) or open_file(*given))
    with pytest.raises(CheckpointError, match="does not fit this temporal_vae"):  # but the released one, without config
        build(tmp_path / "w.safetensors")
    assert opened == [tmp_path / "w.safetensors"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_class_reads_the_config_next_to_the_weights(tmp_path, name):
    ours, model = random_weights(name), model_class(name)
    path = tmp_path / "x.ckpt"
    write_state_dict(path, ours)
    path.with_suffix(".json").write_text(json.dumps({"model": name, **CONFIGS[name]}))
    built = model(pretrained=path)
    assert built.config.items() >= CONFIGS[name].items()
    assert_equal({key: p.asnumpy() for key, p in built.named_weights()}, ours)


def test_keywords_override_the_config_next_to_the_weights(tmp_path):
    write_state_dict(tmp_path / "x.ckpt", random_weights("tae"))
    (tmp_path / "x.json").write_text(json.dumps({"model": "tae", **TAE, "scaling_factor": 2.0}))
    given = TemporalAutoencoder({"temporal_upsample_padding": "zeros"}, pretrained=tmp_path / "x.ckpt").config
    assert (given["temporal_upsample_padding"], given["scaling_factor"], given["ch"]) == ("zeros", 2.0, 32)
