"""scripts/inference.py as the guide calls it, at tiny sizes with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from arrays import relative_error
from mindspore import Tensor
from tiny_generation import AUTOENCODER, FRAMES, HEIGHT, WIDTH, Workplace

from mg.config import parse_config
from mg.data.clip_folder import write_csv
from mg.data.transforms import to_uint8_frames
from mg.data.video import open_video, read_image
from mg.diffusion.networks import create_denoiser
from mg.diffusion.schedules import create_schedule
from mg.generation import generate as generation
from mg.generation.codec import LatentCodec, load_codec
from mg.generation.config import AutoencoderSection, GenerateConfig, SchedulerSection, given
from mg.generation.generate import encode_reference, load_pipeline
from mg.generation.masks import parse_mask_strategy
from mg.generation.pipeline import Item, Pipeline, shared_frames
from mg.generation.requests import Request, read_requests
from mg.models import create_model

DATA = Path(__file__).parent / "data" / "generation"
NETWORK = DATA / "stdit2"  # with the original's weights


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Workplace(tmp_path, monkeypatch)


def read(path: Path) -> np.ndarray:
    """(T, H, W, 3)"""
    if path.suffix == ".png":
        return read_image(path)[None]
    with open_video(path) as video:
        return video.read(range(video.num_frames))


def config_of(path: Path, *arguments: object) -> GenerateConfig:
    return parse_config(GenerateConfig, "Generate.", ["--config", str(path), *map(str, arguments)])


# In the quick tier: text only, and an image to begin with.


def test_text_to_video(place):
    config = place.config()
    assert place.run(config, "--prompt", "a cat", "a dog", "--num-sample", "2", "--batch-size", "2") == 0
    names = ["sample_0000-0", "sample_0000-1", "sample_0001-0", "sample_0001-1"]
    assert sorted(place.rows()) == names
    videos = {name: read(place.samples / f"{name}.mp4") for name in names}
    assert all(video.shape == (FRAMES, HEIGHT, WIDTH, 3) for video in videos.values())
    assert len({video.tobytes() for video in videos.values()}) == 4
    with open_video(place.samples / f"{names[0]}.mp4") as video:
        assert video.fps == 8
    page = (place.samples / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:video/mp4') == 4 and "a dog" in page and "seed 42" in page

    # The same again is there; what changes no sample makes none; other settings do.
    before = (place.samples / "sample_0000-0.mp4").stat().st_mtime_ns
    assert place.run(config, "--prompt", "a cat", "--num-sample", "2", "--batch-size", "1") == 0
    assert (place.samples / "sample_0000-0.mp4").stat().st_mtime_ns == before
    videos_of_cats = [(place.video(f"cat{number}.mp4").name, "a cat") for number in range(3)]
    write_csv(place.folder / "train.csv", ("video", "caption"), [*videos_of_cats, (place.video().name, "a cow")])
    assert place.run(config, "--prompt", "a cat", "--num-sample", "2", "--beside", place.folder / "train.csv") == 0
    assert (place.samples / "sample_0000-0.mp4").stat().st_mtime_ns == before
    page = (place.samples / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:video/mp4') == 4 + 2 * 2 and page.count("<b>trained on</b> cat1.mp4") == 2
    (place.samples / "sample_0001-1.mp4").unlink()  # as a killed run leaves it
    assert place.run(config, "--prompt", "a cat", "a dog", "--num-sample", "2") == 0
    assert (place.samples / "sample_0000-0.mp4").stat().st_mtime_ns == before
    np.testing.assert_array_equal(read(place.samples / "sample_0001-1.mp4"), videos["sample_0001-1"])
    assert place.run(config, "--prompt", "a cat", "--num-sample", "2", "--seed", "7") == 0
    assert (place.samples / "sample_0000-0.mp4").stat().st_mtime_ns != before


def test_an_image_to_begin_with_given_after_the_prompt(place):
    image, config = place.image(), place.config()
    prompts = place.folder / "prompts.txt"
    suffix = json.dumps({"reference_path": str(image), "mask_strategy": "0"})
    prompts.write_text(f"a dog\na cat{suffix}\n", encoding="utf-8")
    assert place.run(config, "--prompt-path", prompts, "--start-index", "1", "--sample-name", "run") == 0
    row = place.rows()["run_0001"]
    assert row.prompt == "a cat" and row.settings["mask_strategy"] == "0"
    codec = load_codec(AutoencoderSection(from_pretrained=str(AUTOENCODER)), "fp32")
    reference, frames = encode_reference(config_of(config), codec, image, parse_mask_strategy("0"))
    assert frames.shape == (1, HEIGHT, WIDTH, 3)  # covered, and cropped in the middle
    kept = codec.decode(reference[None], 1)[0].transpose(1, 2, 3, 0)
    np.testing.assert_allclose(place.frames["run_0001"][:1], (kept.clip(-1, 1) + 1) * 127.5, atol=1)
    assert [path.name for path in (place.samples / "references").iterdir()] == ["run_0001_0.png"]
    assert '<img alt="" src="data:image/png' in (place.samples / "index.html").read_text(encoding="utf-8")


@pytest.mark.full
def test_a_sample_depends_on_no_other(place):
    path = place.config()
    config = config_of(path, "--prompt", "a dog", "a cat")
    pipeline = load_pipeline(config)
    dog, cat = (Item(request) for request in read_requests(config))
    _, beside = pipeline.generate([dog, cat])
    (request,) = read_requests(config_of(path, "--prompt", "a cat"))
    (alone,) = pipeline.generate([Item(request)])
    assert relative_error(Tensor(beside), alone) < 1e-4
    (other,) = pipeline.generate([Item(cat.request, sample=1)])
    assert relative_error(Tensor(other), alone) > 0.1


# Three loops, against the original.


class Captions:
    """The captions and sizes of the data, instead of an encoder."""

    def __init__(self, folder: Path):
        self.arrays = {path.stem: np.load(path)[:2] for path in folder.glob("*.npy")}

    def encode(self, prompts):
        return self.arrays["y"], self.arrays["mask"]


class RecordedNoise:
    def __init__(self, arrays: dict, loop: int):
        self.arrays, self.loop = arrays, loop

    def start(self):
        return self.arrays["noise_z"][self.loop]

    def __call__(self, step, purpose):
        return self.arrays["noise" if purpose == "step" else "renoise"][self.loop, step]


@pytest.mark.parametrize("twice", [pytest.param(True, marks=pytest.mark.full), False])
def test_three_loops_are_the_originals(twice, monkeypatch):
    folder, network = DATA / "long_video", NETWORK
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    scheduler = SchedulerSection("iddpm", 4, cfg_scale=2.0, cfg_channel=3, original_masks=True)
    config = GenerateConfig(
        image_size=[48, 72],
        num_frames=5,
        loop=3,
        condition_frame_length=2,
        scheduler=scheduler,
        vae=AutoencoderSection(),
    )
    sizes = json.loads((network / "meta.json").read_text(encoding="utf-8"))["config"]
    denoiser = create_denoiser("stdit2", network / "weights.safetensors", norm_given_twice=twice, **sizes)
    codec = load_codec(AutoencoderSection("VideoAutoencoderKL", str(AUTOENCODER)), "fp32")
    captions = Captions(network)
    pipeline = Pipeline(config, codec, captions, denoiser, create_schedule(**given(scheduler)))
    told = {name: captions.arrays[name] for name in denoiser.extra_inputs}
    conditions = pipeline.conditions
    monkeypatch.setattr(pipeline, "conditions", lambda texts: {**conditions(texts), **told})

    references = [[codec.encode(arrays["reference_0_0"][None])[0]], []]
    strategies = map(parse_mask_strategy, ("0", None))
    items = [
        Item(Request(number, "", [""] * 3, [], "", groups), 0, given)
        for number, (groups, given) in enumerate(zip(strategies, references))
    ]
    latents: list[np.ndarray] = []
    videos = pipeline.generate(
        items, noise=lambda _, loop: RecordedNoise(arrays, loop), on_latents=lambda _, z: latents.append(z)
    )
    assert pipeline.num_frames == 11
    wanted = arrays["latents" if twice else "latents_single_norm"]
    for loop in range(3):
        assert relative_error(Tensor(latents[loop]), wanted[loop]) < 1e-4
    if twice:
        assert relative_error(Tensor(np.stack(videos)), arrays["video"]) < 1e-4


def test_the_length_of_a_sample_with_loops():
    cases = json.loads((DATA / "mask_strategies.json").read_text(encoding="utf-8"))["total_frames"]
    codec = load_codec(AutoencoderSection(from_pretrained=str(AUTOENCODER)), "fp32")
    for case in cases:
        told = {name: case[name] for name in ("loop", "num_frames", "condition_frame_length")}
        config = GenerateConfig(image_size=[16, 16], **told)
        shared = shared_frames(config, codec)
        assert config.loop * (config.frames - shared) + shared == case["guide"]


def test_shared_latent_frames_must_be_whole_chunks_and_fewer_than_a_clip():
    sizes = dict(channel_multipliers=[1, 1, 1, 1], filters=32, num_res_blocks=1, spatial_layers_per_block=1)
    codec = LatentCodec(create_model("temporal_vae", spatial_block_out_channels=[32] * 4, **sizes))
    settings = dict(image_size=[16, 16], num_frames=51, loop=3)
    config = GenerateConfig(condition_frame_length=5, **settings)
    assert 3 * (51 - shared_frames(config, codec)) + shared_frames(config, codec) == 119
    with pytest.raises(ValueError, match="condition_frame_length: 4 latent frames end within a chunk"):
        shared_frames(GenerateConfig(condition_frame_length=4, **settings), codec)
    with pytest.raises(ValueError, match="must be below 15, the latent frames of a clip"):
        shared_frames(GenerateConfig(condition_frame_length=15, **settings), codec)


# What else the guide calls it for.


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy, references, frames",
    [
        ("0,0,0,-4,4", "video", {4: (0, 0), 7: (0, 3)}),  # extended to what was before
        ("0,0,-4,0,4", "video", {0: (0, 8), 3: (0, 11)}),  # continued
        ("0;0,1,0,-1,1", "image;other", {0: (0, 0), 7: (1, 0)}),  # two images connected
        ("0,0,0,0,8,0.4", "video", {}),  # edited
    ],
)
def test_references_are_where_the_strategy_puts_them(place, strategy, references, frames):
    paths = {"video": place.video(), "image": place.image(), "other": place.image("other.png", 3)}
    chosen = [paths[name] for name in references.split(";")]
    config = place.config()
    arguments = ["--prompt", "a cat", "--reference-path", ";".join(map(str, chosen)), "--mask-strategy", strategy]
    assert place.run(config, *arguments) == 0
    video = place.frames["sample_0000"]
    codec = load_codec(AutoencoderSection(from_pretrained=str(AUTOENCODER)), "fp32")
    whole = [encode_reference(config_of(config), codec, path, [])[0] for path in chosen]
    if "video" in references:
        whole = [encode_reference(config_of(config), codec, chosen[0], parse_mask_strategy("0,0,0,0,12"))[0]]
    for frame, (reference, source) in frames.items():
        wanted = codec.decode(whole[reference][None, :, source : source + 1], 1)[0].transpose(1, 2, 3, 0)
        np.testing.assert_allclose(video[frame][None], (wanted.clip(-1, 1) + 1) * 127.5, atol=1)
    if not frames:  # edited: neither kept nor unlike
        kept = codec.decode(whole[0][None, :, :FRAMES], FRAMES)[0]
        assert not np.allclose(video, to_uint8_frames(kept), atol=1)


def test_only_the_frames_that_a_strategy_uses_are_read(place):
    config = config_of(place.config(), "--prompt", "a cat")
    codec = load_codec(AutoencoderSection(from_pretrained=str(AUTOENCODER)), "fp32")
    path = place.video(frames=12)
    whole, frames = encode_reference(config, codec, path, parse_mask_strategy("0,0,-12,0,12"))
    assert len(frames) == 12
    head, frames = encode_reference(config, codec, path, parse_mask_strategy("0,0,2,0,3"))
    assert len(frames) == 5
    tail, frames = encode_reference(config, codec, path, parse_mask_strategy("0,0,-2,0,1"))
    assert len(frames) == 1 and tail.shape == whole.shape
    np.testing.assert_allclose(head, whole[:, :5], atol=1e-5)
    np.testing.assert_allclose(tail[:, -2], whole[:, -2], atol=1e-5)
    config.align = 2
    middle, frames = encode_reference(config, codec, path, parse_mask_strategy("0,0,3,0,3;0,0,-9,0,3"))  # at 2 and 2
    assert len(frames) == 3 and middle.shape == whole.shape
    np.testing.assert_allclose(middle[:, 2:5], whole[:, 2:5], atol=1e-5)


@pytest.mark.full
def test_three_loops_with_other_texts(place):
    config = place.config(loop=3, condition_frame_length=2)
    assert (
        place.run(config, "--prompt", "|0|a cat|2|a dog", "--reference-path", place.image(), "--mask-strategy", "0")
        == 0
    )
    row = place.rows()["sample_0000"]
    assert row.frames == 3 * (FRAMES - 2) + 2 and row.settings["texts"] == ["a cat", "a cat", "a dog"]


@pytest.mark.full
def test_open_sora_1_2_with_scores(place):
    settings = {"aes": 6.5, "save_fps": 24, "align": 5, "condition_frame_length": 5}
    scheduler = {"type": "rflow", "use_timestep_transform": True, "num_sampling_steps": 2, "cfg_scale": 7.0}
    content = yaml.safe_load(place.config("STDiT3-XL/2", **settings).read_text(encoding="utf-8"))
    path = place.folder / "rflow.yaml"
    path.write_text(yaml.safe_dump({**content, "scheduler": scheduler}), encoding="utf-8")
    arguments = ["--prompt", "a cat", "--prompt-as-path", "--reference-path", place.image(), "--mask-strategy", "0"]
    assert place.run(path, *arguments) == 0
    assert place.rows()["a cat"].settings["texts"] == ["a cat aesthetic score: 6.5."]
    before = (place.samples / "a cat.mp4").stat().st_mtime_ns
    assert place.run(path, *arguments, "--seed", "1") == 0  # the file is there
    assert (place.samples / "a cat.mp4").stat().st_mtime_ns == before


@pytest.mark.full
@pytest.mark.parametrize("text, prompt", [("classes", "7"), ("clip", "a cat")])
def test_dit_makes_images_of_classes_and_of_texts(place, text, prompt):
    config = place.config("DiT-XL/2", "dpm-solver", text, num_frames=1, image_size=[16, 16])
    assert place.run(config, "--prompt", prompt) == 0
    assert read(place.samples / "sample_0000.png").shape == (1, 16, 16, 3)


@pytest.mark.full
def test_open_sora_1_0_of_one_size(place):
    assert place.run(place.config("STDiT-XL/2"), "--prompt", "a cat") == 0
    assert place.rows()["sample_0000"].frames == FRAMES


@pytest.mark.full
def test_graph_mode_makes_the_same(place, monkeypatch):
    from mg import runtime

    path = place.config()
    config = config_of(path, "--prompt", "a cat", "--reference-path", place.image(), "--mask-strategy", "0")
    request = read_requests(config)[0]
    made = {}
    for mode in ("pynative", "graph"):
        runtime.setup("cpu", mode)
        pipeline = load_pipeline(config)
        reference, _ = encode_reference(config, pipeline.codec, Path(request.references[0]), request.insertions)
        (made[mode],) = pipeline.generate([Item(request, 0, [reference])])
    assert relative_error(Tensor(made["graph"]), made["pynative"]) < 1e-4


# What goes wrong.


def test_a_prompt_that_fails_costs_its_row(place, monkeypatch):
    broken = place.folder / "broken.mp4"
    broken.write_bytes(b"no video")
    config = place.config(batch_size=2)
    arguments = ["--prompt", "a cat", "a dog", "--reference-path", broken, "null", "--mask-strategy", "0", ""]
    assert place.run(config, *arguments) == 1
    rows = place.rows()
    assert rows["sample_0000"].status == "error" and "broken.mp4" in rows["sample_0000"].error
    assert rows["sample_0001"].status == "ok" and (place.samples / "sample_0001.mp4").is_file()
    assert "broken.mp4" in (place.samples / "index.html").read_text(encoding="utf-8")


def test_a_failed_batch_is_repeated_one_by_one(place, monkeypatch):
    config = config_of(place.config(gallery=False), "--prompt", "a cat", "a dog", "--batch-size", "2")
    pipeline = load_pipeline(config)
    batches = []
    whole = pipeline.generate

    def fail(items, progress=None):
        batches.append([item.request.prompt for item in items])
        if any(item.request.prompt == "a dog" for item in items):
            raise RuntimeError("no memory")
        return whole(items, progress)

    monkeypatch.setattr(pipeline, "generate", fail)
    monkeypatch.setattr(generation, "load_pipeline", lambda _: pipeline)
    report = generation.generate(config)
    assert batches == [["a cat", "a dog"], ["a cat"], ["a dog"]]
    assert report.made == 1 and report.failed == [("sample_0001", "no memory")]


def test_weights_that_do_not_fit_are_one_line_before_any_sample(place):
    config = place.config("DiT-XL/2", text="classes", num_frames=1, image_size=[16, 16])
    with pytest.raises(ValueError, match="one of 1000 classes, but the network takes one of 10 classes; see text_enc"):
        load_pipeline(config_of(config, "--text_encoder.num_classes", "1000"))
    with pytest.raises(ValueError, match="scheduler.cfg_channel is 7; latents of image_vae have 4 channels"):
        load_pipeline(config_of(config, "--scheduler.cfg_channel", "7"))


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--reference-path", "http://127.0.0.1:9/cat.png", "--mask-strategy", "0"], "cannot be downloaded"),
        (["--reference-path", "none.png", "--mask-strategy", "0"], "reference_path: none.png: no such file"),
        (["--ckpt-path", "none"], "model.from_pretrained: none: no such file or folder"),
        (["--reference-path", "a.png"], "without a mask_strategy"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_loaded(place, monkeypatch, capsys, arguments, wanted):
    config = place.config()
    monkeypatch.setattr(generation, "load_pipeline", lambda _: pytest.fail("loaded"))
    assert place.run(config, "--prompt", "a cat", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and wanted in error
