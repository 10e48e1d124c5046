"""Video and image files as they come from the field, a few KB each, and what is right for each of them.

`draw(folder)` writes them all. Frame i has a box at the top left of grey 4 i (mod 256), so that frames can be told, and
red, green and blue thirds, so that left can be told from right and up from down.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 12


def picture(i: int, height: int = 96, width: int = 128) -> np.ndarray:
    frame = np.zeros((height, width, 3), np.uint8)
    for third, color in enumerate(((200, 30, 30), (30, 180, 40), (40, 60, 210))):
        frame[:, third * width // 3 : (third + 1) * width // 3] = color
    frame[: height // 4, : width // 2] = i * 4 % 256
    return frame


def boxes(frames: np.ndarray) -> list[int]:
    """Which frame each one is, by its box, mod 64: (T, H, W, 3) -> T numbers."""
    return [round(float(frame[4:12, 8:40].mean()) / 4) for frame in frames]


@contextmanager
def same_scheduling() -> Iterator[None]:
    """Leave this process scheduled as it was: run by root, SVT-AV1's encoder makes what calls it a real-time process,
    and all that it starts, beside which others starve."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@same_scheduling()
def encode(
    path: Path,
    num_frames: int = 24,
    codec: str = "libx264",
    format: str | None = None,
    size: tuple[int, int] = (96, 128),
    pix_fmt: str = "yuv420p",
    time: Callable[[int], int] | None = None,
    aspect: Fraction | None = None,
    mux: dict | None = None,
    frames: Callable[[int, int, int], np.ndarray] = picture,
    transfer: int | None = None,
    rate: Fraction | int = FPS,
    **options,
) -> Path:
    """Write a video; `time` gives a frame's place in units of 1 / FPS, options are the encoder's."""
    with av.open(str(path), "w", format=format, options=mux or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if transfer is not None:  # BT.2020, as HDR is
            context = stream.codec_context
            context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frames(i, *size), format="rgb24")
            if time is not None:
                frame.pts, frame.time_base = time(i), Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy(source: Path, path: Path, format: str, skip: int = 0, mux: dict | None = None) -> Path:
    """The packets of a file in another container, without the first ones."""
    with av.open(str(source)) as old, av.open(str(path), "w", format=format, options=mux or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if number >= skip:
                packet.stream = stream
                new.mux(packet)
    return path


def join(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def cut(source: Path, path: Path, share: float) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damage(source: Path, path: Path, place: float = 0.5, length: int = 400) -> Path:
    data = bytearray(source.read_bytes())
    at = int(len(data) * place)
    data[at : at + length] = bytes(byte ^ 0x5A for byte in data[at : at + length])
    path.write_bytes(data)
    return path


def edit_list(source: Path, path: Path, duration: int, media_time: int) -> Path:
    """The edit list of an mp4 set to show `duration` / 1000 s from `media_time` / 12288 s on."""
    data = bytearray(source.read_bytes())
    at = data.find(b"elst") + 12
    data[at : at + 8] = struct.pack(">Ii", duration, media_time)
    path.write_bytes(data)
    return path


def display_matrix(source: Path, path: Path, a: int, b: int, c: int, d: int) -> Path:
    data = bytearray(source.read_bytes())
    at = data.find(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def noisy(i: int, height: int, width: int) -> np.ndarray:
    """Hard to encode, so that cuts and damage meet frames."""
    frame = picture(i, height, width)
    noise = np.random.default_rng(i).integers(0, 255, (height - height // 2, width, 3))
    frame[height // 2 :] = noise
    return frame


def exif(orientation: int, broken: bool = False) -> bytes:
    entries = struct.pack(">HHI4s", 0x0112, 3, 1, bytes([0, orientation, 0, 0]))
    if broken:  # a resolution unit in letters
        entries += struct.pack(">HHI4s", 0x0128, 2, 4, b"abc\0")
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries) // 12) + entries + bytes(4)


@dataclass(frozen=True)
class Right:
    """What is right for a file.

    Attributes:
        boxes: of the frames that decode.
        size: height and width that are shown.
        partial: how many frames of what number decode, where it is cut short or damaged: else not to be read whole.
        error: what the error says, of one that cannot be read at all.
        times: when frames are shown, counted from the first one, in units of 1 / FPS; None for an even rate.
    """

    boxes: list[int] | None = None
    size: tuple[int, int] = (96, 128)
    partial: bool = False
    error: str | None = None
    times: list[int] | None = None


def _slow_end(i: int) -> int:
    return i if i < 30 else 30 + (i - 30) * 12


def draw(folder: Path) -> dict[str, Right]:
    """Write all of them, and say what is right, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    hevc = {"x265-params": "log-level=error"}
    base = encode(folder / "base.mp4", 60, g=10, bf=2)
    right = {"base.mp4": Right([*range(60)])}

    def add(path: Path, *args, **kwargs) -> None:
        right[path.name] = Right(*args, **kwargs)

    # Edit lists.
    add(edit_list(base, folder / "trim_tail.mp4", 2500, 2048), [*range(30)])
    add(edit_list(base, folder / "trim_head.mp4", 2500, 2048 + 15 * 1024), [*range(15, 45)])
    add(edit_list(base, folder / "trim_at_key.mp4", 1000, 2048 + 20 * 1024), [*range(20, 32)])
    # Containers that count other things than frames.
    skipping = encode(folder / "dropped.avi", 30, "mpeg4", g=12, qmax=2, time=lambda i: i + i // 3)
    add(skipping, [*range(30)], times=[i + i // 3 for i in range(30)])
    add(encode(folder / "fragmented.mp4", 36, g=12, mux={"movflags": "frag_keyframe+empty_moov"}), [*range(36)])
    add(
        encode(folder / "alt_ref.webm", 36, "libvpx", g=12, b="4M", **{"auto-alt-ref": 1, "lag-in-frames": 10}),
        [*range(36)],
    )
    # Transport streams, whole and joined, with time stamps that start again or leap.
    add(encode(folder / "b_frames.ts", 96, format="mpegts", g=24, bf=3), [i % 64 for i in range(96)])
    one = encode(parts / "one.ts", 24, format="mpegts", g=12, bf=0)
    two = encode(parts / "two.ts", 24, format="mpegts", g=12, bf=2)
    late = encode(parts / "late.ts", 24, format="mpegts", g=12, bf=0, time=lambda i: 120 + i)
    add(join(folder / "joined.ts", one, one), [*range(24)] * 2, times=[*range(48)])
    add(join(folder / "joined_b_frames.ts", two, two), [*range(24)] * 2, times=[*range(48)])
    add(join(folder / "leap.ts", one, late), [*range(24)] * 2, times=[*range(24), *range(120, 144)])
    add(join(folder / "backwards.ts", late, one), [*range(24)] * 2, times=[*range(48)])
    # Streams that begin within a group of frames.
    whole = encode(parts / "whole.ts", 60, format="mpegts", g=24, bf=0)
    add(copy(whole, folder / "mid_gop.mkv", "matroska", skip=10), [*range(24, 60)])
    add(copy(whole, folder / "mid_gop.ts", "mpegts", skip=20), [*range(24, 60)])
    add(copy(whole, folder / "mid_gop.mp4", "mp4", skip=10), [*range(24, 60)])
    fresh = encode(parts / "vp9.webm", 48, "libvpx-vp9", g=24)
    add(copy(fresh, folder / "mid_gop.webm", "webm", skip=10), [*range(24, 48)])
    # Raw streams, without time stamps, of one size and of two.
    raw = encode(folder / "raw.h264", 20, format="h264", g=10, bf=2)
    add(raw, [*range(20)])
    larger = encode(parts / "larger.h264", 20, format="h264", size=(112, 160), g=10, bf=0)
    smaller = encode(parts / "smaller.h264", 20, format="h264", g=10, bf=0)
    changes = r"the size changes at frame 20, from 128 x 96 to 160 x 112"
    add(join(folder / "resized.h264", smaller, larger), error=changes)
    resized = [
        encode(parts / f"{size[1]}.ts", 20, format="mpegts", size=size, g=10, bf=0) for size in ((96, 128), (112, 160))
    ]
    add(join(folder / "resized.ts", *resized), error=changes)
    # The eight ways of a display matrix.
    for name, matrix, size in (
        ("mirrored", (-1, 0, 0, 1), (96, 128)),
        ("upside_down", (1, 0, 0, -1), (96, 128)),
        ("turned_half", (-1, 0, 0, -1), (96, 128)),
        ("turned_right", (0, 1, -1, 0), (128, 96)),
        ("turned_left", (0, -1, 1, 0), (128, 96)),
        ("transposed", (0, 1, 1, 0), (128, 96)),
        ("transposed_back", (0, -1, -1, 0), (128, 96)),
    ):
        add(display_matrix(base, folder / f"{name}.mp4", *matrix), None, size)
    # Pixels that are not square, in the container and in the stream.
    wide = encode(folder / "anamorphic.mp4", 8, size=(96, 120), aspect=Fraction(64, 45))
    add(wide, [*range(8)], (96, 171))
    add(display_matrix(wide, folder / "anamorphic_turned.mp4", 0, 1, -1, 0), None, (171, 96))
    add(encode(folder / "anamorphic.ts", 8, format="mpegts", size=(96, 120), aspect=Fraction(8, 9)), size=(96, 107))
    add(encode(folder / "anamorphic.mkv", 8, size=(96, 120), aspect=Fraction(4, 3)), size=(96, 160))
    # Frame rates that vary.
    for suffix, codec in (("mp4", "libx264"), ("mkv", "libx264"), ("flv", "libx264"), ("webm", "libvpx")):
        path = encode(folder / f"variable.{suffix}", 40, codec, time=_slow_end, g=20, bf=0, b="4M")
        add(path, [*range(40)], times=[_slow_end(i) for i in range(40)])
    # Cut short and damaged, as far as the decoder tells.
    hard = encode(parts / "hard.mp4", 48, frames=noisy, g=12, bf=2, mux={"movflags": "faststart"})
    add(cut(hard, folder / "cut.mp4", 0.6), partial=True)
    add(damage(hard, folder / "damaged.mp4"), partial=True)
    hard = encode(parts / "hard.mkv", 48, frames=noisy, g=12, bf=2)
    add(cut(hard, folder / "cut.mkv", 0.6), partial=True)
    hard = encode(parts / "hard.flv", 48, frames=noisy, g=12, bf=2)
    add(cut(hard, folder / "cut.flv", 0.6), partial=True)
    hard = encode(parts / "hard.avi", 48, "mpeg4", frames=noisy, g=12)
    add(cut(hard, folder / "cut.avi", 0.6), partial=True)
    hard = encode(parts / "hevc.mp4", 48, "libx265", frames=noisy, g=12, mux={"movflags": "faststart"}, **hevc)
    add(cut(hard, folder / "cut_hevc.mp4", 0.6), partial=True)
    # Images.
    for name, data in (("broken_exif.jpg", exif(6, broken=True)), ("turned.jpg", exif(6))):
        Image.fromarray(picture(0)).save(folder / name, exif=data, quality=95)
    return right
