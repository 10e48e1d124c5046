"""The commands and snippets of README, docs/ and docstrings do what they say, on tiny files and at tiny sizes.

Commands run word for word, except that the sizes they name are replaced by tiny ones, in this process: those of msrun
are one worker. A page's run in its order, in one folder: what an earlier one wrote is there for a later one.
"""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from documented_files import CONFIGS, provide
from documents import ENTRIES, Example, examples, program
from mindspore import Tensor

from mg.runtime import Runtime

EXAMPLES = examples()

# Expression that the command holds -> why it isn't run.
LEFT_OUT = {
    r"fetch_clips|mg-fetch-clips": "downloads 100 MB; test_footage.py runs it on packages of its own",
    r"make_cuda_home|mg-make-cuda-home": "downloads CUDA",
    r"convert_lpips|mg-convert-lpips": "needs the original's files; test_lpips.py runs it",
    r"--device (ascend|gpu)|benchmark_speed.*--device cuda": "needs the device",
    r"--static ascend": "minutes to hours; test_ascend.py compiles some of the same graphs",
    r'load\(f"outputs/\{name\}_onnx", engine': "needs a CPU with AVX-512 BF16",
    r"benchmark_memory.* --models|mg-benchmark-memory --models": "ten minutes and 3 GB; sizes cannot be chosen",
}

# Console command -> the example of it that the quick tier runs. The others train several models, compile graphs or
# start processes.
QUICK = {
    "mg-train": "train_tae.py --config configs/image_vae/train/quickstart.yaml",
    "mg-reconstruct": "inference_vae.py --ckpt_path assets/tae",
    "mg-generate": "mg-generate configs/generation/opensora-v1-1/inference/sample.yaml --prompt ",
    "mg-evaluate": "evaluate.py --real_video_dir",
    "mg-benchmark": "benchmark.py --csv_path test.csv --num_frames 16",
    "mg-encode-latents": "encode_latents.py --config configs/tae",
    "mg-encode-text": "mg-encode-text --ckpt_path models",
    "mg-decode-latents": "decode_latents.py --latents_path",
    "mg-latent-statistics": "latent_statistics.py",
    "mg-convert": "convert_checkpoint.py --model dc_ae",
    "mg-average": "average_checkpoints.py --src outputs/run_5",
    "mg-make-text-encoder": "mg-make-text-encoder",
    "mg-judge-generation": "mg-judge-generation",
    "mg-inflate": "inflate_vae_to_tae.py",
    "mg-make-clips": "make_clips.py",
}

# Module of mg.cli, expression that the command holds -> options that replace its own.
_CLIP = "--num_frames 4 --image_size 32"
_CLIPS = f"{_CLIP} --num_workers 1 --device cpu --mode pynative"
_DENOISER = "--depth 1 --hidden_size 24 --num_heads 2".replace("--", "--model.")
TINY = [
    ("train", "", "--max_steps 1 --device cpu --mode pynative --data.num_workers 1"),
    ("train", r"configs/(?!generation)", "--data.buckets null --data.image_size 16 --data.crop_size 16"),
    ("train", r"configs/(?!generation)", "--loss.perceptual_weight 0"),
    ("train", r"configs/(?!generation|image_vae)", "--data.sample_n_frames 4"),
    ("train", r"configs/dc_ae", "--data.image_size 32 --data.crop_size 32"),
    ("train", r"configs/dc_ae", f"--model.config {json.dumps(CONFIGS['dc_ae'])!r}"),
    ("train", r"configs/dc_ae/train/small", "--model.linear_start 0"),
    ("train", r"configs/temporal_vae/train/small", "--model.linear_start 4 --data.image_size 32 --data.crop_size 32"),
    ("train", r"configs/temporal_vae(?!/train/small)", f"--model.config {json.dumps(CONFIGS['temporal_vae'])!r}"),
    ("train", r"configs/image_vae", "--data.random_scale null --data.batch_size 2"),
    ("train", r"configs/tae/train/small", "--model.linear_start 4 --data.sample_n_frames 8 --data.batch_size 1"),
    ("train", r"configs/tae/train/small", "--data.crop_size 32"),
    ("train", r"configs/generation", f"{_DENOISER} --text_encoder.model_max_length 200 --batch_size 1"),
    ("train", r"configs/generation", "--model.config.caption_channels 16 --bucket_config null"),
    ("train", r"which mg-train", "--output_path outputs/eight_devices"),  # a folder of an earlier run is refused
    ("train", r"configs/generation.*latents_path", "--output_path outputs/from_latents"),
    ("train", r"configs/generation(?!.*latents_path)", "--dataset_type null --data.sample_n_frames 4"),
    ("train", r"configs/generation(?!.*latents_path)", "--data.frame_size 16 24"),
    ("reconstruct", "", _CLIPS),
    ("benchmark", "", _CLIPS),
    ("encode_latents", "", _CLIPS),
    ("latent_statistics", "", _CLIPS),
    ("evaluate", "", "--num_frames 4 --image_size 32 --crop_size 32"),
    ("generate", "", "--image_size 16 24 --num_sampling_steps 2 --dtype fp32"),
    ("generate", "opensora-v1-2", "--num_frames 17"),
    ("generate", "class.yaml", "--image_size 16 16"),
    ("judge_generation", "", "--image_size 16 16 --num_frames 4 --num_sampling_steps 1 --noises 1"),
    ("benchmark_latents", "", f"{_CLIPS} --max_steps 1 --validation_clips 2 --samples 1 --num_sampling_steps 1"),
    ("benchmark_latents", "", "--denoiser.depth 1 --denoiser.hidden_size 24 --denoiser.num_heads 2 --batch_size 2"),
    ("export", "models/", "--frames 8 --size 32"),
    ("make_clips", "", "--size 32 --num_frames 4 --train_clips 2 --test_clips 1"),
    ("benchmark_speed", "", "--models image_vae --sizes 2x16x16 --runs 1 --mode pynative --operations false"),
    ("benchmark_speed", "", f"--peer false --configs {json.dumps({'image_vae': CONFIGS['image_vae']})!r}"),
    ("benchmark_speed", "--growth", "--growth 1 2"),
    ("benchmark_memory", "", "--frames 8 16 --size 32 --limit 100"),
    ("benchmark_streams", "", "--model image_vae --frames 4 --size 16p --tile_frames 2 --tile_size 16 --runs 1"),
    ("benchmark_streams", "", f"--engines mindspore --configs {json.dumps({'image_vae': CONFIGS['image_vae']})!r}"),
    ("benchmark_streams", "--ckpt_path", "--model tae --frames 8 --tile_frames 8"),
    ("benchmark_streams", "", "--device cpu --mode pynative --threads 1 --precision fp32"),
    ("benchmark_loader", "", "--num_frames 4 --image_size 32 --workers 1 --clips 2 --runs 1"),
    ("benchmark_loader", "", "--repeats 1 --large 64p --sizes 64p --kinds threads"),
    ("benchmark_loader", "--csv_path", "--decoders av"),  # decord needs wider frames
    ("benchmark_denoiser", "", "--latents 2x4x4 --depth 1 --runs 1 --mode pynative"),
]
# Options that name what a command writes.
_OUTPUTS = ("output_path", "output_dir", "target", "save_dir", "outputs")


def reason(text: str) -> str | None:
    """Why a command is left out."""
    return next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, text)), None)


def tiny(command: str) -> tuple[str, list[str]]:
    """The module of a command and its arguments, tiny options instead of its own."""
    module, arguments = program(command)
    options: dict[str, list[str]] = {}
    for name, pattern, text in TINY:
        if module == f"mg.cli.{name}" and re.search(pattern, command):
            for option in re.split(r"(?:^| )--(?=[a-z])", text)[1:]:
                key, _, values = option.partition(" ")
                options[key] = [values[1:-1]] if values.startswith("'") else values.split()
    kept, replaced = [], False
    for word in arguments:
        if word.startswith("--"):
            replaced = word[2:].partition("=")[0].replace("-", "_") in options
        if not replaced:
            kept.append(word)
    return module, [*kept, *(word for key, values in options.items() for word in (f"--{key}", *values))]


def run(example: Example, folder: Path, patch: pytest.MonkeyPatch, names: dict) -> None:
    """Run it in a folder; `names` are those that snippets of the page know."""
    text = example.text.replace("/path/to/", "path/to/")
    provide(folder, text)
    if example.language == "python":
        x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 9, 32, 32)).astype(np.float32)
        names["x"] = x if "mg.deploy" in text else Tensor(x)
        exec(compile(text, example.page, "exec"), names)
        return
    module, arguments = tiny(text)
    patch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).run()
    assert not stopped.value.code, example
    for option, value in re.findall(r"--(\S+?)[ =](\S+)", " ".join(arguments)):
        assert option.replace("-", "_") not in _OUTPUTS or (folder / value).exists(), f"{example}: {value}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder; MindSpore lets the device be chosen only once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mg.runtime.setup", lambda *_, **__: Runtime("cpu"))
    monkeypatch.setattr("mg.training.logs.draw_curve", lambda *_: None)  # takes longer than the updates
    return tmp_path


def test_documents_show_every_console_command():
    shown = {program(example.text)[0] for example in EXAMPLES if example.language == "shell"}
    assert {module.partition(":")[0] for module in ENTRIES.values()} <= shown
    assert [pattern for pattern in LEFT_OUT if not any(re.search(pattern, each.text) for each in EXAMPLES)] == []


@pytest.mark.parametrize("command", QUICK)
def test_a_documented_command_runs(command, place, monkeypatch):
    example = next(each for each in EXAMPLES if QUICK[command] in each.text)
    assert program(example.text)[0] == ENTRIES[command].partition(":")[0] and reason(example.text) is None
    run(example, place, monkeypatch, {})


@pytest.mark.full
@pytest.mark.parametrize("page", dict.fromkeys(example.page for example in EXAMPLES))
def test_everything_that_a_page_shows_runs(page, place, monkeypatch):
    names: dict = {"__name__": page}
    for example in EXAMPLES:
        if example.page == page and not reason(example.text):
            run(example, place, monkeypatch, names)
