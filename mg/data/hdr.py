"""HDR video (PQ, HLG) to the SDR that models expect, using FFmpeg's own colour mapping: libswscale in FFmpeg 8 and
later, with perceptual `intent`. Without it the frames look pale, because HDR values encode different light levels.
"""

from fractions import Fraction
from itertools import pairwise

import av

_CURVES = {16: "PQ", 18: "HLG"}  # FFmpeg's AVCOL_TRC_SMPTE2084 and AVCOL_TRC_ARIB_STD_B67
_TO_SDR = "out_transfer=bt709:out_primaries=bt709:intent=perceptual"


def curve_of(frame: av.VideoFrame, stream: av.VideoStream) -> str | None:
    """PQ, HLG, or None if a frame is SDR."""
    curve = getattr(frame, "color_trc", None)  # PyAV 17 and later
    return _CURVES.get(int(stream.codec_context.color_trc if curve is None else curve))


class ToneMapper:
    """Maps frames of one size and format.

    Args:
        frame: the first of them.

    Raises:
        Exception: of any type, if this FFmpeg does not support tone mapping.
    """

    def __init__(self, frame: av.VideoFrame):
        self.kind = kind_of(frame)
        self._graph = av.filter.Graph()
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
        )
        nodes = [
            source,
            self._graph.add("scale", _TO_SDR),
            self._graph.add("format", "pix_fmts=rgb24"),
            self._graph.add("buffersink"),
        ]
        for node, following in pairwise(nodes):
            node.link_to(following)
        self._graph.configure()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The same frame in SDR, rgb24."""
        self._graph.push(frame)
        return self._graph.pull()


def kind_of(frame: av.VideoFrame) -> tuple[int, int, str]:
    """The properties of a frame that a mapper depends on."""
    return frame.width, frame.height, frame.format.name
