"""Position embeddings: sinusoids added to tokens, and rotations of queries and keys (RoFormer, arXiv 2104.09864)."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops


def sinusoids(positions: np.ndarray, channels: int) -> np.ndarray:
    """[sin | cos] of positions (N,), at frequencies from 1 down to about 1/10000. fp64, (N, channels)"""
    frequencies = 10000.0 ** (-np.arange(channels // 2) / (channels // 2))
    angles = positions.astype(np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def frame_embedding(frames: int, channels: int, scale: float = 1.0) -> np.ndarray:
    """Sinusoids of 0, 1 / scale, 2 / scale, ...; fp32, (1, frames, channels)"""
    return sinusoids(np.arange(frames) / scale, channels)[None].astype(np.float32)


def grid_embedding(rows: int, columns: int, channels: int, scale: float = 1.0) -> np.ndarray:
    """Sinusoids of the column, then of the row, half the channels each; fp32, (1, rows * columns, channels)"""
    of_column = sinusoids(np.arange(columns) / scale, channels // 2)
    of_row = sinusoids(np.arange(rows) / scale, channels // 2)
    both = np.concatenate([np.tile(of_column, (rows, 1)), np.repeat(of_row, columns, axis=0)], axis=1)
    return both[None].astype(np.float32)


@ops.constexpr
def count(number):
    """0, 1, ..., number - 1 as a graph constant; fp32"""
    return Tensor(np.arange(number, dtype=np.float32))


class PositionEmbedding2D(nn.Cell):
    """`grid_embedding` for any grid, with positions that depend on the video's size in pixels.

    For a video of `input_sq_size` squared pixels, positions are spaced as on a square grid with the same number of
    tokens; for a larger one they are closer together. All in fp32.
    """

    def __init__(self, channels: int, input_sq_size: int):
        super().__init__()
        self.input_sq_size = input_sq_size
        self.frequencies = Tensor((10000.0 ** (-np.arange(channels // 4) / (channels // 4))).astype(np.float32))

    def construct(self, height, width, rows, columns):
        """Video height and width (1,) in pixels, rows and columns of the grid -> (1, 1, rows * columns, C)"""
        base = round((rows * columns) ** 0.5)
        scale = mint.sqrt(height.astype(ms.float32) * width.astype(ms.float32)) / self.input_sq_size  # (1,)
        of_row = self.sinusoids(rows, base, scale).expand_dims(1)  # (rows, 1, C/2)
        of_column = self.sinusoids(columns, base, scale).expand_dims(0)  # (1, columns, C/2)
        shape = (rows, columns, of_row.shape[2])
        both = mint.cat((ops.broadcast_to(of_column, shape), ops.broadcast_to(of_row, shape)), dim=2)
        return both.reshape(1, 1, rows * columns, 2 * shape[2])

    def sinusoids(self, number, base, scale):
        """(number, C/2)"""
        places = count(number) / scale * base / number
        angles = places.expand_dims(1) * self.frequencies.expand_dims(0)
        return mint.cat((mint.sin(angles), mint.cos(angles)), dim=1)


def rotary_frequencies(channels: int) -> np.ndarray:
    """The frequency of each pair of a head's channels, fp32."""
    return (10000.0 ** (-np.arange(0, channels, 2) / channels)).astype(np.float32)


class RotaryEmbedding(nn.Cell):
    """Rotates pairs of neighbouring channels of queries and keys by angles that grow with the frame.

    The channels of a pair are interleaved, which is slow to split on any device; a product with a matrix of 0, 1 and -1
    swaps them instead, and is exact.

    Args:
        channels: channels of a head.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.freqs = Parameter(Tensor(rotary_frequencies(channels)), name="freqs", requires_grad=False)
        turn = np.zeros((channels, channels), np.float32)
        even = np.arange(0, channels, 2)
        turn[even + 1, even], turn[even, even + 1] = -1, 1  # (a, b) -> (-b, a)
        self.turn = Tensor(turn)

    def construct(self, frames):
        """cos and sin of the angles, (1, frames, 1, channels) each, and the swap matrix; for `rotate`."""
        pairs = self.freqs.shape[0]
        angles = count(frames).reshape(frames, 1, 1) * self.freqs.reshape(1, pairs, 1)
        angles = ops.broadcast_to(angles, (frames, pairs, 2)).reshape(1, frames, 1, 2 * pairs)
        return mint.cos(angles), mint.sin(angles), self.turn


def rotate(x, rope):
    """x (N, frames, heads, channels), rotated by the output of `RotaryEmbedding`; in fp32"""
    cos, sin, turn = rope
    x = x.astype(ms.float32)
    turned = ops.matmul(x.reshape(-1, x.shape[3]), turn).reshape(x.shape)
    return x * cos + turned * sin
