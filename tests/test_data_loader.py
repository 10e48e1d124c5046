"""Batches depend only on seed, step, rank and world size, and broken files cost no more than a warning."""

import logging
from itertools import islice
from threading import active_count

import numpy as np
import psutil
import pytest

from mg.data import DataError
from mg.data.index import IndexRow
from mg.data.loader import ClipLoader, DataConfig
from mg.data.video import write_image, write_video

NUM_VIDEOS, NUM_IMAGES = 7, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos whose frames say by their grey level, 20 apart, which they are; images; files that are neither."""
    folder = tmp_path_factory.mktemp("data")
    ramp = np.linspace(0, 20, 56, dtype=np.uint8)[None, :, None]
    for v in range(NUM_VIDEOS):
        frames = np.stack([np.full((40, 56, 3), 20 + v + 20 * t, np.uint8) + ramp for t in range(10)])
        write_video(folder / f"v{v}.mp4", frames, fps=12)
    for i in range(NUM_IMAGES):
        write_image(folder / f"i{i}.png", np.random.default_rng(i).integers(0, 255, (40, 60, 3)).astype(np.uint8))
    for name, data in {"empty.mp4": b"", "text.mp4": b"hello " * 50, "empty.png": b""}.items():
        (folder / name).write_bytes(data)
    return folder


def rows_of(folder, *names):
    return [IndexRow(folder / name, name) for name in names]


def videos(folder):
    return rows_of(folder, *(f"v{v}.mp4" for v in range(NUM_VIDEOS)))


def mixed(folder):
    return videos(folder) + rows_of(folder, *(f"i{i}.png" for i in range(NUM_IMAGES)))


def config(**changes):
    base = dict(sample_n_frames=4, image_size=32, crop_size=24, random_crop=True, flip=True, batch_size=2)
    return DataConfig(**{**base, "num_workers": 0, "max_bad_share": 1.0, **changes})


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def assert_equal(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others):
        assert (a.step, a.epoch, a.names) == (b.step, b.epoch, b.names)
        assert np.array_equal(a.x, b.x)


def test_shapes_and_range(folder):
    batches = take(ClipLoader(mixed(folder), config(image_ratio=0.25, image_batch_size=3)), 8)
    assert [batch.x.shape for batch in batches[:4]] == [(2, 3, 4, 24, 24)] * 3 + [(3, 3, 1, 24, 24)]
    assert all(batch.x.dtype == np.float32 and np.abs(batch.x).max() <= 1 for batch in batches)
    assert [batch.step for batch in batches] == list(range(8))


def test_a_run_resumes_exactly(folder):
    whole = take(ClipLoader(mixed(folder), config(), seed=3), 12)
    assert_equal(take(ClipLoader(mixed(folder), config(), seed=3), 5, start=7), whole[7:])
    other_seed = take(ClipLoader(mixed(folder), config(), seed=4), 12)
    assert [batch.names for batch in other_seed] != [batch.names for batch in whole]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(folder, num_workers):
    rows = mixed(folder) + rows_of(folder, "empty.mp4", "text.mp4", "empty.png", "none.mp4")
    alone, many = (ClipLoader(rows, config(num_workers=n), seed=1) for n in (0, num_workers))
    assert_equal(take(many, 12), take(alone, 12))
    assert many.bad_files == alone.bad_files and alone.bad_files


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch(folder, world_size):
    cfg = config(image_ratio=0.0, batch_size=2)
    loaders = [ClipLoader(videos(folder), cfg, 0, rank, world_size) for rank in range(world_size)]
    steps = loaders[0].steps_per_epoch
    assert steps == -(-NUM_VIDEOS // (2 * world_size))
    per_epoch = []
    for epoch in range(2):
        names = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            for loader in loaders:
                (batch,) = take(loader, 1, step)
                assert batch.epoch == epoch
                names += batch.names
        assert set(names) == {f"v{v}.mp4" for v in range(NUM_VIDEOS)}
        assert len(set(names[:NUM_VIDEOS])) == NUM_VIDEOS or world_size > 1
        assert len(names) == steps * 2 * world_size, "only wrapping round to a whole batch repeats rows"
        per_epoch.append(names)
    assert per_epoch[0] != per_epoch[1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_image_ratio_holds_on_any_number_of_ranks(folder, world_size):
    loaders = [ClipLoader(mixed(folder), config(image_ratio=0.2), 0, r, world_size) for r in range(world_size)]
    kinds = [[loader.is_image_step(step) for step in range(1000)] for loader in loaders]
    assert all(kind == kinds[0] for kind in kinds)
    assert sum(kinds[0]) == 200
    assert all(sum(kinds[0][start : start + 10]) == 2 for start in range(990)), "evenly spread"
    shapes = {take(loader, 1, start=4)[0].x.shape for loader in loaders}
    assert shapes == {(2, 3, 1, 24, 24)}


def test_an_epoch_of_steps_shows_every_video(folder):
    loader = ClipLoader(mixed(folder), config(image_ratio=0.2))
    assert loader.steps_per_epoch == 5  # four video steps of two and an image step
    batches = take(loader, 10)
    assert [batch.epoch for batch in batches] == [0] * 5 + [1] * 5
    for epoch in (0, 1):
        clips = [name for batch in batches if batch.epoch == epoch and batch.x.shape[2] > 1 for name in batch.names]
        assert set(clips) == {f"v{v}.mp4" for v in range(NUM_VIDEOS)}


def test_image_steps_use_images_and_frames_of_videos(folder):
    loader = ClipLoader(mixed(folder), config(image_ratio=1.0))
    names = [name for batch in take(loader, loader.steps_per_epoch) for name in batch.names]
    assert sorted(names) == sorted(row.name for row in mixed(folder))


def test_video_steps_use_videos_only(folder):
    names = {name for batch in take(ClipLoader(mixed(folder), config(image_ratio=0.0)), 10) for name in batch.names}
    assert names == {f"v{v}.mp4" for v in range(NUM_VIDEOS)}


def test_images_by_themselves_make_image_steps(folder):
    loader = ClipLoader(rows_of(folder, "i0.png", "i1.png"), config(image_ratio=0.2))
    assert loader.steps_per_epoch == 1
    assert all(batch.x.shape == (2, 3, 1, 24, 24) for batch in take(loader, 4))


def frame_numbers(x):
    """Which frames of v0.mp4 stand in a clip (3, T, H, W), by their mean grey level."""
    levels = (x.mean(axis=(0, 2, 3)) + 1) * 127.5
    return np.rint((levels - 30) / 20).astype(int).tolist()


def test_clips_start_anywhere_and_take_every_stride(folder):
    cfg = dict(image_ratio=0.0, batch_size=1, random_crop=False, image_size=40, crop_size=40, flip=False)
    clips = [frame_numbers(b.x[0]) for b in take(ClipLoader(rows_of(folder, "v0.mp4"), config(**cfg)), 40)]
    assert {clip[0] for clip in clips} == set(range(7))
    assert all(np.diff(clip).tolist() == [1, 1, 1] for clip in clips)
    cfg.update(sample_stride=2, max_sample_stride=9)
    clips = [frame_numbers(b.x[0]) for b in take(ClipLoader(rows_of(folder, "v0.mp4"), config(**cfg)), 40)]
    assert {tuple(np.diff(clip)) for clip in clips} == {(2, 2, 2), (3, 3, 3)}, "as long as ten frames allow"


@pytest.mark.parametrize(
    "limits, steps",
    [
        (dict(fps_max=12), {1}),  # the videos have 12 frames per second
        (dict(fps_max=11), {2}),
        (dict(fps_max=4), {3}),
        (dict(sample_n_frames=2, sample_stride=2, fps_max=5), {6}),
        (dict(sample_n_frames=2, max_sample_stride=9, fps_max=5), {3, 6, 9}),
    ],
)
def test_fast_videos_are_thinned_to_every_nth_frame(folder, limits, steps):
    cfg = dict(image_ratio=0.0, batch_size=1, random_crop=False, image_size=40, crop_size=40, flip=False, **limits)
    clips = [frame_numbers(b.x[0]) for b in take(ClipLoader(rows_of(folder, "v0.mp4"), config(**cfg)), 40)]
    assert {step for clip in clips for step in np.diff(clip)} == steps
    assert {clip[0] for clip in clips} >= set(range(10 - max(steps) * (len(clips[0]) - 1))), "from anywhere"


def test_a_clip_too_short_once_it_is_thinned_is_counted(folder):
    loader = ClipLoader(rows_of(folder, "v0.mp4"), config(sample_n_frames=5, fps_max=4, image_ratio=0.0))
    with pytest.raises(DataError, match="too short: 10 frames, 13 needed"):
        take(loader, 1)


def test_random_numbers_of_frames_are_a_function_of_seed_and_step_for_all_clips_and_ranks(folder):
    cfg = config(image_ratio=0.2, random_frames=True, sample_n_frames=5)
    loaders = [ClipLoader(mixed(folder), cfg, 3, rank, world_size=2) for rank in range(2)]
    drawn = [loaders[0].num_frames(step) for step in range(200)]
    assert drawn == [loaders[1].num_frames(step) for step in range(200)]
    assert drawn != [ClipLoader(mixed(folder), cfg, 4).num_frames(step) for step in range(200)]
    videos_only = [frames for step, frames in enumerate(drawn) if not loaders[0].is_image_step(step)]
    assert len(videos_only) == 160 and len(drawn) - len(videos_only) == 40
    assert all(drawn[step] == 1 for step in range(200) if loaders[0].is_image_step(step))
    counts = np.bincount(videos_only, minlength=6)
    assert counts[0] == 0 and len(counts) == 6 and counts[1:].min() > 16  # 32 each on average
    for loader in loaders:
        whole = take(loader, 8)
        assert [batch.x.shape for batch in whole] == [(2, 3, frames, 24, 24) for frames in drawn[:8]]
        assert_equal(take(loader, 3, start=5), whole[5:])


def test_a_video_need_be_no_longer_than_the_frames_that_are_drawn(folder):
    loader = ClipLoader(rows_of(folder, "v0.mp4"), config(random_frames=True, sample_n_frames=12, image_ratio=0.0))
    lengths = [loader.num_frames(step) for step in range(40)]
    assert max(lengths) == 12 and 10 in lengths
    for step, length in enumerate(lengths):
        if length <= 10:
            assert take(loader, 1, step)[0].x.shape[2] == length
    with pytest.raises(DataError, match="too short: 10 frames, 12 needed"):
        take(loader, 1, lengths.index(12))


def test_what_is_drawn_from_a_clip_does_not_depend_on_its_length(folder):
    """The number of frames has a generator of its own: a clip of one length starts anywhere."""
    cfg = dict(image_ratio=0.0, batch_size=1, random_crop=False, image_size=40, crop_size=40, flip=False)
    loader = ClipLoader(rows_of(folder, "v0.mp4"), config(**cfg, random_frames=True, sample_n_frames=4))
    steps = [step for step in range(160) if loader.num_frames(step) == 2]
    assert {frame_numbers(take(loader, 1, step)[0].x[0])[0] for step in steps} == set(range(9))


def test_bad_files_are_named_once_and_replaced(folder, caplog):
    rows = rows_of(folder, "v0.mp4", "empty.mp4", "text.mp4", "v1.mp4")
    loader = ClipLoader(rows, config(image_ratio=0.0))
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 3 * loader.steps_per_epoch)
    names = [name for batch in batches for name in batch.names]
    assert set(names) == {"v0.mp4", "v1.mp4"}
    # Each epoch has v0 once, and v1 for itself and for the two before it.
    assert names.count("v1.mp4") == 9
    assert set(loader.bad_files) == {"empty.mp4", "text.mp4"}
    assert "empty" in loader.bad_files["empty.mp4"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_too_many_bad_files_stop_the_run(folder):
    rows = mixed(folder) + rows_of(folder, "empty.mp4", "text.mp4")
    loader = ClipLoader(rows, config(max_bad_share=0.1, num_workers=2))
    with pytest.raises(DataError, match="2 of 12 files could not be used, more than max_bad_share = 0.1") as error:
        take(loader, 100)
    assert "empty.mp4" in str(error.value) and "text.mp4" in str(error.value)
    assert take(ClipLoader(rows, config(max_bad_share=0.2)), 30)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_but_bad_files_is_an_error(folder, share):
    loader = ClipLoader(rows_of(folder, "empty.mp4", "text.mp4"), config(max_bad_share=share, image_ratio=0.0))
    with pytest.raises(DataError, match="of 2 files could not be used"):
        take(loader, 1)


def test_a_clip_too_short_is_counted(folder):
    loader = ClipLoader(rows_of(folder, "v0.mp4"), config(sample_n_frames=4, sample_stride=4, image_ratio=0.0))
    with pytest.raises(DataError, match="too short: 10 frames, 13 needed"):
        take(loader, 1)
    assert take(ClipLoader(rows_of(folder, "v0.mp4"), config(sample_n_frames=4, sample_stride=3, image_ratio=0)), 1)


def test_closing_ends_the_workers(folder):
    threads, processes = active_count(), len(psutil.Process().children())
    batches = ClipLoader(videos(folder), config(num_workers=2)).batches()
    next(batches)
    assert len(psutil.Process().children()) == processes + 2
    batches.close()
    assert (active_count(), len(psutil.Process().children())) == (threads, processes)


def test_random_scale_sets_how_much_of_the_image_is_seen(tmp_path):
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    write_image(tmp_path / "ramp.png", ramp)
    cfg = dict(random_scale=(1.0, 4.0), crop_size=40, flip=False, batch_size=1, image_size=40)
    drawn = take(ClipLoader(rows_of(tmp_path, "ramp.png"), config(**cfg)), 60)
    seen = [np.ptp(batch.x) * 127.5 for batch in drawn]  # the width in the photograph, in pixels
    assert min(seen) < 65 and max(seen) > 150
    cfg.update(random_scale=(50.0, 50.0))
    (batch,) = take(ClipLoader(rows_of(tmp_path, "ramp.png"), config(**cfg)), 1)
    assert np.ptp(batch.x) * 127.5 == pytest.approx(39, abs=0.01), "never enlarged beyond its own pixels"


def test_color_jitter_changes_colours_only_when_asked(folder):
    rows = rows_of(folder, "i0.png")
    plain, jittered = (take(ClipLoader(rows, config(color_jitter=on)), 4) for on in (False, True))
    assert not any(np.allclose(a.x, b.x) for a, b in zip(plain, jittered))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_n_frames": 0},
        {"batch_size": 0},
        {"image_batch_size": 0},
        {"sample_stride": 3, "max_sample_stride": 2},
        {"fps_max": 0.0},
        {"num_workers": -1},
        {"image_ratio": 1.5},
        {"max_bad_share": -0.1},
        {"crop_size": 64},
        {"random_scale": (0.5, 2.0)},
    ],
)
def test_settings_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=f"{list(changes)[-1]} is .*; it must be"):
        config(**changes)


def test_no_rows_and_wrong_ranks_are_refused(folder):
    with pytest.raises(DataError, match="no row"):
        ClipLoader([], config())
    with pytest.raises(ValueError, match="rank is 2"):
        ClipLoader(videos(folder), config(), rank=2, world_size=2)
