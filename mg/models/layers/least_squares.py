"""What the models' linear starts share: how they fit layers to features, in NumPy.

Features are lists of clips, (T, H, W, C) each: channels last, so that a layer is a matrix product.
"""

from collections.abc import Mapping

import numpy as np

Features = list[np.ndarray]

# Brightness and two colour differences from red, green and blue; the rows are orthonormal.
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])

_SAMPLES = 12  # pixels per unknown of a least squares fit


class Layers:
    """A model's layers, fitted one after the other.

    Attributes:
        changed: their new parameters.
    """

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.state = state
        self.changed: dict[str, np.ndarray] = {}

    def fit_channels(
        self, name: str, h: Features, target: Features, causal: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fit a convolution's first channels to the target; its other channels stay random and give the next layer more
        inputs. Returns its weight and bias."""
        weight, bias = self.state[f"{name}.weight"].copy(), self.state[f"{name}.bias"].copy()
        count = target[0].shape[-1]
        weight[:count], bias[:count] = fit_convolution(h, target, causal)
        self.changed |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return weight, bias


def check_rules(name: str, rules: Mapping[str, bool]) -> None:
    """
    Raises:
        ValueError: a rule for the config of a model with a linear start doesn't hold; the first is named.
    """
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"this {name} has no linear start: {rule}")


def merge(x: np.ndarray, frames: int, side: int) -> np.ndarray:
    """Blocks of frames and pixels as channels. (T, H, W, C) -> (T/frames, H/side, W/side, frames side side C)"""
    places = ((f, i, j) for f in range(frames) for i in range(side) for j in range(side))
    return np.concatenate([x[f::frames, i::side, j::side] for f, i, j in places], -1)


def principal(h: Features, count: int) -> np.ndarray:
    """The directions in which features are largest, (C, count)."""
    square = sum((part.reshape(-1, part.shape[-1]).T @ part.reshape(-1, part.shape[-1])).astype(float) for part in h)
    return np.linalg.eigh(square)[1][:, : -count - 1 : -1]


def deviation(h: Features, count: int) -> np.ndarray:
    """The root of the mean square of every channel, (C,).

    Raises:
        ValueError: there are fewer than `count`, or one is nearly 0.
    """
    found = np.sqrt(np.mean([np.square(part).mean((0, 1, 2)) for part in h], 0)) if h else np.zeros(0)
    if len(found) < count or not found.min() > 1e-6 * found.max():
        raise ValueError(f"the clips are too few or too uniform to fit {count} latent channels to; give more")
    return found


def fit_convolution(h: Features, target: Features, causal: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The convolution 3x3x3 of h that is closest to the target, fitted on some pixels of every clip.

    Returns:
        Weight (Cout, Cin, 3, 3, 3) and bias (Cout,).
    """
    rng = np.random.default_rng(0)
    channels, count = h[0].shape[-1], target[0].shape[-1]
    size = 27 * channels + 1
    each = -(-_SAMPLES * size // len(h))
    square, product = np.zeros((size, size)), np.zeros((size, count))
    for part, wanted in zip(h, target):
        pixels = rng.permutation(part[..., 0].size)[:each]
        seen = np.concatenate([_seen(part, pixels, causal), np.ones((len(pixels), 1), np.float32)], 1)
        square += seen.T @ seen
        product += seen.T @ wanted.reshape(-1, count)[pixels]
    square += 1e-5 * np.trace(square) / size * np.eye(size)
    solved = np.linalg.solve(square, product).astype(np.float32)
    return solved[:-1].reshape(3, 3, 3, channels, count).transpose(4, 3, 0, 1, 2), solved[-1]


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, causal: bool = False) -> np.ndarray:
    """(T, H, W, Cin) -> (T, H, W, Cout)"""
    matrix = weight.transpose(2, 3, 4, 1, 0).reshape(-1, len(weight))
    return (_seen(x, slice(None), causal) @ matrix + bias).reshape(*x.shape[:-1], len(weight))


def _seen(x: np.ndarray, pixels: np.ndarray | slice, causal: bool) -> np.ndarray:
    """What a 3x3x3 kernel sees at some pixels, with zeros around the clip or, if causal, in front of it.

    (T, H, W, C) -> (pixels, 27C)
    """
    t, h, w, _ = x.shape
    x = np.pad(x, ((2, 0) if causal else (1, 1), (1, 1), (1, 1), (0, 0)))
    frame, row, column = (axis.ravel()[pixels] for axis in np.indices((t, h, w)))
    taps = [x[frame + f, row + i, column + j] for f in range(3) for i in range(3) for j in range(3)]
    return np.concatenate(taps, -1)


def both_signs(count: int, groups: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where features and their negatives go among channels in groups, and which channels are left for constants.

    Returns:
        (count, width) of 0, 1 and -1; and (width,): 1 and -1 in turn at the channels left, 0 elsewhere.

    Raises:
        ValueError: the groups cannot hold them and two constants each.
    """
    size, pairs = width // groups, -(-count // groups)
    if size % 2 or size < 2 * pairs + 2:
        raise ValueError(
            f"{groups} groups of {size} channels cannot hold {count} features with both signs and constants"
        )
    matrix, constants = np.zeros((count, width)), np.zeros((groups, size))
    for i in range(count):
        first = i % groups * size + 2 * (i // groups)
        matrix[i, first : first + 2] = 1, -1
    constants[:, 2 * pairs :] = np.resize([1, -1], size - 2 * pairs)
    return matrix, constants.ravel()
