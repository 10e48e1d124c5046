"""Whether the installed packages read files correctly. Hosts with their own environment may keep old versions."""

from functools import cache

import av

from mg.data.remarks import remark

_RIGHT_COLORS = 17  # first version of PyAV that converts with the video's own colour matrix


@cache
def check_versions() -> None:
    """Log once, in one line, what to upgrade."""
    if int(av.__version__.split(".")[0]) < _RIGHT_COLORS:
        remark(
            "version",
            f"PyAV {av.__version__}",
            "it converts BT.709, which most videos use, wrongly: (200, 30, 30) becomes (185, 11, 31); upgrade it: "
            f"pip install -U 'av>={_RIGHT_COLORS}'",
        )
