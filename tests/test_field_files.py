"""Files as they come from the field are read as players show them, or are errors that name them."""

import gc
import itertools
import logging
import re
import struct
import tracemalloc

import av
import cv2
import numpy as np
import pytest
from field_files import FPS, boxes, draw, encode, noisy, picture
from PIL import Image

from mg.benchmark import clip_cost
from mg.data import remarks
from mg.data.clips import ClipOptions, load_clip, read_clips
from mg.data.errors import VideoError, reading
from mg.data.index import IndexRow
from mg.data.loader import ClipLoader, DataConfig
from mg.data.reader import ClipReader
from mg.data.timeline import Timeline
from mg.data.transforms import resize
from mg.data.versions import check_versions
from mg.data.video import open_video, read_image


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """The folder of all files, and what is right for each."""
    folder = tmp_path_factory.mktemp("field")
    return folder, draw(folder)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(remarks, "_said", {})


def config(**changes):
    base = dict(sample_n_frames=8, image_size=64, crop_size=64, image_ratio=0.0, num_workers=0, max_bad_share=1.0)
    return DataConfig(**{**base, **changes})


def row(path, **columns):
    return IndexRow(path, path.name, **columns)


def test_every_file_has_the_frames_that_ffmpeg_shows_or_an_error_that_names_it(field):
    folder, right = field
    assert len(right) > 30
    for name, expected in right.items():
        if expected.error or expected.partial:
            with pytest.raises(VideoError, match=f"{name}: {expected.error or 'cut short or damaged'}"):
                open_video(folder / name).decoded()
            continue
        with open_video(folder / name) as video:
            shown = video.decoded()
            frames = video.read(range(len(shown)))
        assert frames.shape[1:3] == (video.height, video.width) == expected.size, name
        if expected.boxes is not None:
            assert boxes(frames) == [number % 64 for number in expected.boxes], name
        if expected.times is not None:
            assert [round(time * FPS) for time in shown.times] == expected.times, name


def test_a_clip_from_any_frame_on_has_the_frames_of_reading_from_the_beginning(field):
    folder, right = field
    for name, expected in right.items():
        if expected.error or expected.partial:
            continue
        with open_video(folder / name) as video:
            everything = [frame.tobytes() for frame in video.clip()]
            for timeline in video.timelines():
                known = len(timeline) == len(everything)
                for start in {0, 1, len(timeline) // 3, len(timeline) // 2, len(timeline) - 4}:
                    clip = [frame.tobytes() for frame in itertools.islice(video.clip(timeline, start), 4)]
                    places = range(len(everything) - len(clip) + 1) if not known else [start]
                    assert any(everything[at : at + len(clip)] == clip for at in places), (name, start)
                    assert len(clip) == 4 or not known


def test_all_eight_ways_of_a_display_matrix_are_those_of_the_picture(field):
    folder, _ = field
    upright = open_video(folder / "base.mp4").read([7])[0]
    ways = {
        "mirrored": upright[:, ::-1],
        "upside_down": upright[::-1],
        "turned_half": upright[::-1, ::-1],
        "turned_right": np.rot90(upright, -1),
        "turned_left": np.rot90(upright),
        "transposed": upright.transpose(1, 0, 2),
        "transposed_back": np.rot90(upright, 2).transpose(1, 0, 2),
    }
    for name, expected in ways.items():
        assert np.array_equal(open_video(folder / f"{name}.mp4").read([7])[0], expected), name


def test_pixels_that_are_not_square_are_made_so_unless_that_is_switched_off(field):
    folder, _ = field
    coded = open_video(folder / "anamorphic.mp4", square_pixels=False)
    square = open_video(folder / "anamorphic.mp4")
    assert (coded.height, coded.width) == (96, 120) and (square.height, square.width) == (96, 171)
    assert np.array_equal(square.read([3])[0], resize(coded.read([3])[0], 96, 171))
    turned = open_video(folder / "anamorphic_turned.mp4", square_pixels=False)
    assert (turned.height, turned.width) == (120, 96)
    for squared, width in ((True, 114), (False, 80)):
        options = ClipOptions(image_size=64, crop=False, square_pixels=squared)
        assert load_clip(folder / "anamorphic.mp4", options)[0].shape[2:] == (64, width)
    one = row(folder / "anamorphic.mp4")
    buckets = {"64px": {4: [1.0, 1]}}
    assert ClipReader(config(buckets=buckets)).measure(one) == (8, 96, 171), "buckets follow what is shown"
    assert ClipReader(config(buckets=buckets, square_pixels=False)).measure(one) == (8, 96, 120)


def clip_boxes(path, **options):
    """The frames of a clip as inference reads it, by their boxes, and its rate."""
    x, fps = load_clip(path, ClipOptions(image_size=0, crop=False, **options))
    return boxes((x.transpose(1, 2, 3, 0) + 1) * 127.5), fps


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "webm"])
def test_frames_are_thinned_by_time_if_the_rate_varies(field, suffix):
    path = field[0] / f"variable.{suffix}"
    assert clip_boxes(path)[0] == [*range(40)]
    thinned, fps = clip_boxes(path, fps_max=6)
    assert thinned == [*range(0, 30, 2), *range(30, 40)], "the first part is halved, of the slow one all is left"
    assert fps == pytest.approx(24 * FPS / 138, rel=0.01), "plays as long as the video"
    assert clip_boxes(path, frame_stride=6)[0] == [*range(0, 30, 6), *range(30, 40)], "half a second"
    assert clip_boxes(path, frame_stride=2, fps_max=6)[0] == [*range(0, 30, 4), *range(31, 40)]
    with pytest.raises(VideoError, match="of which 25 remain after thinning; 26 are needed|ends after 25 of 26 frames"):
        clip_boxes(path, fps_max=6, num_frames=26)


def test_training_clips_are_taken_by_time_if_the_rate_varies(field):
    for suffix in ("mp4", "mkv"):
        one = row(field[0] / f"variable.{suffix}")
        reader = ClipReader(config(sample_n_frames=12, fps_max=6, image_size=96, crop_size=96))
        seen = set()
        for key in range(30):
            clip = reader.read(one, 12, (96, 96), (key,))
            numbers = boxes((clip.transpose(1, 2, 3, 0) + 1) * 127.5)
            seen.add(numbers[0])
            assert all(b - a == (2 if a < 30 else 1) for a, b in itertools.pairwise(numbers)), numbers
        assert min(seen) < 5 and max(seen) > 20, "from everywhere"


def test_a_clip_too_long_after_thinning_by_time_is_reported(field):
    reader = ClipReader(config(fps_max=6, image_size=96, crop_size=96))
    with pytest.raises(
        VideoError, match="variable.mp4: too short: 40 frames, of which 25 remain after thinning, 26 needed"
    ):
        reader.read(row(field[0] / "variable.mp4"), 26, (96, 96), (0,))


def test_buckets_count_the_frames_left_after_thinning_by_time(field):
    buckets = {"64px": {26: [1.0, 1], 20: [1.0, 1]}}
    for suffix in ("mp4", "mkv", "flv", "webm"):
        one = row(field[0] / f"variable.{suffix}")
        assert ClipReader(config(fps_max=6, buckets=buckets)).measure(one)[0] == 25
        (clip,) = read_clips([one], ClipOptions(fps_max=6, buckets=buckets), None)
        assert clip.x.shape[1] == 20
    assert ClipReader(config(buckets=buckets)).measure(row(field[0] / "dropped.avi"))[0] == 30


def test_training_uses_what_decodes_and_says_how_much_unless_told_otherwise(field, caplog):
    folder, right = field
    broken = [name for name, expected in right.items() if expected.partial]
    assert len(broken) >= 6
    for name in broken:
        with caplog.at_level(logging.WARNING):
            frames = open_video(folder / name, allow_partial=True)
            count = frames.num_frames
        assert count == len(frames.read(range(count))) > 4
        (said,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        assert re.search(rf"{count} of its \d+ frames decode; they are used", said), said
        with pytest.raises(VideoError, match=rf"{name}: cut short or damaged: {count} of its \d+ frames decode"):
            open_video(folder / name).decoded()
    (counted,) = remarks.counts()
    assert counted.endswith(f"decodable frames were used (allow_partial): {len(broken)}")
    rows = [row(folder / name) for name in broken]
    for allowed in (True, False):
        loader = ClipLoader(rows, config(batch_size=len(rows), allow_partial=allowed))
        if allowed:
            assert next(loader.batches()).x.shape[0] == len(rows) and not loader.bad_files
        else:
            with pytest.raises(ValueError, match="cut short or damaged"):
                next(loader.batches())
    failed = {}
    assert not [*read_clips(rows, ClipOptions(), lambda index, error: failed.update({index: str(error)}))]
    assert len(failed) == len(rows), "a benchmark does not, by default"
    assert len([*read_clips(rows, ClipOptions(allow_partial=True), lambda *_: None)]) == len(rows)


def test_remarks_of_workers_are_logged_once_by_the_process_that_started_them(field, caplog):
    folder, _ = field
    rows = [row(folder / name) for name in ("cut.mp4", "base.mp4")]
    for _ in range(2):
        batches = ClipLoader(rows, config(batch_size=2, num_workers=2)).batches()
        [*itertools.islice(batches, 4)]
        batches.close()
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"cut.mp4: 28 of its 48 frames decode; they are used", said)
    assert len(remarks.counts()) == 1


def test_training_goes_through_all_of_them_the_same_with_and_without_workers(field):
    folder, right = field
    rows = [row(folder / name) for name in right]
    alone, many = (ClipLoader(rows, config(batch_size=6, num_workers=n, random_crop=True), seed=1) for n in (0, 2))
    for one, other in itertools.islice(zip(alone.batches(), many.batches()), alone.steps_per_epoch):
        assert one.names == other.names and np.array_equal(one.x, other.x)
    assert alone.bad_files == many.bad_files
    assert "resized.h264" in alone.bad_files
    assert all(re.search("the size (changes at|has changed by) frame", why) for why in alone.bad_files.values())


def test_a_clip_after_a_change_of_size_is_an_error_too(field):
    path = field[0] / "resized.ts"
    assert ClipReader(config()).read(row(path), 2, (64, 64), (3,)).shape == (3, 2, 64, 64), "in front of it"
    with open_video(path) as video, pytest.raises(VideoError, match="resized.ts: the size has changed by frame"):
        next(video.clip(Timeline.regular(40, FPS), 30))


def test_what_was_learned_about_a_file_does_not_change_a_clip(field):
    """A reader that has been through everything, in any order, gives the clips of a fresh one."""
    folder, right = field
    rows = [row(folder / name) for name, expected in right.items() if not expected.error]
    worn = ClipReader(config())
    for one, length in itertools.product(rows, (12, 3)):
        for key in range(3):
            try:
                clip = worn.read(one, length, (64, 64), (key,))
            except VideoError:
                continue
            assert np.array_equal(clip, ClipReader(config()).read(one, length, (64, 64), (key,))), one.name


def test_a_change_of_size_is_a_row_of_its_own_in_inference(field):
    folder, _ = field
    failed = {}
    rows = [row(folder / "resized.h264"), row(folder / "raw.h264"), row(folder / "resized.ts")]
    clips = [*read_clips(rows, ClipOptions(image_size=64), lambda index, error: failed.update({index: str(error)}))]
    assert [clip.index for clip in clips] == [1] and set(failed) == {0, 2}
    assert all("the size changes at frame 20, from 128 x 96 to 160 x 112" in reason for reason in failed.values())


def test_sizes_of_an_index_that_are_not_those_of_the_frames_are_wrong(field):
    folder, _ = field
    buckets = {"64px": {4: [1.0, 1]}}

    def load(name, height, width):
        known = row(folder / name, num_frames=60, height=height, width=width, fps=12.0)
        return ClipReader(config(buckets=buckets)).read(known, 4, (56, 72), (0,))

    assert load("base.mp4", 96, 128).shape == load("base.mp4", 98, 128).shape == (3, 4, 56, 72)
    for name, height, width in (("turned_left.mp4", 96, 128), ("base.mp4", 960, 1280), ("anamorphic.mp4", 96, 120)):
        with pytest.raises(VideoError, match=f"{name}: the index says {width} x {height}, but its frames are"):
            load(name, height, width)
    with pytest.raises(VideoError, match="turned.jpg: the index says 128 x 96, but its frames are 96 x 128"):
        load("turned.jpg", 96, 128)
    plain = row(folder / "turned_left.mp4", height=96, width=128)
    assert ClipReader(config()).read(plain, 4, (64, 64), (0,)).shape == (3, 4, 64, 64), "else nothing hangs on it"


def test_images_with_unreadable_exif_are_not_rotated(field):
    folder, _ = field
    assert read_image(folder / "broken_exif.jpg").shape == (96, 128, 3)
    assert read_image(folder / "turned.jpg").shape == (128, 96, 3)


@pytest.mark.parametrize("error", [struct.error("x"), TypeError("x"), MemoryError(), cv2.error("x"), KeyError("x")])
def test_any_decoder_error_becomes_the_readers_own_error(tmp_path, monkeypatch, error):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    encode(tmp_path / "a.mp4", 3)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(VideoError, match="a.png: not an image that can be decoded"):
        read_image(tmp_path / "a.png")
    monkeypatch.setattr("mg.data.decoding.resize", fail)
    with pytest.raises(VideoError, match="a.mp4: frames do not decode"):
        open_video(tmp_path / "a.mp4").read([0])
    with pytest.raises(VideoError, match="a.mp4: frames do not decode"):
        next(open_video(tmp_path / "a.mp4").clip())
    monkeypatch.setattr("mg.data.transforms.to_video_tensor", fail)
    with pytest.raises(VideoError, match="a.mp4"):
        ClipReader(config()).read(row(tmp_path / "a.mp4"), 3, (64, 64), (0,))
    with pytest.raises(VideoError, match="first"), reading("first"):
        raise VideoError("first")


def hdr(path, transfer):
    """A grey ramp from left to right above a colour, in PQ (16) or HLG (18)."""

    def ramp(i, height, width):
        frame = np.empty((height, width, 3), np.uint8)
        frame[:] = np.linspace(0, 200, width).astype(np.uint8)[None, :, None]
        frame[: height // 2] = (150, 60, 60)
        return frame

    options = {"x265-params": "log-level=error"}
    return encode(path, 3, "libx265", pix_fmt="yuv420p10le", transfer=transfer, frames=ramp, **options)


@pytest.mark.parametrize("transfer, curve", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_mapped_to_sdr_or_a_message_says_that_it_is_pale(tmp_path, monkeypatch, caplog, transfer, curve):
    path = hdr(tmp_path / "hdr.mp4", transfer)
    mapped = open_video(path).read([0])[0]
    assert not caplog.records

    def refuse(frame):
        raise ValueError("no such option")

    monkeypatch.setattr("mg.data.decoding.ToneMapper", refuse)
    plain = open_video(path).read([0, 1])[0]
    open_video(path).read([2])
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"hdr.mp4: HDR ({curve})" in said
    assert remarks.counts() == ["HDR files that were read without tone mapping, and are pale: 1"]
    ramp = mapped[-8].astype(int)
    assert np.ptp(ramp, axis=1).max() <= 6, "grey stays grey"
    assert np.all(np.diff(ramp.mean(axis=1)) > -3) and ramp.max() > 150, "and rises"
    colorful = [np.ptp(picture[8, 40].astype(int)) for picture in (plain, mapped)]
    assert colorful[1] > colorful[0] + 10, "colours are no longer pale"


def test_ordinary_video_is_not_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("mg.data.decoding.ToneMapper", lambda frame: 1 / 0)
    encode(tmp_path / "sdr.mp4", 2)
    assert open_video(tmp_path / "sdr.mp4").read([1]).shape == (1, 96, 128, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_clip_of_a_long_file_reads_little_of_it(tmp_path, suffix):
    if clip_cost.bytes_read() is None:
        pytest.skip("Linux counts what a process reads")
    short = encode(tmp_path / "short.mp4", 24, frames=noisy, size=(192, 256), g=12, crf=10)
    long = clip_cost.repeat(short, tmp_path / f"long.{suffix}", clip_cost.FORMATS[suffix], 30)
    reader, size = ClipReader(config()), long.stat().st_size
    assert size > 8 * 2**20
    for key in range(4):  # a file that is new, and one that is known
        before = clip_cost.bytes_read()
        reader.read(row(long), 8, (64, 64), (key,))
        assert clip_cost.bytes_read() - before < 0.4 * size
    with open_video(long) as video:
        timeline = next(video.timelines())
        assert len(timeline) == 24 * 30
        next(video.clip(timeline, 500))
        assert not video.facts.found, "nothing was read through"


def test_frames_are_never_all_in_memory_at_full_size(tmp_path):
    path = encode(tmp_path / "large.mp4", 20, size=(480, 640))
    reader = ClipReader(config())
    reader.read(row(path), 16, (64, 64), (0,))
    tracemalloc.start()
    try:
        reader.read(row(path), 16, (64, 64), (1,))
        load_clip(path, ClipOptions(image_size=64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 480 * 640 * 3


def test_frames_are_freed_as_soon_as_they_are_scaled(tmp_path):
    """PyAV keeps frames whose side data was looked at until the garbage collector comes by."""
    path = encode(tmp_path / "clip.mp4", 20, bf=0)
    gc.collect()
    gc.disable()
    before = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    try:
        for _ in open_video(path).clip(size=(8, 8)):
            pass
        kept = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert kept - before <= 2


def test_an_old_pyav_is_reported_once_in_one_line(tmp_path, monkeypatch, caplog):
    path = encode(tmp_path / "clip.mp4", 2)
    monkeypatch.setattr("av.__version__", "16.1.0")
    check_versions.cache_clear()
    for _ in range(2):
        open_video(path)
    ClipLoader([row(path)], config())
    check_versions.cache_clear()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("PyAV 16.1.0: it converts BT.709") and "pip install -U 'av>=17'" in said and "\n" not in said


def test_colors_of_bt709_come_back(tmp_path):
    """(200, 30, 30) was (185, 11, 31) with old versions of PyAV."""
    path = tmp_path / "bt709.mp4"
    color = np.full((64, 64, 3), (200, 30, 30), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1
        frame = av.VideoFrame.from_ndarray(color, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace=1)))
        container.mux(stream.encode())
    assert np.abs(open_video(path).read([0])[0].astype(int) - color).max() <= 3
