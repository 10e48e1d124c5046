"""Ctrl-C ends a loop between its steps, also where MindSpore has replaced the handler by one that sends SIGTERM."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import TwoConvs, write_data

from mg.config import parse_config, run_command_line
from mg.data.index import read_index
from mg.inference.batches import batches
from mg.inference.encode import EncodeConfig, encode_csv
from mg.inference.loading import ClipsConfig, ModelSection
from mg.runtime import CtrlC

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def listening():
    """In the background of a shell Ctrl-C is ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def press(number: int = signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_waits_for_the_check_and_a_second_one_does_not(number):
    steps = []
    with pytest.raises(KeyboardInterrupt), CtrlC() as ctrl_c:
        ctrl_c.check()
        press(number)
        steps.append("finished")
        ctrl_c.check()
        steps.append("begun")
    assert steps == ["finished"]
    with pytest.raises(KeyboardInterrupt), CtrlC():
        press(number)
        press(number)
    assert signal.getsignal(number) is signal.default_int_handler


def test_msruns_sigterm_ends_a_worker_at_once(monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    with CtrlC():
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_a_command_takes_sigterm_for_ctrl_c(capsys):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(SystemExit) as end:
        run_command_line(lambda: press(signal.SIGTERM))
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_ctrl_c_ends_a_stream_after_the_item_in_which_it_is_pressed():
    made, closed = [], []

    def items():
        try:
            for number in range(3):
                if number == 1:
                    press()
                made.append(number)
                yield number
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt), CtrlC() as ctrl_c:
        list(ctrl_c.checked(items()))
    assert (made, closed) == ([0, 1], [True])


@pytest.mark.parametrize("method", ["hold", "check"])
def test_a_handler_that_was_left_behind_is_replaced(method):
    left_behind = ctypes.CDLL(None).signal
    left_behind.argtypes, left_behind.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    with pytest.raises(KeyboardInterrupt), CtrlC() as ctrl_c:
        left_behind(signal.SIGINT, int(signal.SIG_DFL))  # would end the process, unknown to Python
        getattr(ctrl_c, method)()
        press()
        ctrl_c.check()


def test_a_loop_over_batches_ends_after_the_batch_in_which_ctrl_c_is_pressed(tmp_path):
    """Reconstruction's loop, and that of the latents' statistics."""
    options = write_data(tmp_path)
    config = ClipsConfig(ModelSection(from_pretrained="x"), options[1], image_size=16, num_frames=4)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for batch, _ in batches(read_index(options[1], options[3]), config, lambda *_: None):
            press()
            seen += batch
    assert len(seen) == 1


# A command with the model of two convolutions, and Ctrl-C once the first piece is computed: since MindSpore compiles
# for it, its handler is there.
PRESSED = """
import os, runpy, signal, sys
import training_runs
from mg.models import VideoAutoencoder
signal.signal(signal.SIGINT, signal.default_int_handler)

def pressed(stream):
    def pieces(*arguments, **options):
        for piece in stream(*arguments, **options):
            os.kill(os.getpid(), signal.SIGINT)
            yield piece
    return pieces

for name in ("encode_stream", "decode_stream"):
    setattr(VideoAutoencoder, name, pressed(getattr(VideoAutoencoder, name)))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    """The options of mg-encode-latents, but for the output."""
    folder = tmp_path_factory.mktemp("encoding")
    TwoConvs({}).save_weights(folder / "two_convs.ckpt")
    options = ["--ckpt_path", str(folder / "two_convs.ckpt"), "--image_size", "16"]
    return [*options, *write_data(folder, videos=1)]


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_ctrl_c_while_a_video_is_written_leaves_nothing_of_it(tmp_path, encoding, name):
    options, left = encoding, {".lock", ".lock-00000", "latents.json"}
    if name == "decode":
        encode_csv(parse_config(EncodeConfig, "", [*encoding, "--output_path", str(tmp_path / "latents")]))
        options, left = ["--latents_path", str(tmp_path / "latents")], set()
    output = tmp_path / "output"
    command = [sys.executable, "-c", PRESSED, str(ROOT / "scripts" / f"{name}_latents.py"), *options]
    done = subprocess.run(
        [*command, "--output_path", str(output), "--device", "cpu", "--mode", "graph"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 130 and done.stderr.endswith("interrupted\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in output.glob("*")} == left
