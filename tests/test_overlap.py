"""While a model runs on a piece, the next one is read and the previous one written; failures end all three."""

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from queue import SimpleQueue
from threading import Event

import numpy as np
import pytest

from mg.codec import Codec, Geometry, TwoStageCodec
from mg.data.video import write_video
from mg.overlap import read_ahead, read_pieces, write_behind
from mg.tiling import TilingConfig

SOON = 60  # seconds until a test that would wait forever fails


class Events(dict):
    """Events by name, made when first used."""

    def __missing__(self, name) -> Event:
        return self.setdefault(name, Event())

    def wait(self, name) -> None:
        assert self[name].wait(SOON), f"{name} never happened"


@pytest.mark.parametrize("items", [range(4), count()])
def test_jobs_are_read_ahead_in_order_as_far_as_wanted(items):
    submitted = []

    def submit(item) -> Future:
        submitted.append(item)
        return Future()

    for expected, (item, job) in zip(range(4), read_ahead(submit, items, depth=2)):
        assert item == expected and isinstance(job, Future)
        assert submitted == list(range(min(item + 3, len(items) if isinstance(items, range) else item + 3)))


def test_one_piece_is_read_while_another_is_in_use_and_no_more():
    events, asked = Events(), []

    def read(start: int, stop: int) -> tuple[int, int]:
        asked.append(start)
        events["read", start].set()
        return start, stop

    bounds = [(0, 2), (2, 4), (4, 5)]
    for number, piece in enumerate(read_pieces(read, bounds, ahead=True)):
        assert piece == bounds[number]
        if number < 2:
            events.wait(("read", bounds[number + 1][0]))
        assert len(asked) == min(number + 2, 3)
    assert asked == [0, 2, 4]


def test_a_piece_that_cannot_be_read_fails_where_it_is_needed():
    asked = []

    def read(start: int, stop: int) -> int:
        asked.append(start)
        if start == 2:
            raise OSError("a damaged frame")
        return start

    pieces = read_pieces(read, [(0, 2), (2, 4), (4, 5)], ahead=True)
    assert next(pieces) == 0
    with pytest.raises(OSError, match="a damaged frame"):
        next(pieces)
    assert asked == [0, 2]


def test_an_item_is_computed_while_the_one_before_is_written_and_no_more():
    events, computed = Events(), []

    def items():
        for number in range(4):
            computed.append(number)
            events["computed", number].set()
            yield number

    def write(coming) -> list[int]:
        written = []
        for number in coming:
            if number < 3:
                events.wait(("computed", number + 1))
            assert len(computed) <= number + 2
            written.append(number)
        return written

    assert write_behind(write, items()) == [0, 1, 2, 3]


def test_a_writer_that_fails_or_has_enough_ends_the_items():
    closed, computed = [], []

    def items():
        try:
            for number in count():
                computed.append(number)
                yield number
        finally:
            closed.append(True)

    def fail(coming):
        next(coming)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_behind(fail, items())
    assert write_behind(next, items()) == 0
    assert closed == [True, True] and len(computed) <= 6


@pytest.mark.parametrize("error", [ValueError("not finite"), KeyboardInterrupt()])
def test_items_that_fail_leave_nothing_half_written(tmp_path, error):
    def items():
        for _ in range(2):
            yield np.zeros((2, 16, 16, 3), np.uint8)
        raise error

    with pytest.raises(type(error)) as raised:
        write_behind(lambda pieces: write_video(tmp_path / "video.mp4", pieces, fps=8), items())
    assert raised.value is error
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_writer_starts_ends_it(monkeypatch):
    class Interrupted(ThreadPoolExecutor):
        def submit(self, *job):
            super().submit(*job)
            raise KeyboardInterrupt

    class Impatient(SimpleQueue):
        def get(self):
            return super().get(timeout=5)

    told = []

    def write(coming):
        try:
            next(coming)
        except Exception as error:
            told.append(str(error))

    monkeypatch.setattr("mg.overlap.ThreadPoolExecutor", Interrupted)
    monkeypatch.setattr("mg.overlap.SimpleQueue", Impatient)
    with pytest.raises(KeyboardInterrupt):
        write_behind(write, (number for number in range(2)))
    assert told == ["there are no more items: computing them failed"]


def means(x: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels in pairs of frames."""
    b, c, t, h, w = x.shape
    return x.reshape(b, c, t // 2, 2, h // 2, 2, w // 2, 2).mean((3, 5, 7))


def repeated(z: np.ndarray, still: bool = False) -> np.ndarray:
    return z.repeat(2, 2).repeat(2, 3).repeat(2, 4)


def one_stage() -> Codec:
    tiling = TilingConfig(encode_tile=4, encode_overlap=2, decode_tile=4, decode_overlap=2)
    return Codec(Geometry(3, 3, 2, 2, frame_multiple=2, has_posterior=False), means, repeated, tiling)


def two_stages() -> Codec:
    spatial = Geometry(3, 3, 2, 1, has_posterior=False)
    frames = Codec(spatial, lambda x: x[..., ::2, ::2], lambda z, still: z.repeat(2, 3).repeat(2, 4))
    geometry = Geometry(3, 3, 2, 2, chunk=4)
    return TwoStageCodec(
        geometry, frames, lambda z: z[:, :, ::2].repeat(2, 1), lambda z: z.repeat(2, 2), None, 0.5, 2.0
    )


@pytest.mark.parametrize("make", [one_stage, two_stages])
def test_a_stream_gives_the_same_while_it_is_read_ahead_and_written_behind(make):
    codec = make()
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 11, 4, 6)).astype(np.float32)

    def through(stream, source: np.ndarray, *arguments) -> np.ndarray:
        """The stream's pieces, joined; nothing moves on before the next piece is read and the next one computed."""
        events, reads = Events(), []
        pieces = list(stream(lambda start, stop: source[:, :, start:stop], source.shape[2], *arguments))
        assert len(pieces) > 2

        def read(start: int, stop: int) -> np.ndarray:
            events["read", len(reads)].set()
            reads.append(start)
            return source[:, :, start:stop]

        def items():
            for number, piece in enumerate(stream(read, source.shape[2], *arguments, read_ahead=True)):
                if number + 1 < len(pieces):
                    events.wait(("read", number + 1))
                events["computed", number].set()
                yield piece

        def write(coming) -> list[np.ndarray]:
            written = []
            for number, piece in enumerate(coming):
                if number + 1 < len(pieces):
                    events.wait(("computed", number + 1))
                written.append(piece)
            return written

        written = write_behind(write, items())
        for one, other in zip(pieces, written, strict=True):
            np.testing.assert_array_equal(one, other)
        return np.concatenate(written, axis=2)

    z = through(lambda *arguments, **options: (each.z for each in codec.encode_stream(*arguments, **options)), x)
    assert through(codec.decode_stream, z, 11).shape == x.shape
