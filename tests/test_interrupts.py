"""Ctrl-C ends a loop between its steps, also where MindSpore's compiler has left a handler behind."""

import ctypes
import os
import signal

import pytest
from training_runs import write_data

from mg.data.index import read_index
from mg.inference.batches import batches
from mg.inference.loading import ClipsConfig, ModelSection
from mg.runtime import CtrlC


@pytest.fixture(autouse=True)
def listening():
    """In the background of a shell Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_check_and_a_second_one_does_not():
    with pytest.raises(KeyboardInterrupt), CtrlC() as ctrl_c:
        ctrl_c.check()
        press()
        steps = ["finished"]
        ctrl_c.check()
        steps.append("begun")
    assert steps == ["finished"]
    with pytest.raises(KeyboardInterrupt), CtrlC():
        press()
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
