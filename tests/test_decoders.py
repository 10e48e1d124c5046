"""Every container and codec that PyAV can write is read rightly from any frame on, and decord only where it gives the
same frames."""

import itertools
from importlib.util import find_spec

import av
import numpy as np
import pytest
from field_files import encode

from mg.data.errors import VideoError
from mg.data.video import open_video

CONTAINERS = {
    "mp4": {},
    "frag.mp4": {"format": "mp4", "mux": {"movflags": "frag_keyframe+empty_moov"}},
    "mov": {},
    "mkv": {},
    "webm": {},
    "avi": {},
    "ts": {"format": "mpegts"},
    "m2ts": {"format": "mpegts", "mux": {"mpegts_m2ts_mode": "1"}},
    "flv": {},
    "h264": {"format": "h264"},
    "hevc": {"format": "hevc"},
}
X265 = "log-level=error:keyint=8"
CODECS = {
    "h264": ("libx264", {"g": 8, "bf": 0}),
    "h264_b_frames": ("libx264", {"g": 8, "bf": 2}),
    "h264_open_groups": ("libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    "h264_intra_refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}),
    "hevc": ("libx265", {"x265-params": f"{X265}:bframes=0"}),
    "hevc_b_frames": ("libx265", {"x265-params": f"{X265}:bframes=2:open-gop=0"}),
    "hevc_open_groups": ("libx265", {"x265-params": f"{X265}:bframes=3:open-gop=1"}),
    "mpeg4": ("mpeg4", {"g": 8}),
    "mpeg4_b_frames": ("mpeg4", {"g": 8, "bf": 2}),
    "mpeg2": ("mpeg2video", {"g": 8}),
    "mpeg2_b_frames": ("mpeg2video", {"g": 8, "bf": 2}),
    "vp8": ("libvpx", {"g": 8}),
    "vp9": ("libvpx-vp9", {"g": 8, "cpu-used": 5}),
    "av1": ("libsvtav1", {"g": 8, "preset": 12}),
    "mjpeg": ("mjpeg", {}),
    "prores": ("prores_ks", {}),
}
PIX_FMTS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}
NUM_FRAMES = 26
# What decord has to take; whatever else it takes, it has to read rightly too.
FOR_DECORD = {
    f"{codec}.{container}"
    for containers, codecs in (
        (("mp4", "frag.mp4", "mov"), "h264 h264_b_frames hevc hevc_b_frames mpeg4 mpeg2 vp9 mjpeg".split()),
        (("mkv",), "h264 h264_b_frames hevc hevc_b_frames mpeg4 mpeg2 vp8 vp9 mjpeg".split()),
        (("webm",), "vp8 vp9".split()),
    )
    for container, codec in itertools.product(containers, codecs)
} - {"vp9.mov"}  # which nothing writes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """All pairs that can be written and opened again, and their frames in the order in which FFmpeg gives them."""
    folder = tmp_path_factory.mktemp("decoders")
    found = {}
    for (container, how), (name, (codec, options)) in itertools.product(CONTAINERS.items(), CODECS.items()):
        path = folder / f"{name}.{container}"
        try:
            encode(path, NUM_FRAMES, codec, pix_fmt=PIX_FMTS.get(codec, "yuv420p"), **how, **options)
            with av.open(str(path)) as opened:
                frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
        except (av.FFmpegError, ValueError, IndexError):  # not every container takes every codec
            continue
        found[path] = frames
    assert len(found) > 80
    return found


def test_all_frames_are_ffmpegs_and_so_is_a_clip_from_any_of_them(files):
    for path, expected in files.items():
        with open_video(path) as video:
            assert len(expected) == video.num_frames == NUM_FRAMES, path.name
            assert np.array_equal(video.read(range(NUM_FRAMES)), expected), path.name
            for timeline in video.timelines():
                for start in range(0, NUM_FRAMES, 3):
                    clip = [*itertools.islice(video.clip(timeline, start), 2)]
                    assert np.array_equal(clip, expected[start : start + 2]), (path.name, start)


@pytest.mark.skipif(find_spec("decord") is None, reason="no decord wheel here")
def test_decord_takes_only_what_it_reads_as_ffmpeg_does(files):
    order = [*range(NUM_FRAMES), *range(0, NUM_FRAMES, 5)][::-1]
    taken = set()
    for path, expected in files.items():
        try:
            video = open_video(path, "decord")
        except VideoError:
            continue
        taken.add(path.name)
        with video:
            assert video.num_frames == NUM_FRAMES
            assert np.array_equal(video.read(order), [expected[index] for index in order]), path.name
            (timeline,) = video.timelines()
            clip = [*itertools.islice(video.clip(timeline, 5, step=3 / 12), 4)]
            assert np.array_equal(clip, expected[5:15:3]), path.name
    assert taken >= FOR_DECORD
