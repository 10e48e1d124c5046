"""Data sets into latents and back: whole or not at all, resumed, shared over ranks, nothing lost, every fault named."""

import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file
from tiny_models import randomized
from training_runs import TwoConvs
from workers import finish, start

from mg import inference
from mg.checkpoints import CheckpointError
from mg.config import parse_config
from mg.data import DataError
from mg.data import shards as folders
from mg.data.clips import ClipOptions, OpenClip, load_clip, open_clip
from mg.data.transforms import to_uint8_frames
from mg.data.video import open_video, read_image, write_image, write_video
from mg.inference.decode import DecodeConfig, decode_folder
from mg.inference.encode import EncodeConfig, _settings, encode_csv
from mg.inference.loading import ModelSection
from mg.latents import Latents, open_latents, read_rows
from mg.models import create_model
from mg.runtime import Runtime

ROOT = Path(__file__).parents[1]
NAMES = ["a/x.mp4", "b/x.mp4", "broken.mp4", "still.png", "long.mp4", "b/x.mp4", "ünï, code.mp4"]
GOOD = ["a/x.mp4", "b/x.mp4", "still.png", "long.mp4", "ünï, code.mp4"]


def picture(frames: int, height: int = 20, width: int = 28, shift: int = 0) -> np.ndarray:
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    planes = [128 + 90 * np.sin((x + 2 * t + shift) / 6 + c) * np.cos(y / 8 - c) for c in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(("a/x.mp4", "b/x.mp4", "ünï, code.mp4")):
        write_video(folder / name, picture(5, shift=10 * number), fps=8)
    write_video(folder / "long.mp4", picture(40, shift=5), fps=12)
    write_image(folder / "still.png", picture(1, 21, 19)[0])
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "two_convs.ckpt"
    TwoConvs({}).save_weights(path)
    return str(path)


@pytest.fixture
def configure(tmp_path, videos, checkpoint):
    def configure(names=NAMES, **options) -> EncodeConfig:
        lines = [f'"{name}",of {name.split(".")[0].replace(",", "")}' for name in names]
        (tmp_path / "index.csv").write_text("\n".join(["video,caption", *lines]) + "\n", encoding="utf-8")
        settings = dict(csv_path=str(tmp_path / "index.csv"), video_folder=str(videos), model=ModelSection(checkpoint))
        settings |= dict(output_path=str(tmp_path / "latents"), image_size=0, crop=False)
        return EncodeConfig(**{**settings, **options})

    return configure


def contents(folder: Path) -> dict:
    """All that a user can read of a folder."""
    latents = open_latents(folder)
    return {name: {key: clip.read(key) for key in clip.tensors} for name, clip in latents.items()}


def assert_same(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, tensors in wanted.items():
        assert list(found[name]) == list(tensors)
        for key, value in tensors.items():
            np.testing.assert_array_equal(found[name][key], value, err_msg=f"{name} {key}")


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_every_video_has_its_latents_and_its_line(tmp_path, videos, checkpoint, configure):
    config = configure()
    report = encode_csv(config)
    assert (report.total, report.mine, report.encoded, report.there) == (6, 6, 5, 0)
    assert [name for name, _ in report.failed] == ["broken.mp4"]
    latents = open_latents(tmp_path / "latents")
    assert list(latents) == GOOD and len(latents) == 5 and "broken.mp4" not in latents
    assert "broken.mp4: not a video" in latents.failed["broken.mp4"]
    model = create_model("two_convs", pretrained=checkpoint)
    for name, clip in latents.items():
        x, fps = load_clip(videos / name, config)
        assert (clip.name, clip.caption) == (name, "of " + name.split(".")[0].replace(",", ""))
        assert (clip.frames, clip.height, clip.width) == x.shape[1:]
        assert (clip.fps, clip.still) == (fps, name.endswith("png"))
        assert clip.shape == (2, *x.shape[1:])
        model.enable_tiling()
        np.testing.assert_array_equal(clip.read(), model.encode(Tensor(x[None])).mean.asnumpy()[0])
    settings = latents.settings
    assert settings["model"]["sha256"] == sha256sum(checkpoint)
    assert settings["model"]["config"] == model.config and settings["model"]["name"] == "two_convs"
    assert settings["scaling"] == {"convention": model.scaling, "factors": {}, "applied": False}
    lines = (tmp_path / "latents" / "index.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == list(dict.fromkeys(NAMES))
    assert not [path for path in (tmp_path / "latents").iterdir() if path.name.startswith(".latents")]


def sha256sum(path: str) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_scaling_says_the_factors_and_whether_they_are_applied(tmp_path, checkpoint):
    config = EncodeConfig(ModelSection(checkpoint), str(tmp_path / "index.csv"))
    model = create_model("image_vae", ch=32, ch_mult=[1], num_res_blocks=1, z_channels=2)
    assert _settings(config, model)["scaling"]["factors"] == {"scaling_factor": 1.5305, "shift_factor": 0.0609}


def test_shards_are_what_the_safetensors_package_reads(tmp_path, configure):
    encode_csv(configure())
    (name,) = shards(tmp_path / "latents")
    theirs = load_file(tmp_path / "latents" / name)
    assert {f"{key}.z" for key in GOOD} == set(theirs)
    for key, clip in open_latents(tmp_path / "latents").items():
        np.testing.assert_array_equal(theirs[f"{key}.z"], clip.read())


def test_a_part_of_a_clip_is_read_without_the_rest(tmp_path, configure):
    encode_csv(configure())
    clip = open_latents(tmp_path / "latents")["long.mp4"]
    np.testing.assert_array_equal(clip.read(start=7, stop=12), clip.read()[:, 7:12])
    assert clip.read(start=40).shape == (2, 0, 20, 28)
    with pytest.raises(DataError, match="long.mp4: has 40 latent frames; 30 to 41 were requested"):
        clip.read(start=30, stop=41)


@pytest.mark.parametrize("dtype, atol", [("fp16", 1e-3), ("bf16", 1e-2)])
def test_mean_and_logvar_are_stored_if_asked_in_the_dtype_asked_for(tmp_path, configure, dtype, atol):
    encode_csv(configure(output_path=str(tmp_path / "plain")))
    encode_csv(configure(posterior=True, latents_dtype=dtype))
    plain, both = open_latents(tmp_path / "plain"), open_latents(tmp_path / "latents")
    assert both.settings["latents"]["stored"] == ["mean", "logvar"]
    for name, clip in both.items():
        np.testing.assert_allclose(clip.read("mean"), plain[name].read("z"), rtol=0, atol=atol * 8)
        assert clip.read("logvar").shape == clip.shape and np.abs(clip.read("logvar") - clip.read()).max() > 0.01
        with pytest.raises(DataError, match=r"z was not stored; mean, logvar can be read"):
            clip.read("z")
    sizes = [sum(path.stat().st_size for path in folder.folder.glob("*.safetensors")) for folder in (plain, both)]
    assert sizes[0] - folders.HEADER_ROOM == sizes[1] - folders.HEADER_ROOM


def test_samples_do_not_depend_on_earlier_runs(tmp_path, videos, checkpoint, configure):
    encode_csv(configure(sample_posterior=True))
    encode_csv(configure(["long.mp4"], sample_posterior=True, output_path=str(tmp_path / "one")))
    one, all_of_them = open_latents(tmp_path / "one"), open_latents(tmp_path / "latents")
    np.testing.assert_array_equal(one["long.mp4"].read(), all_of_them["long.mp4"].read())
    encode_csv(configure(["long.mp4"], posterior=True, output_path=str(tmp_path / "both")))
    both = open_latents(tmp_path / "both")["long.mp4"]
    standard = (one["long.mp4"].read() - both.read("mean")) / np.exp(0.5 * both.read("logvar"))
    assert abs(standard.mean()) < 0.02 and abs(standard.std() - 1) < 0.02


def test_shards_hold_up_to_their_size_and_a_long_video_has_its_own(tmp_path, configure):
    config = configure()
    config.shard_size = 6 * 2 * 5 * 20 * 28 / 2**20  # room for a short video and an image, in MB
    encode_csv(config)
    kept = {}
    for line in (tmp_path / "latents" / "index.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["status"] == "ok":
            kept.setdefault(row["shard"], []).append(row["name"])
    assert list(kept.values()) == [["a/x.mp4"], ["b/x.mp4", "still.png"], ["long.mp4"], ["ünï, code.mp4"]]
    assert sorted(kept) == shards(tmp_path / "latents")


def test_a_full_header_begins_another_shard(tmp_path, configure, monkeypatch):
    monkeypatch.setattr(folders, "HEADER_ROOM", 220)
    encode_csv(configure())
    assert len(shards(tmp_path / "latents")) == 3
    assert list(contents(tmp_path / "latents")) == GOOD


def test_the_same_command_again_continues_and_retries_failures_only_on_request(
    tmp_path, videos, configure, monkeypatch
):
    encode_csv(configure(NAMES[:3]))
    before = contents(tmp_path / "latents")
    seen = []
    monkeypatch.setattr(
        "mg.inference.encode.open_clips",
        lambda rows, *rest, real=encode_csv.__globals__["open_clips"]: (
            seen.extend(r.name for r in rows) or real(rows, *rest)
        ),
    )
    report = encode_csv(configure())
    assert (report.encoded, report.there, len(report.failed)) == (3, 2, 1) and seen == ["still.png", *GOOD[3:]]
    assert list(contents(tmp_path / "latents")) == GOOD
    assert_same({name: contents(tmp_path / "latents")[name] for name in before}, before)
    seen.clear()
    report = encode_csv(configure(retry_failed=True))
    assert (report.encoded, report.there, len(report.failed)) == (0, 5, 1) and seen == ["broken.mp4"]


def test_a_repaired_video_is_encoded_when_failures_are_retried(tmp_path, videos, configure):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(b"no video")
    assert encode_csv(configure(["a.mp4"], video_folder=str(tmp_path / "v"))).encoded == 0
    write_video(tmp_path / "v" / "a.mp4", picture(3), 8)
    assert encode_csv(configure(["a.mp4"], video_folder=str(tmp_path / "v"))).encoded == 0
    assert encode_csv(configure(["a.mp4"], video_folder=str(tmp_path / "v"), retry_failed=True)).encoded == 1
    assert list(open_latents(tmp_path / "latents")) == ["a.mp4"]


def test_a_folder_of_other_settings_is_refused_with_what_differs(tmp_path, configure, checkpoint):
    encode_csv(configure(["a/x.mp4"]))
    with pytest.raises(ValueError, match=r"clips.num_frames was None and is 3 now.*another output_path$"):
        encode_csv(configure(num_frames=3))
    other = tmp_path / "other.ckpt"
    randomized(TwoConvs({}), seed=1).save_weights(other)  # TwoConvs' own are the same after the same seed
    with pytest.raises(ValueError, match="model.sha256 was "):
        encode_csv(configure(model=ModelSection(str(other))))
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(Path(checkpoint).read_bytes())
    moved.with_suffix(".json").write_bytes(Path(checkpoint).with_suffix(".json").read_bytes())
    assert encode_csv(configure(model=ModelSection(str(moved)))).there == 1


def test_a_run_that_was_stopped_loses_the_open_shard_at_most(tmp_path, configure, monkeypatch):
    encode_csv(configure(output_path=str(tmp_path / "whole")))
    config = configure()
    config.shard_size = 8 * 2 * 5 * 20 * 28 / 2**20  # one short video, in MB
    write, calls = folders.PieceWriter.write, []

    def failing(self, *args):
        calls.append(args[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(folders.PieceWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        encode_csv(config)
    kept = contents(tmp_path / "latents")
    assert 1 <= len(kept) < 5 and set(shards(tmp_path / "latents")) == {
        clip.shard for clip in open_latents(tmp_path / "latents").values()
    }
    monkeypatch.setattr(folders.PieceWriter, "write", write)
    assert encode_csv(config).there == len(kept)
    assert_same(contents(tmp_path / "latents"), contents(tmp_path / "whole"))


def test_what_a_killed_run_left_is_removed(tmp_path, configure):
    config = configure()
    encode_csv(config)
    whole, folder = contents(tmp_path / "latents"), tmp_path / "latents"
    leftovers = ["latents-00000-00009.safetensors", ".latents-00000-00003.0123abcd.safetensors"]
    leftovers += ["latents-00002-00000.safetensors"]  # of a rank that there is no more
    for name in [*leftovers, "mine.safetensors"]:
        (folder / name).write_bytes(b"half")
    encode_csv(config)
    assert shards(folder) == ["latents-00000-00000.safetensors", "mine.safetensors"]
    assert_same(contents(folder), whole)


@pytest.mark.parametrize("ranks, then", [(2, 2), (3, 1), (1, 2)])
def test_ranks_share_the_videos_and_any_number_of_ranks_can_continue(tmp_path, configure, ranks, then):
    encode_csv(configure(output_path=str(tmp_path / "whole")))
    for rank in range(ranks):
        report = encode_csv(configure(NAMES[:4]), rank, ranks)
        assert report.mine == len(range(rank, 4, ranks))
    assert list(open_latents(tmp_path / "latents")) == GOOD[:3]
    done = sum(encode_csv(configure(), rank, then).encoded for rank in reversed(range(then)))
    assert done == 2
    assert_same(contents(tmp_path / "latents"), contents(tmp_path / "whole"))
    assert (tmp_path / "latents" / "index.jsonl").read_text().count("\n") == 6


def test_two_runs_do_not_write_as_the_same_rank(tmp_path, configure):
    encode_csv(configure(["a/x.mp4"]))
    locked, refused = folders.locked(tmp_path / "latents" / ".lock-00000"), "another run is writing there"
    with locked, pytest.raises(DataError, match=refused):
        encode_csv(configure())


def test_latents_that_are_not_finite_are_an_error_of_that_video(tmp_path, configure, monkeypatch):
    real = TwoConvs.encode_moments
    monkeypatch.setattr(TwoConvs, "encode_moments", lambda self, x: real(self, x) / (x.shape[2] != 8))
    report = encode_csv(configure())  # the last tile of the long video has 8 frames
    assert [name for name, _ in report.failed] == ["broken.mp4", "long.mp4"]
    assert "not finite" in report.failed[1][1]
    assert list(contents(tmp_path / "latents")) == [name for name in GOOD if name != "long.mp4"]


def test_a_full_disk_costs_the_videos_that_do_not_fit_and_the_next_run_retries_them(tmp_path, configure, monkeypatch):
    encode_csv(configure(output_path=str(tmp_path / "whole")))
    write, full = folders.PieceWriter.write, OSError(28, "No space left on device")

    def write_short_ones(self, name, at, piece):
        if name == "long.mp4.z" and at:
            raise full
        write(self, name, at, piece)

    with monkeypatch.context() as patch:
        patch.setattr(folders.PieceWriter, "write", write_short_ones)
        report = encode_csv(configure())
    shard = tmp_path / "latents" / "latents-00000-00000.safetensors"
    assert report.encoded == 4 and ("long.mp4", f"{shard}: No space left on device") in report.failed
    assert [row.status for row in read_rows(tmp_path / "latents").values()].count("error") == 2
    assert list(contents(tmp_path / "latents")) == [name for name in GOOD if name != "long.mp4"]
    report = encode_csv(configure())
    assert (report.encoded, report.there, len(report.failed)) == (1, 4, 1)  # what is broken is not tried again
    assert_same(contents(tmp_path / "latents"), contents(tmp_path / "whole"))


def test_a_shard_that_cannot_be_finished_costs_no_other(tmp_path, configure, monkeypatch):
    encode_csv(configure(output_path=str(tmp_path / "whole")))
    config, finish, calls = configure(), folders.PieceWriter.finish, []
    config.shard_size = 8 * 2 * 5 * 20 * 28 / 2**20  # one short video, in MB

    def failing(self):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        finish(self)

    monkeypatch.setattr(folders.PieceWriter, "finish", failing)
    report = encode_csv(config)
    (lost,) = {name for name, _ in report.failed} - {"broken.mp4"}
    assert report.encoded == 4 and lost in GOOD
    assert list(contents(tmp_path / "latents")) == [name for name in GOOD if name != lost]
    assert not [path for path in (tmp_path / "latents").iterdir() if path.name.startswith(".latents")]
    assert encode_csv(config).encoded == 1
    assert_same(contents(tmp_path / "latents"), contents(tmp_path / "whole"))


def test_a_really_full_disk_spoils_no_shard(tmp_path, configure):
    """No file grows beyond 64 KB for the header and a video and a half; then it may."""
    encode_csv(configure(output_path=str(tmp_path / "whole")))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (folders.HEADER_ROOM + 3 * 4 * 2 * 5 * 20 * 28 // 2, before[1]))
    try:
        report = encode_csv(configure())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {name for name, _ in report.failed} == {"broken.mp4", "b/x.mp4", "long.mp4", "ünï, code.mp4"}
    whole = contents(tmp_path / "whole")
    assert_same(contents(tmp_path / "latents"), {name: whole[name] for name in ("a/x.mp4", "still.png")})
    assert encode_csv(configure()).encoded == 3
    assert_same(contents(tmp_path / "latents"), whole)


def test_a_changed_caption_is_written_to_the_index_and_nothing_is_encoded_again(tmp_path, configure):
    encode_csv(configure())
    config = configure()
    text = Path(config.csv_path).read_text(encoding="utf-8").replace("of a/x", "of another")
    Path(config.csv_path).write_text(text, encoding="utf-8")
    assert encode_csv(config).encoded == 0
    assert open_latents(tmp_path / "latents")["a/x.mp4"].caption == "of another"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda shard: shard.unlink(), "latents-00000-00000.safetensors: No such file"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-9]), "latents-00000-00000.safetensors: .*cut short"),
        (lambda shard: shard.write_bytes(b"\0" * 99), "latents-00000-00000.safetensors: "),
        (
            lambda shard: shard.write_bytes(shard.read_bytes().replace(b"a/x.mp4.z", b"a/y.mp4.z")),
            "a/x.mp4.z is not there",
        ),
    ],
)
def test_a_damaged_shard_is_named_with_the_key(tmp_path, configure, damage, message):
    encode_csv(configure())
    damage(tmp_path / "latents" / "latents-00000-00000.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_latents(tmp_path / "latents")["a/x.mp4"].read()


def test_a_damaged_index_or_no_folder_is_named(tmp_path, configure):
    with pytest.raises(DataError, match="nowhere: has no latents, there is no latents.json"):
        open_latents("nowhere")
    encode_csv(configure(["a/x.mp4"]))
    with pytest.raises(DataError, match="no latents of z.mp4: there is no video with this name"):
        open_latents(tmp_path / "latents")["z.mp4"]
    with open(tmp_path / "latents" / "index.jsonl", "a") as file:
        file.write("[1, 2]\n")
    with pytest.raises(DataError, match="index.jsonl, line 2: must be a JSON object with keys of name, caption"):
        open_latents(tmp_path / "latents")


def test_reading_needs_neither_mindspore_nor_a_model(tmp_path, configure):
    encode_csv(configure(["a/x.mp4"]))
    code = "import sys; from mg.latents import open_latents; z = open_latents(sys.argv[1])['a/x.mp4'].read(); "
    code += "assert z.shape == (2, 5, 20, 28) and 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "latents")], check=True, cwd=ROOT)


def test_clips_by_pieces_are_the_clip(videos, checkpoint):
    for options in (dict(image_size=0, crop=False), dict(image_size=16, frame_stride=3, num_frames=9)):
        config = ClipOptions(**options)
        for name in ("long.mp4", "still.png"):
            if name == "still.png" and "num_frames" in options:
                continue
            whole, _ = load_clip(videos / name, config)
            for tile, step in ((4, 4), (7, 3), (50, 50)):
                with open_clip(videos / name, config) as clip:
                    for start in range(0, clip.num_frames, step):
                        stop = min(start + tile, clip.num_frames)
                        np.testing.assert_array_equal(clip.read(start, stop), whole[:, start:stop])
                    assert clip.size == whole.shape[2:]


# Decoding.


def decode(tmp_path, **options):
    return decode_folder(
        DecodeConfig(latents_path=str(tmp_path / "latents"), output_path=str(tmp_path / "out"), **options)
    )


def test_latents_come_back_as_videos_of_the_length_and_size_encoded(tmp_path, videos, checkpoint, configure):
    encode_csv(configure())
    report = decode(tmp_path)
    assert (report.decoded, report.there, report.failed) == (5, 0, [])
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(["a_x.mp4", "b_x.mp4", "long.mp4", "still.png", "ünï, code.mp4"])
    model = create_model("two_convs", pretrained=checkpoint)
    model.enable_tiling()
    with open_video(tmp_path / "out" / "long.mp4") as video:
        assert (video.num_frames, video.height, video.width, video.fps) == (40, 20, 28, 12)
    y = model(Tensor(load_clip(videos / "long.mp4", configure())[0][None])).asnumpy()[0]
    write_video(tmp_path / "whole.mp4", to_uint8_frames(y), 12)
    assert (tmp_path / "out" / "long.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert read_image(tmp_path / "out" / "still.png").shape == (21, 19, 3)


def test_threads_read_and_write_while_the_model_runs(tmp_path, configure, monkeypatch):
    ran = {}

    def note(owner, name: str) -> None:
        run = getattr(owner, name)

        def noted(*arguments):
            ran.setdefault(name, set()).add(threading.current_thread().name.split("_")[0])
            return run(*arguments)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in ((OpenClip, "read"), (TwoConvs, "encode_moments"), (folders.ShardWriter, "store")):
        note(owner, name)
    encode_csv(configure(["long.mp4"]))  # two pieces; the first one is read as the file is opened
    assert "mg-read" in ran["read"] and "MainThread" not in ran["read"]
    assert ran["encode_moments"] == {"MainThread"} and ran["store"] == {"mg-write"}
    ran.clear()
    for owner, name in ((Latents, "read"), (TwoConvs, "decode_latents"), (inference.decode, "write_frames")):
        note(owner, name)
    assert decode(tmp_path).decoded == 1
    assert ran == {"read": {"mg-read"}, "decode_latents": {"MainThread"}, "write_frames": {"mg-write"}}


def test_decoding_continues_and_accepts_names(tmp_path, configure):
    encode_csv(configure())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".b_x.0cb6c1bd.mp4").touch()  # a killed run's
    assert decode(tmp_path, names=["b/x.mp4", "still.png"]).decoded == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b_x.mp4", "still.png"]
    report = decode(tmp_path)
    assert (report.decoded, report.there) == (3, 2)
    with pytest.raises(DataError, match="no latents of broken.mp4: .*not a video"):
        decode(tmp_path, names=["broken.mp4"])
    one = DecodeConfig(latents_path=str(tmp_path / "latents"), output_path=str(tmp_path / "shared"))
    assert [decode_folder(one, rank, 2).decoded for rank in range(2)] == [3, 2]


def test_only_the_encoding_checkpoint_decodes_unless_any_is_allowed(tmp_path, configure):
    encode_csv(configure(["a/x.mp4"]))
    other = tmp_path / "other.ckpt"
    randomized(TwoConvs({}), seed=1).save_weights(other)  # TwoConvs' own are the same after the same seed
    with pytest.raises(DataError, match=r"other.ckpt: is not the checkpoint that made .* --any_checkpoint"):
        decode(tmp_path, from_pretrained=str(other))
    assert not (tmp_path / "out").exists()
    assert decode(tmp_path, from_pretrained=str(other), any_checkpoint=True).decoded == 1
    with pytest.raises(DataError, match="gone.ckpt: no such checkpoint; give --ckpt_path"):
        decode(tmp_path, from_pretrained=str(tmp_path / "gone.ckpt"))


def test_latents_that_cannot_be_read_are_counted_and_leave_no_video(tmp_path, configure):
    config = configure()
    config.shard_size = 0.01
    encode_csv(config)
    (tmp_path / "latents" / open_latents(tmp_path / "latents")["long.mp4"].shard).write_bytes(b"cut")
    report = decode(tmp_path)
    assert report.decoded == 4 and [name for name, _ in report.failed] == ["long.mp4"]
    assert not (tmp_path / "out" / "long.mp4").exists()


# Commands.


def run_script(monkeypatch, script: str, *arguments) -> int:
    """Its exit code, run in this process: MindSpore lets the device be chosen only once."""
    monkeypatch.setattr("mg.runtime.setup", lambda *_: Runtime("cpu"))
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    return stopped.value.code


def test_the_commands_encode_and_decode_with_a_real_model(tmp_path, videos, monkeypatch, capsys):
    config = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
    create_model("tae", **config).save_weights(tmp_path / "tae.ckpt")
    (tmp_path / "index.csv").write_text("video\na/x.mp4\nbroken.mp4\nstill.png\n")
    options = ["--ckpt_path", tmp_path / "tae.ckpt", "--csv_path", tmp_path / "index.csv", "--video_folder", videos]
    options += ["--config", ROOT / "configs/tae/latents/video_256x256.yaml", "--image_size", "16"]
    assert run_script(monkeypatch, "encode_latents.py", *options, "--output_path", tmp_path / "latents") == 1
    out = capsys.readouterr().out
    assert "failed: broken.mp4: " in out and "2 videos encoded, 0 were there, 1 failed" in out
    assert open_latents(tmp_path / "latents").settings["model"]["tiling"]["encode_overlap"] == 8
    options = [
        "--latents_path",
        tmp_path / "latents",
        "--save_dir",
        tmp_path / "out",
        "--names",
        "a/x.mp4",
        "still.png",
    ]
    assert run_script(monkeypatch, "decode_latents.py", *options) == 0
    assert "2 videos decoded, 0 were there, 0 failed" in capsys.readouterr().out
    with open_video(tmp_path / "out" / "a_x.mp4") as video:
        assert (video.num_frames, video.height, video.width) == (5, 16, 16)


def test_a_users_mistake_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, configure):
    config = configure(["a/x.mp4"])
    options = [
        "--ckpt_path",
        config.model.from_pretrained,
        "--csv_path",
        config.csv_path,
        "--output_path",
        tmp_path / "o",
    ]
    for more, message in (
        (["--batch_size", "2"], "batch_size is 2; it must be 1"),
        (["--shard_size", "0"], "shard_size is 0; it must be at least 1"),
        (["--posterior", "--sample_posterior"], "sample_posterior is True; it must be false"),
        (["--latents_dtype", "int8"], "latents_dtype is 'int8'; it must be one of fp32, fp16, bf16"),
    ):
        assert run_script(monkeypatch, "encode_latents.py", *options, *more) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert run_script(monkeypatch, "decode_latents.py", "--latents_path", tmp_path / "nowhere") == 2
    assert "nowhere: has no latents" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/latents/*.yaml")), ids=lambda path: path.parts[-3])
def test_shipped_configs_are_read(path):
    config = parse_config(EncodeConfig, "", ["--config", str(path), "--ckpt_path", "x", "--csv_path", "y"])
    assert config.num_frames is None and config.model.name == path.parts[-3]


WITH_TWO_CONVS = """
import runpy
import sys

import training_runs

sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(config: EncodeConfig) -> list[str]:
    """The words of scripts/encode_latents.py, run with the model of two convolutions."""
    script = Path(config.output_path).with_name("run.py")
    script.write_text(WITH_TWO_CONVS)
    words = ["--ckpt_path", config.model.from_pretrained, "--csv_path", config.csv_path]
    words += ["--video_folder", config.video_folder, "--output_path", config.output_path, "--image_size", "0"]
    words += ["--crop=False", "--device", "cpu", "--mode", "pynative"]
    return [str(script), "scripts/encode_latents.py", *words]


@pytest.mark.full
def test_two_workers_complete_the_work_of_a_killed_process(tmp_path, videos, configure):
    """SIGKILL once the first shard is there; then the rest by two workers of msrun."""
    names = [f"{i}.mp4" for i in range(12)]
    for name in names:
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / name).write_bytes((videos / "long.mp4").read_bytes())
    config = configure(names, video_folder=str(tmp_path / "many"))
    folder = Path(config.output_path)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    process = subprocess.Popen(
        [sys.executable, *command(config)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(folder.glob(".latents-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(folder.glob(".latents-*"))  # the open shard, which the next run removes
    process = start(tmp_path / "logs", *command(config), cwd=ROOT, PYTHONPATH=path)
    said = finish(process, tmp_path / "logs", 800)
    assert process.returncode == 0, said[-2000:]
    logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("worker_*.log"))
    assert len(re.findall(r"videos encoded, \d+ were there, 0 failed", logs)) == 2
    encode_csv(configure(names, video_folder=str(tmp_path / "many"), output_path=str(tmp_path / "whole")))
    assert_same(contents(folder), contents(tmp_path / "whole"))
    assert {name.split("-")[1] for name in shards(folder)} == {"00000", "00001"}
    assert not list(folder.glob(".latents-*"))
