"""What every test needs: CPU, errors where they happen, and a clean mode afterwards."""

import mg  # noqa: F401  # isort: skip  # before MindSpore, whose convolutions it speeds up

import mindspore as ms
import pytest

from mg import runtime


@pytest.fixture(autouse=True)
def cpu():
    """PyNative on the CPU, blocking, seeded; a test that wants graph mode calls `runtime.setup` itself."""
    runtime.setup("cpu", "pynative", seed=0, blocking=True)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(params=["graph", "pynative"])
def mode(request):
    """Run the test in both modes."""
    runtime.setup("cpu", request.param, seed=0)
    return request.param
