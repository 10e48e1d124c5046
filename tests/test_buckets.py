"""Buckets: which size a video or image is brought to is Open-Sora's rule, and what that leaves out is said."""

import logging
import re
import shlex

import mg  # noqa: F401  # isort: skip  # before MindSpore

import numpy as np
import pytest
from training_runs import short_run, write_data

from mg.benchmark.quality import BenchmarkConfig, report_command
from mg.benchmark.results import write_settings
from mg.config import parse_config
from mg.data import DataError
from mg.data.buckets import (
    NO_LENGTH,
    NOT_KEPT,
    RESOLUTIONS,
    STOPPED,
    TOO_SMALL,
    Assignment,
    BucketSchedule,
    Sources,
    bucket_sizes,
    count_pixels,
    read_buckets,
)
from mg.data.clips import ClipOptions, read_clips
from mg.data.index import IndexRow, read_index
from mg.data.loader import ClipLoader, DataConfig
from mg.data.video import write_image, write_video
from mg.inference.batches import group_by_shape
from mg.inference.loading import ModelSection
from mg.inference.reconstruction import InferenceConfig, reconstruct_csv
from mg.models import create_model
from mg.settings import check_settings
from mg.training.autoencoder import TrainConfig

K2 = (1440, 2560)


def sources(*clips, count=1):
    """`count` rows of each clip (frames, (height, width)); an image has 1 frame."""
    length, sizes = zip(*clips)
    length, height, width = (np.repeat(column, count) for column in (length, *zip(*sizes)))
    return Sources(length, height, width, length == 1)


def shares(config, frames, size, count=40_000):
    """Where that many equal rows go: {(resolution, frames) or a reason: share}."""
    assignment = Assignment(config, 8, sources((frames, size), count=count))
    found, counts = np.unique(assignment.draw(np.random.default_rng(0)), return_counts=True)
    names = [assignment.places[number].bucket if number >= 0 else number for number in found.tolist()]
    return {
        name if isinstance(name, int) else (name.resolution, name.num_frames): share
        for name, share in zip(names, (counts / count).tolist())
    }


def close(found, wanted):
    """Four standard deviations of 40,000 draws are 0.01 at most."""
    return found.keys() == wanted.keys() and all(abs(found[name] - wanted[name]) < 0.01 for name in wanted)


# The guide's examples.


def test_a_2k_video_tries_1080p_then_720p_then_480p():
    guide = {"480p": {16: (1.0, 8)}, "720p": {16: (0.5, 4)}, "1080p": {16: (0.2, 2)}, "4K": {16: (0.1, 1)}}
    wanted = {("1080p", 16): 0.2, ("720p", 16): 0.8 * 0.5, ("480p", 16): 0.8 * 0.5}
    assert close(shares(guide, 17, K2), wanted)
    assert close(shares(dict(reversed(guide.items())), 16, K2), wanted), "whatever the order in which they are written"
    assert close(shares(guide, 16, (2160, 3840)), {("4k", 16): 0.1, **{k: 0.9 * share for k, share in wanted.items()}})
    assert shares(guide, 15, K2) == {NO_LENGTH: 1.0}
    assert shares(guide, 16, (240, 426)) == {TOO_SMALL: 1.0}


def test_a_bucket_of_0_sends_longer_videos_to_the_next_lower_resolution():
    lower = {"240p": {16: (1.0, 16), 32: (1.0, 8), 64: (1.0, 4), 128: (1.0, 2)}}
    redirect = {**lower, "480p": {16: (1.0, 4), 32: (0.0, None)}, "720p": {16: (0.5, 2)}}
    assert shares(redirect, 31, (480, 854)) == {("480p", 16): 1.0}
    for frames, bucket in ((32, 32), (63, 32), (64, 64), (500, 128)):
        assert shares(redirect, frames, (480, 854)) == {("240p", bucket): 1.0}
    assert close(shares(redirect, 40, (720, 1280)), {("720p", 16): 0.5, ("240p", 32): 0.5})
    assert shares({"480p": {16: (1.0, 4), 32: (0.0, None)}}, 40, (480, 854)) == {STOPPED: 1.0}
    assert shares({**lower, "480p": {16: (1.0, 4)}}, 500, (480, 854)) == {("480p", 16): 1.0}, "without a stop sign"


def test_the_configuration_guides_example():
    guide = {
        "240p": {16: (1.0, 16), 32: (1.0, 8), 64: (1.0, 4), 128: (1.0, 2)},
        "256": {1: (1.0, 256)},
        "512": {1: (1.0, 80)},
        "480p": {1: (1.0, 52), 16: (0.5, 4), 32: (0.0, None)},
        "720p": {16: (1.0, 2), 32: (0.0, None)},
        "1024": {1: (1.0, 20)},
        "1080p": {1: (1.0, 8)},
    }
    assert shares(guide, 20, (1080, 1920)) == {("720p", 16): 1.0}
    assert close(shares(guide, 20, (480, 854)), {("480p", 16): 0.5, ("240p", 16): 0.5})
    assert shares(guide, 100, (1080, 1920)) == {("240p", 64): 1.0}
    for size, name in (((1080, 1920), "1080p"), ((1024, 1024), "1024"), ((480, 854), "480p"), ((512, 512), "512")):
        assert shares(guide, 1, size)[name, 1] == 1.0


def test_image_buckets_take_images_and_nothing_else_does():
    guide = {
        "256": {1: (1.0, 256)},
        "512": {1: (0.8, 80)},
        "480p": {1: (0.5, 52)},
        "1024": {1: (0.5, 20)},
        "1080p": {1: (0.2, 8)},
    }
    wanted, left = {}, 1.0
    for name, keep in (("1080p", 0.2), ("1024", 0.5), ("480p", 0.5), ("512", 0.8), ("256", 1.0)):
        wanted[name, 1], left = left * keep, left * (1 - keep)
    assert close(shares(guide, 1, K2), wanted)
    assert shares(guide, 16, K2) == {NO_LENGTH: 1.0}, "videos never go to buckets of 1 frame"
    assert shares({"256": {16: (1.0, 8)}}, 1, K2) == {NO_LENGTH: 1.0}
    assert shares({"512": {16: (1.0, 8)}, "256": {1: (1.0, 8)}}, 1, K2) == {("256", 1): 1.0}


def test_256_pixels_and_16_frames_only():
    (place,) = Assignment({"256_ar1:1": {16: (1.0, 8)}}, 8, sources((16, (300, 400)))).reachable()
    assert (place.bucket.num_frames, place.bucket.batch_size, place.size) == (16, 8, (256, 256))


# Probabilities and thresholds.


def test_a_pair_has_a_share_for_the_resolution_and_one_for_the_frames():
    pairs = {"720p": {32: ((0.5, 0.3), 1), 16: ((0.6, 1.0), 2)}, "480p": {16: (1.0, 4)}}
    wanted = {("720p", 32): 0.3 * 0.5, ("720p", 16): 0.7 * 0.6, ("480p", 16): 0.3 * 0.5 + 0.7 * 0.4}
    assert close(shares(pairs, 32, (720, 1280)), wanted)
    never = {"720p": {32: ((1.0, 0.0), None), 16: (1.0, 2)}}
    assert shares(never, 32, (720, 1280)) == {("720p", 16): 1.0}, "0 frames: on to fewer, not to the next resolution"
    assert close(shares({"720p": {32: (0.25, 1)}}, 32, (720, 1280)), {("720p", 32): 0.25, NOT_KEPT: 0.75})


@pytest.mark.parametrize("share, enters", [(0.79, False), (0.81, True)])
def test_four_fifths_of_the_pixels_are_enough(share, enters):
    found = shares({"512px": {4: (1.0, 1)}}, 4, (512, round(512 * share)), count=1)
    assert found == ({("512px", 4): 1.0} if enters else {TOO_SMALL: 1.0})


def test_draws_of_rows_and_buckets_are_independent_of_each_other():
    assignment = Assignment({"480p": {16: (0.5, 1)}, "720p": {16: (0.5, 1)}}, 8, sources((16, K2), count=10_000))
    first, again, second = (assignment.draw(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert abs((first == second).mean() - (0.5**2 + 0.25**2 * 2)) < 0.03


@pytest.mark.parametrize(
    "config",
    [
        {"720p": {32: ((0.5, 0.3), 1), 16: ((0.6, 1.0), 2)}, "480p": {16: (1.0, 4), 8: (1.0, 4)}},
        {"720p": {32: ((1.0, 0.3), 1), 16: (1.0, 2)}, "480p": {16: (1.0, 4)}},
        {"720p": {32: (0.0, None), 16: (1.0, 2)}, "480p": {16: (1.0, 4), 1: (1.0, 1)}, "240p": {4: (1.0, 4)}},
        {"720p": {32: ((0.5, 0.0), None), 8: (1.0, 2)}, "480p": {8: (0.5, 4)}, "240p": {8: (1.0, 4), 1: (0.5, 2)}},
    ],
)
def test_the_places_within_reach_are_those_that_draws_find(config):
    clips = [(t, size) for t in (1, 9, 17, 40) for size in (K2, (480, 854), (300, 300))]
    assignment = Assignment(config, 8, sources(*clips, count=100))
    found = set(assignment.draw(np.random.default_rng(0)).tolist())
    assert assignment.reachable() == [assignment.places[number] for number in sorted(found) if number >= 0]


# Sizes.


def test_names_stand_for_numbers_of_pixels():
    known = {"144p": 36_864, "240p": 102_240, "360p": 230_400, "480p": 409_920, "720p": 921_600, "1080p": 2_073_600,
             "2k": 3_686_400, "4K": 8_294_400, "256": 65_536, "256px": 65_536, "768px_ar1:1": 589_824,
             "2048": 4_194_304}  # fmt: skip
    assert {name: count_pixels(name) for name in known} == known
    pixels = list(map(count_pixels, RESOLUTIONS))
    assert pixels == sorted(pixels)


def test_sizes_are_on_the_grid_near_the_number_of_pixels():
    assert bucket_sizes("256px", 16)["16:9"] == (192, 336)
    assert bucket_sizes("256px", 32)["16:9"] == (192, 352)
    assert bucket_sizes("256px", 8)["9:16"] == bucket_sizes("256px", 8)["16:9"][::-1]
    for name, size in (("240p", (240, 426)), ("480p", (480, 854)), ("1080p", (1080, 1920)), ("4k", (2160, 3840))):
        assert bucket_sizes(name, 2)["16:9"] == size, "the table of v1.2"
    for name in RESOLUTIONS:
        for grid in (1, 8, 16, 32):
            sizes = bucket_sizes(name, grid)
            assert len(sizes) == 15 and (not name.endswith("px") or len(set(sizes["1:1"])) == 1)
            for height, width in sizes.values():
                assert height % grid == width % grid == 0
                assert abs(height * width - count_pixels(name)) <= grid * max(height, width)


def test_one_aspect_ratio_or_the_largest():
    assert bucket_sizes("512px_ar1:1", 32) == {"1:1": (512, 512)}
    assert bucket_sizes("256px_AR9:16", 16) == {"9:16": (336, 192)}
    (largest,) = bucket_sizes("256px_max", 16).values()
    assert largest[0] * largest[1] == max(h * w for h, w in bucket_sizes("256px", 16).values())


@pytest.mark.parametrize(
    "size, wanted",
    [((480, 854), (192, 336)), ((854, 480), (336, 192)), ((500, 510), (256, 256)), ((300, 900), (160, 400))],
)
def test_the_nearest_aspect_ratio_wins(size, wanted):
    (place,) = Assignment({"256px": {4: (1.0, 1)}}, 16, sources((4, size))).reachable()
    assert place.size == wanted


# What a config may not say.


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "it must hold buckets in the form"),
        ({"256px": {}}, "bucket 256px: it is {}; it must hold frames"),
        ({"256px": [1, 2]}, "bucket 256px: it is .*must hold frames"),
        ({"256xp": {16: [1.0, 1]}}, "bucket 256xp: there is no resolution '256xp'; did you mean '256px'?"),
        ({"720": {16: [1.0, 1]}, "4kk": {16: [1.0, 1]}}, "no resolution '4kk'; did you mean '4k'?"),
        ({"256px_ar7:3": {16: [1.0, 1]}}, "bucket 256px_ar7:3: _ar7:3 must be _max or _ar with one of .*16:9"),
        ({"256px_min": {16: [1.0, 1]}}, "_min must be _max or _ar"),
        ({"256px_16:9": {16: [1.0, 1]}}, "_16:9 must be _max or _ar"),
        ({"256px": {0: [1.0, 1]}}, "bucket 256px, 0 frames: the number of frames is 0; it must be a whole number"),
        ({"256px": {1.5: [1.0, 1]}}, "1.5 frames: the number of frames is 1.5"),
        ({"256px": {16: 1.0}}, r"16 frames: the entry is 1.0; it must be \[keep_prob, batch_size\]"),
        ({"256px": {16: "(1.0"}}, r"the entry is '\(1.0'; it must be"),
        ({"256px": {16: [1.5, 1]}}, "bucket 256px, 16 frames: keep_prob is 1.5; it must be from 0 to 1"),
        ({"256px": {16: [[0.5, -1], 1]}}, r"keep_prob is \[0.5, -1\]; it must be from 0 to 1, or two"),
        ({"256px": {16: [[0.5], 1]}}, r"keep_prob is \[0.5\]"),
        ({"256px": {16: [True, 1]}}, "keep_prob is True"),
        ({"256px": {16: [float("nan"), 1]}}, "keep_prob is nan"),
        ({"256px": {16: [0.5, None]}}, "bucket 256px, 16 frames: the batch size is None; it must be at least 1"),
        ({"256px": {16: [0.5, 0]}}, "the batch size is 0"),
        ({"256px": {16: [0.0, None]}}, "every keep_prob is 0"),
        ({"4k": {16: [1.0, 1]}, "4K": {16: [0.5, 1]}}, "bucket 4K, 16 frames: it is given twice"),
        ({"256px": {16: [1.0, 1], "16": [0.5, 1]}}, "it is given twice"),
    ],
)
def test_a_wrong_bucket_is_named_with_a_remedy(config, message):
    with pytest.raises(DataError, match=message):
        DataConfig(buckets=config)


def test_a_resolution_smaller_than_a_cell_of_the_models_grid_is_named():
    with pytest.raises(DataError, match="bucket 16px: it has 256 pixels; the model needs at least 32 x 32"):
        bucket_sizes("16px", 32)


@pytest.mark.parametrize("changes", [{"random_frames": True}, {"random_scale": (1.0, 2.0)}])
def test_what_buckets_exclude_is_named(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is .*; it must be .* with buckets"):
        DataConfig(buckets={"256px": {16: [1.0, 1]}}, **changes)


def test_buckets_come_from_yaml_and_the_command_line(tmp_path):
    file = tmp_path / "buckets.yaml"
    file.write_text(
        'data:\n  buckets:\n    "256px_ar1:1": {32: [1.0, 1]}\n    480p: {16: [[0.5, 0.3], 4], 32: [0.0, null]}\n'
    )
    argv = ["--csv_path", "x.csv", "--config", str(file)]
    from_file = read_buckets(parse_config(TrainConfig, "", argv).data.buckets)
    assert [(b.resolution, b.num_frames, b.batch_size, b.keep_prob, b.frames_prob) for b in from_file] == [
        ("480p", 32, 0, 0.0, 1.0),
        ("480p", 16, 4, 0.5, 0.3),
        ("256px_ar1:1", 32, 1, 1.0, 1.0),
    ]
    for written in ('{"512px": {32: [1.0, 2]}}', '{"512px": {"32": [1.0, 2]}}', "{512px: {32: [1, 2]}}"):
        config = parse_config(TrainConfig, "", [*argv, "--data.buckets", written])
        assert [(b.resolution, b.num_frames, b.batch_size) for b in read_buckets(config.data.buckets)] == [
            ("512px", 32, 2)
        ]
    assert parse_config(TrainConfig, "", [*argv, "--data.buckets", "null"]).data.buckets is None
    with pytest.raises(ValueError, match="bucket 512px, 32 frames: keep_prob is 2"):
        parse_config(TrainConfig, "", [*argv, "--data.buckets", "{512px: {32: [2, 2]}}"])


# Steps and epochs.


def schedule(config, clips, world_size=1, seed=0, count=1):
    return BucketSchedule(Assignment(config, 8, sources(*clips, count=count)), seed, world_size)


def rows_of(turn, world_size=1):
    """The numbers of the rows of a step, over all ranks."""
    clips = turn.place.bucket.batch_size * world_size
    return [int(turn.rows[i % len(turn.rows)]) for i in range(turn.batch * clips, (turn.batch + 1) * clips)]


MIXED = {"64px": {1: (1.0, 3), 4: (1.0, 2), 8: (1.0, 1)}}
CLIPS = [(1, (64, 64)), (5, (64, 64)), (9, (64, 64)), (9, (48, 90))]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_comes_once_an_epoch_and_again_only_to_fill_the_last_batch(world_size):
    plan = schedule(MIXED, CLIPS, world_size, count=10)
    per_place = {(1, 3): 10, (4, 2): 10, (8, 1): 10}
    steps = sum(-(-rows // (batch * world_size)) for (_, batch), rows in per_place.items())
    steps += -(-10 // world_size)  # the wide ones, in a bucket of their own
    assert plan.first_step(1) == steps
    kinds = []
    for epoch in range(3):
        turns = [plan.turn(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert {turn.epoch for turn in turns} == {epoch}
        seen = [row for turn in turns for row in rows_of(turn, world_size)]
        assert set(seen) == set(range(40))
        wrapped = sum(
            -(-10 // clips) * clips - 10 for clips in (3 * world_size, 2 * world_size, world_size, world_size)
        )
        assert len(seen) == 40 + wrapped
        kinds.append([turn.place.bucket.num_frames for turn in turns])
    assert kinds[0] != kinds[1] and kinds[0] != sorted(kinds[0]), "shuffled again in each epoch"


def test_one_rank_with_the_doubled_batch_draws_as_two_do():
    doubled = {"64px": {frames: (keep, 2 * batch) for frames, (keep, batch) in MIXED["64px"].items()}}
    one, two = schedule(doubled, CLIPS, 1, count=20), schedule(MIXED, CLIPS, 2, count=20)
    for step in range(60):
        assert rows_of(one.turn(step)) == rows_of(two.turn(step), 2)


def test_rows_are_drawn_again_in_each_epoch_and_any_step_is_found_directly():
    config = {"64px": {4: (0.5, 2)}, "32px": {4: (0.3, 4)}}
    plan = schedule(config, [(4, (64, 64))], seed=5, count=400)
    walked = [plan.turn(step) for step in range(plan.first_step(6))]
    lengths = np.bincount([turn.epoch for turn in walked])
    assert len(set(lengths)) > 1 and abs(lengths.mean() - (200 / 2 + 60 / 4)) < 8
    sets = [{row for turn in walked if turn.epoch == epoch for row in rows_of(turn)} for epoch in range(6)]
    assert len(set(map(frozenset, sets))) == 6 and all(abs(len(found) - 260) < 45 for found in sets)
    for step in (len(walked) - 1, 3, len(walked) // 2):
        found = schedule(config, [(4, (64, 64))], seed=5, count=400).turn(step)
        assert found.epoch == walked[step].epoch and rows_of(found) == rows_of(walked[step])
    assert [rows_of(t) for t in walked] != [
        rows_of(schedule(config, [(4, (64, 64))], 1, 6, 400).turn(step)) for step in range(len(walked))
    ]


def test_a_bucket_that_fills_no_global_batch_is_left_out_with_a_message(caplog):
    config = {"64px": {1: (1.0, 4), 4: (1.0, 2)}, "128px": {4: (0.0, None)}}
    clips = [(1, (64, 64))] * 5 + [(4, (64, 64))] * 4 + [(4, (128, 128))] * 2 + [(2, (64, 64)), (8, (10, 10))]
    with caplog.at_level(logging.INFO):
        plan = schedule(config, clips, world_size=2)
        plan.log()
    assert plan.first_step(1) == 2  # the four videos of 64 x 64 and those that 128px sent on, two ranks by two
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "bucket 64px, 4 x 64 x 64: 6 samples, 2 steps of 2 x 2"
    assert said[1].startswith("buckets leave out of 13 rows, in the first epoch: 1: less than 0.8 of the pixels")
    assert "1: no bucket of its length" in said[1]
    assert "5: fewer than the 8 of a step of bucket 64px, 1 x 64 x 64 (lower batch_size)" in said[1]


def test_no_remaining_rows_is_an_error_with_counts_and_a_remedy():
    config = {"64px": {1: (1.0, 4), 8: (1.0, 2)}, "128px": {8: (0.0, None)}}
    clips = [(1, (64, 64))] * 3 + [(4, (64, 64))] * 2 + [(8, (8, 8))]
    with pytest.raises(DataError) as error:
        schedule(config, clips)
    for part in (
        "nothing is left",
        "1: less than 0.8",
        "(add a lower one)",
        "2: no bucket of its length",
        "3: fewer than the 4 of a step",
        "(lower batch_size)",
    ):
        assert part in str(error.value)
    with pytest.raises(DataError, match="2: not kept by chance .raise keep_prob"):
        schedule({"64px": {4: (1e-9, 1)}}, [(4, (64, 64))] * 2)
    with pytest.raises(DataError, match="1: sent on by a keep_prob of 0"):
        schedule({"64px": {4: (0.0, None), 1: (1.0, 1)}}, [(4, (64, 64))])


# The loader.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight videos of two sizes, 12 frames at 12 per second, two images, a file that is neither; three CSVs of them."""
    folder = tmp_path_factory.mktemp("buckets")
    rng = np.random.default_rng(0)
    names = []
    for v in range(8):
        height, width = (48, 80) if v % 2 else (64, 64)
        clip = np.repeat(rng.integers(0, 255, (12, height // 8, width // 8, 3)), 8, axis=1).repeat(8, axis=2)
        write_video(folder / f"v{v}.mp4", clip.astype(np.uint8), fps=12)
        names.append((f"v{v}.mp4", 12, height, width, 12.0))
    for i in range(2):
        write_image(folder / f"i{i}.png", rng.integers(0, 255, (64, 64, 3)).astype(np.uint8))
        names.append((f"i{i}.png", 1, 64, 64, 0))
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "mindone.csv").write_text("video,caption\n" + "".join(f"{name},x\n" for name, *_ in names))
    (folder / "v1.csv").write_text("path\n" + "".join(f"{name}\n" for name, *_ in names))
    lines = [f"{name},x,{t},{h},{w},{h / w},{h * w},{fps}\n" for name, t, h, w, fps in names]
    (folder / "v2.csv").write_text("path,text,num_frames,height,width,aspect_ratio,resolution,fps\n" + "".join(lines))
    return folder


LOADED = {"64px": {1: [1.0, 2], 4: [0.5, 2], 12: [0.7, 1]}, "32px": {4: [1.0, 2]}}


def load(folder, csv="v2", rank=0, world_size=1, buckets=LOADED, **changes):
    config = DataConfig(buckets=buckets, **{"num_workers": 0, "max_bad_share": 0.5, **changes})
    return ClipLoader(read_index(folder / f"{csv}.csv"), config, 3, rank, world_size, grid=8)


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(some, others):
    return len(some) == len(others) and all(
        (a.step, a.epoch, a.names) == (b.step, b.epoch, b.names) and np.array_equal(a.x, b.x)
        for a, b in zip(some, others)
    )


def test_clips_have_the_size_and_number_of_their_bucket_and_a_run_resumes_anywhere(folder):
    loader = load(folder, flip=True, random_crop=True)
    whole = take(loader, 25)
    assert {batch.x.shape for batch in whole} <= loader.shapes
    assert {batch.x.shape[2] for batch in whole} == {1, 4, 12}
    assert all(np.abs(batch.x).max() <= 1 for batch in whole)
    assert len({batch.epoch for batch in whole}) >= 3
    for start in (1, 7, 19):
        assert same(take(load(folder, flip=True, random_crop=True), 5, start), whole[start : start + 5])
    assert same(take(load(folder, flip=True, random_crop=True, num_workers=3), 12), whole[:12])


def test_the_index_forms_agree_and_only_the_described_one_opens_no_file(folder, monkeypatch):
    opened = take(load(folder, "mindone"), 6)
    assert same(take(load(folder, "v1"), 6), opened)
    with monkeypatch.context() as patch:
        for name in ("open_video", "read_image"):
            patch.setattr(f"mg.data.reader.{name}", lambda *_: 1 / 0)
        described = load(folder, "v2")
        with pytest.raises(ZeroDivisionError):
            load(folder, "v1")
    assert same(take(described, 6), opened)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_are_in_one_bucket_and_together_see_each_row_once_an_epoch(folder, world_size):
    buckets = {"64px": {1: [1.0, 1], 4: [1.0, 2]}}
    loaders = [load(folder, rank=rank, world_size=world_size, buckets=buckets) for rank in range(world_size)]
    steps = loaders[0].steps_per_epoch
    ranks = [take(loader, steps) for loader in loaders]
    for batches in zip(*ranks):
        assert len({batch.x.shape for batch in batches}) == 1
    names = [name for batches in ranks for batch in batches for name in batch.names]
    assert sorted(names) == sorted(row.name for row in read_index(folder / "v2.csv"))
    assert [loader.num_frames(step) for loader in loaders for step in range(steps)] == [
        batch.x.shape[2] for batches in ranks for batch in batches
    ]


def test_two_ranks_read_what_one_reads_with_the_doubled_batch(folder):
    single = {"64px": {4: [1.0, 1], 1: [1.0, 1]}}
    double = {"64px": {4: [1.0, 2], 1: [1.0, 2]}}
    ranks = [take(load(folder, rank=r, world_size=2, buckets=single, flip=True), 10) for r in range(2)]
    for one, first, second in zip(take(load(folder, buckets=double, flip=True), 10), *ranks):
        assert np.array_equal(one.x, np.concatenate([first.x, second.x]))


def test_thinning_and_strides_count_against_the_length(folder):
    def lengths(**changes):
        loader = load(folder, buckets={"64px": {6: [1.0, 1], 3: [1.0, 1], 2: [1.0, 1]}}, **changes)
        return {loader.num_frames(step) for step in range(loader.steps_per_epoch)}

    assert lengths() == {6}
    assert lengths(fps_max=6) == {6} and lengths(fps_max=5) == {3}, "12 frames, every second or third"
    assert lengths(sample_stride=2) == {6} and lengths(sample_stride=4) == {3}
    assert lengths(sample_stride=2, fps_max=6) == {3} and lengths(sample_stride=2, fps_max=5) == {2}
    (batch,) = take(load(folder, buckets={"64px": {6: [1.0, 1]}}, sample_stride=2, max_sample_stride=9), 1)
    assert batch.x.shape[2] == 6


def test_a_square_bucket_gives_the_clips_of_the_plain_settings(folder):
    rows = [row for row in read_index(folder / "v2.csv") if row.name == "v1.mp4"]
    plain = DataConfig(sample_n_frames=12, image_size=40, crop_size=40, image_ratio=0.0, num_workers=0)
    bucket = DataConfig(buckets={"40px_ar1:1": {12: [1.0, 1]}}, num_workers=0)
    (some,), (other,) = (take(ClipLoader(rows, config), 1) for config in (plain, bucket))
    assert np.array_equal(some.x, other.x) and some.x.shape == (1, 3, 12, 40, 40)


def test_an_image_ratio_cuts_that_share_of_the_steps_to_single_frames(folder):
    buckets = {"64px_ar1:1": {4: [1.0, 2], 8: [1.0, 1]}}
    loader = load(folder, buckets=buckets, image_ratio=0.25)
    batches = take(loader, 40)
    assert sum(batch.x.shape[2] == 1 for batch in batches) == 10
    assert {batch.x.shape for batch in batches} == loader.shapes == {(1, 3, 8, 64, 64), (1, 3, 1, 64, 64)}
    assert load(folder, buckets=buckets).shapes == {(1, 3, 8, 64, 64)}, "by default none is"
    names = [name for batch in batches[: loader.steps_per_epoch] for name in batch.names]
    assert sorted(names) == [f"v{v}.mp4" for v in range(8)], "of videos, each once an epoch"


def test_options_without_effect_next_to_buckets_are_named(folder, caplog):
    with caplog.at_level(logging.WARNING):
        load(folder, batch_size=4, sample_n_frames=8)
        load(folder, rank=1, world_size=2, batch_size=4, buckets={"64px": {4: [1.0, 1]}})
    said = [record.getMessage() for record in caplog.records if "overrides" in record.getMessage()]
    assert said == [
        f"data.{name} is {value}, but data.buckets overrides it"
        for name, value in (("sample_n_frames", 8), ("batch_size", 4))
    ]


def test_files_that_cannot_be_opened_count_as_bad_before_the_first_batch(folder, caplog):
    rows = [IndexRow(folder / name, name) for name in ("v0.mp4", "bad.mp4", "none.png", "v2.mp4")]
    config = DataConfig(buckets={"64px": {4: [1.0, 2]}}, num_workers=2, max_bad_share=0.5)
    loader = ClipLoader(rows, config)
    assert set(loader.bad_files) == {"bad.mp4", "none.png"}
    assert sorted(take(loader, 1)[0].names) == ["v0.mp4", "v2.mp4"]
    with pytest.raises(DataError, match="2 of 4 files could not be used, more than max_bad_share = 0.2"):
        ClipLoader(rows, DataConfig(buckets={"64px": {4: [1.0, 2]}}, max_bad_share=0.2))
    with pytest.raises(DataError, match="2 of 2 files could not be used, and none is left"):
        ClipLoader(rows[1:3], DataConfig(buckets={"64px": {4: [1.0, 2]}}, max_bad_share=1.0))


def test_a_row_that_the_index_makes_too_long_is_replaced_by_the_next_of_its_bucket(folder):
    rows = [IndexRow(folder / f"v{v}.mp4", f"v{v}.mp4", "", 99 if v == 0 else 12, 64, 64, 12.0) for v in (0, 2, 4)]
    loader = ClipLoader(
        rows, DataConfig(buckets={"64px": {20: [1.0, 1], 12: [1.0, 3]}}, num_workers=0, max_bad_share=1)
    )
    assert loader.steps_per_epoch == 1 + 0, "the others are fewer than three"
    with pytest.raises(DataError, match="too short: 12 frames, 20 needed"):
        take(loader, 1)
    loader = ClipLoader(rows, DataConfig(buckets={"64px": {12: [1.0, 1]}}, num_workers=0))
    assert sorted(name for batch in take(loader, 3) for name in batch.names) == ["v0.mp4", "v2.mp4", "v4.mp4"]


def test_a_run_compiles_for_no_more_shapes_than_there_are_buckets_and_ratios(tmp_path, caplog):
    buckets = '{"32px": {1: [1.0, 1], 4: [1.0, 1], 12: [[0.7, 0.5], 1]}, "16px": {4: [1.0, 1]}}'
    argv = [*write_data(tmp_path), "--data.buckets", buckets]
    with caplog.at_level(logging.INFO):
        records = short_run(tmp_path / "run", *argv, "--max_steps=24", "--mode=pynative")
    config = DataConfig(buckets=parse_config(TrainConfig, "", argv).data.buckets)
    shapes = ClipLoader(read_index(tmp_path / "train.csv", tmp_path / "videos"), config).shapes
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("shapes of batches")]
    count = int(re.search(r"shapes of batches: (\d+) in 24 updates", said)[1])
    assert len(records) == 24 and 3 <= count <= len(shapes) == 4


# Inference.


EVALUATED = {"64px": {1: [1.0, 2], 8: [1.0, 2], 12: [0.0, None]}, "40px_ar1:1": {4: [1.0, 3]}}


def test_a_row_goes_to_its_buckets_frames_size_and_batch_size_in_the_order_of_the_index(folder):
    rows = read_index(folder / "mindone.csv") + [IndexRow(folder / "bad.mp4", "bad.mp4")]
    failed = {}
    options = ClipOptions(buckets=EVALUATED, num_frames=99, image_size=7, fps_max=6)  # 6 frames are left of each
    clips = list(read_clips(rows, options, lambda index, error: failed.update({index: str(error)}), grid=8))
    assert [clip.index for clip in clips] == list(range(10)) and list(failed) == [10]
    assert {clip.x.shape[1:] for clip in clips[:8]} == {(4, 40, 40)}
    assert [clip.x.shape[1:] for clip in clips[8:]] == [(1, 64, 64)] * 2
    assert [clip.batch_size for clip in clips] == [3] * 8 + [2] * 2
    assert [clip.fps for clip in clips] == [6.0] * 8 + [1.0] * 2
    batches = [(len(batch), size) for batch, size in group_by_shape(clips, 1)]
    assert sorted(batches) == [(2, 2), (2, 3), (3, 3), (3, 3)]
    plain = ClipOptions(num_frames=4, image_size=40, fps_max=6)
    assert np.array_equal(clips[1].x, next(read_clips(rows[1:], plain, None)).x)


def test_a_clip_without_a_bucket_fails_with_the_reason(folder):
    rows, failed = read_index(folder / "mindone.csv"), {}
    options = ClipOptions(buckets={"64px": {12: [0.0, None], 8: [1.0, 1]}, "128px": {1: [1.0, 1]}})
    clips = list(read_clips(rows, options, lambda index, error: failed.update({index: str(error)})))
    assert not clips and list(failed) == list(range(10))
    assert re.search(r"v1.mp4: no bucket takes its 12 frames of 48 x 80: sent on by a keep_prob of 0", failed[1])
    assert re.search(r"i0.png: no bucket takes its 1 frames of 64 x 64: no bucket of its length", failed[8])
    with pytest.raises(DataError, match="bucket 64px, 4 frames: keep_prob is 7"):
        ClipOptions(buckets={"64px": {4: [7, 1]}})


def test_what_chance_keeps_does_not_depend_on_the_other_rows(folder):
    rows, options = read_index(folder / "mindone.csv"), ClipOptions(buckets={"64px": {4: [0.5, 1], 1: [0.5, 1]}})

    def kept(rows):
        return {rows[clip.index].name for clip in read_clips(rows, options, lambda index, error: None)}

    assert 0 < len(kept(rows)) < 10
    assert kept(rows[::2]) | kept(rows[1::2]) == kept(rows) == kept(rows)


def test_videos_and_images_are_reconstructed_in_buckets(folder, tmp_path):
    create_model("two_convs").save_pretrained(tmp_path / "model")
    argv = [
        "--ckpt_path",
        tmp_path / "model",
        "--model.name=two_convs",
        "--csv_path",
        folder / "v2.csv",
        "--mode=pynative",
    ]
    argv += ["--save_dir", tmp_path / "out", "--device=cpu", "--save_videos=false", "--num_workers=1", "--buckets"]
    report = reconstruct_csv(parse_config(InferenceConfig, "", [*map(str, argv), '{"64px_ar1:1": {4: [1.0, 4]}}']))
    assert [(r.frames, r.height, r.width) for r in report.results[:8]] == [(4, 64, 64)] * 8
    assert [result.name for result in report.failed] == ["i0.png", "i1.png"]
    assert all("no bucket of its length" in result.error for result in report.failed)


def test_results_of_other_buckets_are_not_mixed_and_the_report_has_the_same(tmp_path):
    options = ClipOptions(buckets={"64px": {4: [1.0, 1], 8: [0.0, None]}})
    write_settings(tmp_path / "settings.json", {"clips": options.describe()})
    check_settings(tmp_path / "settings.json", {"clips": options.describe()})
    for other in ({"64px": {4: [0.5, 1], 8: [0.0, None]}}, None):
        with pytest.raises(ValueError, match="settings.json"):
            check_settings(tmp_path / "settings.json", {"clips": ClipOptions(buckets=other).describe()})
    command = report_command(InferenceConfig(ModelSection("x"), "x.csv", buckets=options.buckets, fps_max=12.0))
    again = parse_config(BenchmarkConfig, "", shlex.split(command)[1:])
    assert again.describe() == {**options.describe(), "fps_max": 12.0}
