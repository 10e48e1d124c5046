"""A Video DC-AE's starting point for training: the layers on its straight path fitted to clips, in closed form.

Without its residual branches a DC-AE is almost linear: what remains are convolutions and the parameter-free shortcuts
next to them. The branches' last norms start at zero here, and the convolutions do what the shortcuts leave to do:
downsampling keeps the principal components of the pixels that it merges, and upsampling is fitted by least squares,
layer by layer, to the features before the downsampling. The branches then learn what a linear map cannot do.

The last norm divides every pixel by the root of its mean square, and the ReLU after it cuts negative values off. Large
constant channels keep that root almost the same everywhere, and each colour passes the ReLU twice, with both signs.

Features are as in `mg.models.layers.least_squares`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mg.models.layers.least_squares import COLOURS, Features, Layers, check_rules, convolve, deviation, merge, principal

_CONSTANT = 8.0  # of the constant channels before the last norm; colours are at most 1.7


def linear_start(
    state: Mapping[str, np.ndarray], config: Mapping, clips: Sequence[np.ndarray], temporal: Sequence[bool]
) -> dict[str, np.ndarray]:
    """Fit the straight path of an untrained DC-AE.

    Args:
        state: its parameters.
        config: its config.
        clips: (3, T, H, W) in [-1, 1], T, H and W multiples of the compression.
        temporal: for each stage, whether its resampling halves the frame rate too.

    Returns:
        The parameters that change.

    Raises:
        ValueError: a config whose straight path is not supported, or clips too few or too uniform for its channels.
    """
    widths = config["encoder_width_list"]
    _check(config)
    layers = _Layers(state)
    layers.close("blocks.", (".norm.gamma", ".norm.beta"))
    pixels = [clip.transpose(1, 2, 3, 0) for clip in clips]

    h = [part @ COLOURS.T.astype(np.float32) for part in pixels]
    layers.write("encoder.project_in", COLOURS.T[None], (1, 1, 1))
    passed = []  # the features before each downsampling
    for stage, width in enumerate(widths[1:]):
        passed.append(h)
        h = layers.halve(f"encoder.stages.{stage}.downsample.conv", h, widths[stage], width, temporal[stage])
    count = config["latent_channels"]
    deviation(h, count)  # refuses channels without content
    # Latents keep their size: if all had unit variance, an update would disturb the small ones as much as the large.
    layers.write("encoder.project_out", np.zeros((1, count, count)), (1, 1, 1))

    widths = config["decoder_width_list"]
    targets = _targets(passed, widths, temporal)
    h = layers.place("decoder.project_in", h, targets.pop())
    for stage in range(len(widths) - 2, -1, -1):
        name = f"decoder.stages.{stage}.upsample.conv"
        h = layers.double(name, h, targets[stage], widths[stage], temporal[stage])
        h = h[: max(8, len(h) // 2)]  # finer levels have more pixels
    gain = _CONSTANT * np.sqrt(1 - 2 * len(COLOURS) / widths[0])
    layers.changed["decoder.norm_out.gamma"] = np.full(widths[0], gain, np.float32)
    h = [np.maximum(part / np.sqrt(np.square(part).mean(-1, keepdims=True) + 1e-5) * np.float32(gain), 0) for part in h]
    layers.fit_channels("decoder.project_out", h, pixels)
    return layers.changed


class _Layers(Layers):
    """The layers, and what each of them is made to do."""

    def close(self, inside: str, ends: tuple[str, ...]) -> None:
        """Set the parameters to zero whose names contain `inside` and have one of these ends."""
        for name, value in self.state.items():
            if inside in name and name.endswith(ends):
                self.changed[name] = np.zeros_like(value)

    def halve(self, name: str, h: Features, channels: int, width: int, temporal: bool) -> Features:
        """Make a layer, with its shortcut, output the principal components of the pixels that it merges, divided by
        the root of their number; channels beyond these are zero."""
        taps = 8 if temporal else 4
        merged = [merge(part, 2 if temporal else 1, 2) for part in h]
        count = min(width, merged[0].shape[-1])
        matrix = principal(merged, count) / taps**0.5
        used = h[0].shape[-1]
        kernel = np.zeros((taps, channels, width))
        kernel[:, :used, :count] = matrix.reshape(taps, used, count)
        # The shortcut: the mean of neighbours among the merged values, of which pixels are the inner axis.
        merging = channels * taps // width
        shortcut = np.kron(np.eye(width), np.full((merging, 1), 1 / merging))
        kernel -= shortcut.reshape(channels, taps, width).transpose(1, 0, 2)
        self.write(name, kernel, (2 if temporal else 1, 2, 2))
        return [part @ matrix.astype(np.float32) for part in merged]

    def place(self, name: str, z: Features, target: Features) -> Features:
        """Make the first convolution, with its shortcut, come as close as possible to the target."""
        count = z[0].shape[-1]
        flat, wanted = (np.concatenate([part.reshape(-1, part.shape[-1]) for part in h]) for h in (z, target))
        matrix = np.linalg.lstsq(flat, wanted, rcond=None)[0]
        self.write(name, (matrix - np.eye(count).repeat(matrix.shape[1] // count, 1))[None], (1, 1, 1))
        return [part @ matrix for part in z]

    def double(self, name: str, h: Features, target: Features, width: int, temporal: bool) -> Features:
        """Make a layer, with its shortcut, come as close as possible to the target; its other channels stay random
        and give the next layer more inputs."""
        frames, count = 2 if temporal else 1, target[0].shape[-1]
        shortcuts = [_spread(part, width, frames) for part in h]
        doubled = [part.repeat(frames, 0).repeat(2, 1).repeat(2, 2) for part in h]
        wanted = [part - shortcut[..., :count] for part, shortcut in zip(target, shortcuts)]
        weight, bias = self.fit_channels(name, doubled, wanted)
        return [convolve(part, weight, bias) + shortcut for part, shortcut in zip(doubled, shortcuts)]

    def write(self, name: str, kernel: np.ndarray, shape: tuple[int, int, int]) -> None:
        """Write a kernel (taps, Cin, Cout) over the pixels `shape` into a layer's weight; the rest becomes zero."""
        weight = np.zeros_like(self.state[f"{name}.weight"])  # (Cout, Cin, 3, 3, 3)
        _, channels, count = kernel.shape
        t, y, x = (slice(1, 1 + size) for size in shape)
        weight[:count, :channels, t, y, x] = kernel.reshape(*shape, channels, count).transpose(4, 3, 0, 1, 2)
        self.changed[f"{name}.weight"] = weight


def _targets(passed: Sequence[Features], widths: Sequence[int], temporal: Sequence[bool]) -> list[Features]:
    """What each stage of the decoder should output, finest first.

    Nearest neighbour and a convolution cannot place pixels within a block; an upsampling's shortcut can, as far as the
    width shrinks. There the features are what the shortcut turns into the next stage's; elsewhere the encoder's.
    """
    found = [[_both_signs(part, widths[0]) for part in passed[0]]]
    for stage in range(1, len(widths)):
        frames = 2 if temporal[stage - 1] else 1
        copies = widths[stage - 1] * frames * 4 // widths[stage]
        if copies < frames * 4:
            h = [_gather(part, frames, copies) for part in found[-1]]
            if stage == 1:  # instead of constants
                first = 2 * len(COLOURS) * frames * 4 // copies
                more = [_with_neighbours(part, widths[1] - first, 1) for part in passed[1]]
                h = [np.concatenate([part[..., :first], extra], -1) for part, extra in zip(h, more)]
        else:
            h = [_with_neighbours(part, widths[stage], 3 if temporal[stage - 1] else 2) for part in passed[stage]]
        found.append(h)
    return found


def _gather(x: np.ndarray, frames: int, copies: int) -> np.ndarray:
    """The reverse of an upsampling's shortcut: the mean of the pixels that a channel is copied to.

    (T, H, W, C) -> (T / frames, H / 2, W / 2, 4 C frames / copies)
    """
    t, h, w, c = x.shape
    x = x.reshape(t // frames, frames, h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 6, 1, 3, 5)
    return x.reshape(t // frames, h // 2, w // 2, -1, copies).mean(-1)


def _with_neighbours(x: np.ndarray, width: int, axes: int) -> np.ndarray:
    """The first channels, and those of the next pixels along the last `axes` axes, before and after: upsampling after
    nearest neighbour needs them. (T, H, W, C) -> (T, H, W, width or less)"""
    shared = max(5 * width // (16 * axes), (width - x.shape[-1]) // (2 * axes))  # of the channels
    found = [x[..., : width - 2 * axes * shared]]
    for axis in range(3 - axes, 3):
        padded = np.pad(x[..., :shared], [(1, 1) if i == axis else (0, 0) for i in range(4)])
        size = x.shape[axis]
        found += [padded.take(range(first, first + size), axis) for first in (0, 2)]
    return np.concatenate(found, -1)


def _spread(x: np.ndarray, width: int, frames: int) -> np.ndarray:
    """The upsampling's shortcut. (T, H, W, C) -> (frames T, 2H, 2W, width)"""
    t, h, w, c = x.shape
    x = x.repeat(width * frames * 4 // c, -1).reshape(t, h, w, width, frames, 2, 2)
    return x.transpose(0, 4, 1, 5, 2, 6, 3).reshape(t * frames, 2 * h, 2 * w, width)


def _both_signs(x: np.ndarray, width: int) -> np.ndarray:
    """Colours, their negatives and constants, in channels. (T, H, W, 3) -> (T, H, W, width)"""
    constants = np.full((*x.shape[:-1], width - 2 * x.shape[-1]), _CONSTANT, np.float32)
    return np.concatenate([x, -x, constants], -1)


def _check(config: Mapping) -> None:
    encoder, decoder = config["encoder_width_list"], config["decoder_width_list"]
    rules = {
        "encoder_width_list must end in latent_channels": encoder[-1] == config["latent_channels"],
        "decoder_width_list must end in a number and 4 times that number": decoder[-1] == 4 * decoder[-2],
        "decoder_width_list must begin with at least 8": decoder[0] > 2 * len(COLOURS) + 1,
        "in_channels must be 3": config["in_channels"] == len(COLOURS),
    }
    check_rules("DC-AE", rules)
