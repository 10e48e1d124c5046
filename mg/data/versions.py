"""Whether what is installed reads files rightly. On a host with an environment of its own, old versions stay there."""

from functools import cache

import av

from mg.data.remarks import remark

_RIGHT_COLORS = 17  # PyAV's, from which on it converts by the matrix that a video is in


@cache
def check_versions() -> None:
    """Say once, in one line, what to upgrade."""
    if int(av.__version__.split(".")[0]) < _RIGHT_COLORS:
        remark(
            "version",
            f"PyAV {av.__version__}",
            "it converts BT.709, the colours of most video, wrongly: (200, 30, 30) becomes (185, 11, 31); upgrade it: "
            f"pip install -U 'av>={_RIGHT_COLORS}'",
        )
