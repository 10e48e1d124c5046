"""The clips of the quickstart: real content, natural motion, nothing shared between train and test, same every time."""

import itertools

import cv2
import numpy as np
import pytest

from mg.data import DataError
from mg.data.index import read_index
from mg.data.synthetic import (
    MOTIONS,
    SUBJECTS,
    TEST_PHOTOGRAPHS,
    TRAIN_PHOTOGRAPHS,
    ClipSettings,
    draw_clip,
    make_clips,
    make_images,
    read_photograph,
)
from mg.data.video import open_video, read_image

SETTINGS = ClipSettings(size=64, num_frames=8, train_clips=5, test_clips=3)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    assert make_clips(folder, SETTINGS)
    return folder


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_indexes_list_readable_clips(clips):
    for split, count in (("train", 5), ("test", 3)):
        rows = read_index(clips / f"{split}.csv")
        assert len(rows) == count and all(row.caption for row in rows)
        for row in rows:
            reader = open_video(row.path)
            assert (reader.num_frames, reader.height, reader.width, reader.fps) == (8, 64, 64, 12)


def test_train_and_test_share_no_photograph(clips):
    assert not set(TRAIN_PHOTOGRAPHS) & set(TEST_PHOTOGRAPHS)
    names = {
        split: {SUBJECTS[photograph] for photograph in photographs}
        for split, photographs in (("train", TRAIN_PHOTOGRAPHS), ("test", TEST_PHOTOGRAPHS))
    }
    for split, others in (("train", "test"), ("test", "train")):
        for number in range(24):
            _, caption = draw_clip(TRAIN_PHOTOGRAPHS if split == "train" else TEST_PHOTOGRAPHS, number, SETTINGS)
            shown = {part.removeprefix("a piece of ").removesuffix(" passes in front") for part in caption.split(", ")}
            assert shown & names[split] and not shown & names[others]


@pytest.mark.parametrize("name", [*TRAIN_PHOTOGRAPHS, *TEST_PHOTOGRAPHS])
def test_every_photograph_is_in_the_package(name):
    photograph = read_photograph(name)
    assert photograph.shape[2] == 3 and min(photograph.shape[:2]) >= 128


def test_every_motion_moves_smoothly():
    for number, motion in enumerate(MOTIONS):
        clip, caption = draw_clip(TRAIN_PHOTOGRAPHS, number, ClipSettings(size=128, num_frames=10, motions=[motion]))
        assert clip.shape == (10, 128, 128, 3) and clip.dtype == np.uint8
        fastest = [np.percentile(np.linalg.norm(flow, axis=-1), 98) for flow in flows(clip)]
        assert min(fastest) > 0.1 and max(fastest) < 4, (caption, fastest)


def flows(clip):
    """The optical flow from each frame to the next, columns and rows."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    return [cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 21, 5, 7, 1.5, 0) for a, b in itertools.pairwise(grey)]


@pytest.mark.parametrize("motion", ["pan", "zoom", "rotation", "pan and zoom"])
def test_captions_say_how_the_camera_moves(motion):
    settings = ClipSettings(size=128, num_frames=6, motions=[motion], directions=4)
    rows, columns = np.mgrid[-63.5:64, -63.5:64]
    said = set()
    for number in range(12):
        clip, caption = draw_clip(("astronaut.png", "motorcycle_left.png"), number, settings)
        subject, movement = caption.split(", the camera ")
        assert subject == ("a motorcycle" if number % 2 else "an astronaut")
        x, y = np.mean(flows(clip), axis=0).transpose(2, 0, 1)  # a camera sees all move the other way
        seen = []
        if "pan" in motion:
            most, names = max((x.mean(), ("right", "left")), (y.mean(), ("down", "up")), key=lambda pair: abs(pair[0]))
            seen.append(f"moves {names[int(most > 0)]}")
        if "zoom" in motion:
            seen.append("zooms " + ("in" if (x * columns + y * rows).mean() > 0 else "out"))
        if motion == "rotation":
            seen.append("turns " + ("clockwise" if (x * rows - y * columns).mean() > 0 else "counterclockwise"))
        assert movement == " and ".join(seen)
        said.add(movement)
    assert len(said) >= 2


def test_captions_mention_slow_cameras_and_passing_objects():
    settings = ClipSettings(size=32, num_frames=2, motions=["object"])
    _, caption = draw_clip(("moon.png", "grass.png"), 0, settings)
    assert caption == "the moon, the camera hardly moves, a piece of grass passes in front"


def test_clips_show_the_photographs_and_motions_that_are_chosen(tmp_path):
    chosen = {"photographs": ["moon.png"], "motions": ["zoom"]}
    assert make_clips(tmp_path, ClipSettings(size=32, num_frames=2, train_clips=3, test_clips=1, **chosen))
    captions = [row.caption for row in read_index(tmp_path / "train.csv")]
    assert all(caption.startswith("the moon, the camera zooms ") for caption in captions)
    assert read_index(tmp_path / "test.csv")[0].caption.startswith("a cat, the camera zooms ")


@pytest.mark.parametrize("chosen", [{"motions": ["pam"]}, {"photographs": ["mon.png"]}, {"motions": []}])
def test_unknown_motions_and_photographs_are_named(chosen):
    with pytest.raises(DataError, match="did you mean '(pan|moon.png)'|motions is empty; it must have some of pan"):
        ClipSettings(**chosen)


def test_what_passes_in_front_is_of_another_photograph():
    with pytest.raises(DataError, match="photographs must be at least two"):
        ClipSettings(photographs=["moon.png"], motions=["object"])


def test_same_settings_same_bytes_and_other_seed_other_clips(clips, tmp_path):
    assert make_clips(tmp_path / "again", SETTINGS)
    assert files(tmp_path / "again") == files(clips)
    other, _ = draw_clip(TRAIN_PHOTOGRAPHS, 0, ClipSettings(size=64, num_frames=8, seed=1))
    assert not np.array_equal(other, draw_clip(TRAIN_PHOTOGRAPHS, 0, SETTINGS)[0])


def test_a_second_run_does_nothing_unless_something_is_missing(tmp_path):
    settings = ClipSettings(size=32, num_frames=2, train_clips=1, test_clips=1)
    assert make_clips(tmp_path, settings)
    assert not make_clips(tmp_path, settings)
    (tmp_path / "videos" / "test_000.mp4").unlink()
    assert make_clips(tmp_path, settings)
    assert make_clips(tmp_path, ClipSettings(size=48, num_frames=2, train_clips=1, test_clips=1))
    assert open_video(tmp_path / "videos" / "test_000.mp4").width == 48


def test_an_interrupted_run_is_not_taken_for_a_complete_one(tmp_path, monkeypatch):
    small, large = (ClipSettings(size=size, num_frames=2, train_clips=1, test_clips=1) for size in (32, 48))
    assert make_clips(tmp_path, small)
    with monkeypatch.context() as patch:
        patch.setattr("mg.data.synthetic.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_clips(tmp_path, large)
    assert make_clips(tmp_path, small), "the small clips were overwritten, whatever the old manifest said"


def test_images_are_the_train_photographs(tmp_path):
    assert make_images(tmp_path) and not make_images(tmp_path)
    rows = read_index(tmp_path / "images.csv")
    assert len(rows) == len(TRAIN_PHOTOGRAPHS)
    assert np.array_equal(read_image(rows[0].path), read_photograph(TRAIN_PHOTOGRAPHS[0]))


@pytest.mark.parametrize("changes", [{"size": 33}, {"num_frames": 0}, {"fps": 0}, {"train_clips": -1}, {"closest": 1}])
def test_settings_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is"):
        ClipSettings(**changes)
