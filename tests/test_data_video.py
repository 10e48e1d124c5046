"""Videos and images come in and go out right, on both decoders; a file at fault is named."""

import struct
import subprocess
import sys
from importlib.util import find_spec

import av
import cv2
import numpy as np
import pytest

from mg.data.errors import VideoError
from mg.data.timeline import frame_interval
from mg.data.transforms import resize
from mg.data.video import is_image, open_video, read_image, write_image, write_video

BACKENDS = [
    "av",
    pytest.param("decord", marks=pytest.mark.skipif(find_spec("decord") is None, reason="no decord wheel here")),
]


def moving_frames(num_frames=10, height=40, width=56, seed=0):
    """A smooth picture that moves two pixels per frame, uint8 (T, H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(40, 215, (4, 6, 3)).astype(np.uint8)
    picture = cv2.resize(coarse, (width + 2 * num_frames, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([picture[:, 2 * i : 2 * i + width] for i in range(num_frames)])


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", options=None):
    """Write with settings that write_video does not offer."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving_frames(), fps=12.5)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_written_video_reads_back(video, backend):
    with open_video(video, backend) as reader:
        assert (reader.num_frames, reader.height, reader.width, reader.fps) == (10, 40, 56, 12.5)
        frames = reader.read(range(10))
    assert frames.dtype == np.uint8 and frames.shape == (10, 40, 56, 3)
    assert psnr(frames, moving_frames()) > 34


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_come_in_the_order_asked_for(video, backend):
    reader = open_video(video, backend)
    everything = reader.read(range(10))
    assert np.array_equal(reader.read([7, 2, 2, 9]), everything[[7, 2, 2, 9]])
    assert reader.read([]).shape == (0, 40, 56, 3)
    with pytest.raises(VideoError, match="frame 10 was requested, but there are 10"):
        reader.read([0, 10])


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_scaled_as_they_are_decoded_are_those_that_are_scaled_later(tmp_path, backend):
    path = tmp_path / "clip.mp4"
    encode(path, moving_frames(24, 64, 96), options={"g": "9", "bf": "2"})
    for indices in (range(5, 22), range(1, 24, 5), [20, 3, 3, 11, 4]):
        with open_video(path, backend) as one, open_video(path, backend) as other:
            later = np.stack([resize(frame, 24, 40) for frame in other.read(indices)])
            assert np.array_equal(one.read(indices, (24, 40)), later)


@pytest.mark.parametrize(
    "name, codec, pix_fmt, options",
    [
        ("key_frames.mp4", "libx264", "yuv420p", {"g": "4", "bf": "2"}),
        ("open_gop.mp4", "libx264", "yuv420p", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
        ("ten_bit.mp4", "libx264", "yuv420p10le", {}),
        ("no_index.mkv", "libx264", "yuv420p", {}),
        ("old.avi", "mpeg4", "yuv420p", {"q": "2"}),
        ("web.webm", "libvpx-vp9", "yuv420p", {}),
        ("raw.h264", "libx264", "yuv420p", {}),
    ],
)
def test_a_frame_is_the_same_read_singly_and_in_sequence(tmp_path, name, codec, pix_fmt, options):
    path = tmp_path / name
    encode(path, moving_frames(30), codec, pix_fmt, options)
    everything = open_video(path, "av").read(range(30))
    assert psnr(everything, moving_frames(30)) > 26
    for index in (0, 5, 9, 14, 29):
        assert np.array_equal(open_video(path).read([index])[0], everything[index])


def test_rotation_in_the_file_is_applied(video, tmp_path):
    upright = open_video(video, "av").read(range(10))
    data = bytearray(video.read_bytes())
    matrix = data.find(b"tkhd") + 44  # the display matrix of the track header
    for clockwise, values in {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}.items():
        a, b, c, d = (value * 65536 for value in values)
        data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path = tmp_path / f"turned_{clockwise}.mp4"
        path.write_bytes(data)
        for backend in ("av", "auto"):
            reader = open_video(path, backend)
            turned = np.rot90(upright, -clockwise, axes=(1, 2))
            assert (reader.height, reader.width) == turned.shape[1:3]
            assert np.array_equal(reader.read(range(10)), turned)


def test_odd_sizes_are_padded_by_their_edge(tmp_path):
    frames = moving_frames(4, 41, 55)
    write_video(tmp_path / "odd.mp4", frames, fps=12)
    read = open_video(tmp_path / "odd.mp4").read(range(4))
    assert read.shape == (4, 42, 56, 3)
    assert psnr(read[:, :41, :55], frames) > 32
    assert psnr(read[:, 41, :55], frames[:, 40]) > 28


def test_written_video_plays_in_a_browser(video):
    data = video.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat"), "the index comes first"
    with av.open(str(video)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")


def test_narrow_video_that_decord_cannot_read_is_read(tmp_path):
    write_video(tmp_path / "narrow.mp4", moving_frames(3, 40, 48), fps=12)
    assert psnr(open_video(tmp_path / "narrow.mp4").read(range(3)), moving_frames(3, 40, 48)) > 32


def test_frames_by_pieces_make_the_same_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (11, 31, 50, 3), np.uint8)
    write_video(tmp_path / "whole.mp4", frames, 12)
    write_video(tmp_path / "pieces.mp4", (frames[i : i + 4] for i in range(0, 11, 4)), 12)
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize(
    "pieces, message",
    [
        (
            [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 9, 3), np.uint8)],
            r"frames of \(8, 9\), the first one of \(8, 8\)",
        ),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3))], "cannot write float64"),
        ([], "there is no frame to write"),
    ],
)
def test_pieces_that_do_not_fit_leave_no_file(tmp_path, pieces, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / "video.mp4", iter(pieces), 12)
    assert not list(tmp_path.iterdir())


def test_one_frame_is_a_video(tmp_path):
    write_video(tmp_path / "one.mp4", moving_frames(1), fps=12)
    reader = open_video(tmp_path / "one.mp4")
    assert reader.num_frames == 1 and reader.read([0]).shape == (1, 40, 56, 3)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing", "no such file"),
        ("empty", "empty"),
        ("text", "not a video"),
        ("cut", "cut short"),
        ("cut_in_index", "no video|not a video"),
        ("sound", "no video"),
        ("folder", "no such file"),
    ],
)
def test_unreadable_video_is_named(video, tmp_path, backend, name, reason):
    path = tmp_path / f"{name}.mp4"
    data = video.read_bytes()
    if name == "folder":
        path.mkdir()
    elif name == "sound":
        write_sound(path)
    elif name != "missing":
        path.write_bytes({"empty": b"", "text": b"hello " * 99, "cut": data[:-40], "cut_in_index": data[:400]}[name])
    with pytest.raises(VideoError, match=reason) as error:
        open_video(path, backend)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damage_inside_the_stream_is_an_error(tmp_path):
    path = tmp_path / "damaged.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8)
    write_video(path, noise, fps=12)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(byte ^ 0x5A for byte in data[middle : middle + 4000])
    path.write_bytes(data)
    with pytest.raises(VideoError, match="damaged.mp4"):
        open_video(path, "av").read(range(20))


@pytest.mark.parametrize(
    "fps, fps_max, interval",
    [(24, None, 1), (15.9, 16, 1), (16, 16, 1), (16.1, 16, 2), (24, 16, 2), (30, 16, 2), (60, 24, 3), (0, 16, 1)],
)
def test_frames_are_left_out_until_a_video_keeps_to_the_limit(fps, fps_max, interval):
    assert frame_interval(fps, fps_max) == interval
    assert frame_interval(float("nan"), 16) == 1


def test_unknown_backend_is_refused(video):
    with pytest.raises(ValueError, match="auto, decord, av"):
        open_video(video, "ffmpeg")


def test_image_round_trip(tmp_path):
    image = moving_frames(1)[0]
    write_image(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    write_image(tmp_path / "bücher 1.jpg", image)
    assert psnr(read_image(tmp_path / "bücher 1.jpg"), image) > 30


def test_grey_sixteen_bit_and_transparent_images_become_rgb(tmp_path):
    grey = np.arange(40 * 56).reshape(40, 56) % 256
    cv2.imwrite(str(tmp_path / "grey.png"), grey.astype(np.uint8))
    cv2.imwrite(str(tmp_path / "deep.png"), (grey * 257).astype(np.uint16))
    cv2.imwrite(str(tmp_path / "clear.png"), np.dstack([grey, grey, grey, 0 * grey]).astype(np.uint8))
    for name in ("grey.png", "deep.png", "clear.png"):
        assert np.array_equal(read_image(tmp_path / name), np.dstack([grey] * 3)), name


@pytest.mark.parametrize("keep", [0, 60, 1500])
def test_unreadable_image_is_named(tmp_path, keep):
    path = tmp_path / "cut.png"
    write_image(path, np.random.default_rng(0).integers(0, 255, (40, 56, 3)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VideoError, match="cut.png"):
        read_image(path)


def test_contents_count_not_the_suffix(video, tmp_path):
    (tmp_path / "video.png").write_bytes(video.read_bytes())
    with pytest.raises(VideoError, match="not an image"):
        read_image(tmp_path / "video.png")
    assert is_image("A.PNG") and is_image("b.jpeg") and not is_image("c.mp4")


@pytest.mark.parametrize(
    "frames", [np.zeros((4, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_a_failed_write_leaves_no_file(tmp_path, frames):
    with pytest.raises(VideoError, match="bad.mp4"):
        write_video(tmp_path / "bad.mp4", frames, fps=12)
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_the_old_file(video):
    before = video.read_bytes()
    with pytest.raises(VideoError):
        write_video(video, moving_frames(), fps=0)
    with pytest.raises(VideoError, match="suffix"):
        write_image(video, moving_frames()[0])
    assert video.read_bytes() == before and len(list(video.parent.iterdir())) == 1


def test_importing_the_data_layer_is_light():
    code = "import sys, mg.data.loader; sys.exit(not {'mindspore', 'decord'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_opening_a_video_first_does_not_abort_the_process(tmp_path):
    """decord aborts where it is imported before MindSpore."""
    write_video(tmp_path / "clip.mp4", np.zeros((3, 48, 64, 3), np.uint8), 8)
    code = f"from mg.data.video import open_video; assert open_video({str(tmp_path / 'clip.mp4')!r}).num_frames == 3"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
