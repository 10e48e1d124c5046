"""What every test needs: the CPU, errors where they happen, and a clean mode afterwards; and the two tiers.

Tests marked `full` only run with --all: models of full size, long runs, several workers, and repetitions of what a test
of the quick tier has already shown.
"""

import mg  # noqa: F401  # isort: skip  # before MindSpore, whose convolutions it speeds up

import mindspore as ms
import pytest

from mg import runtime


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked full too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)


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
