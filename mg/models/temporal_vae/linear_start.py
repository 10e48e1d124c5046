"""A starting point for training the temporal half: the layers on its straight path fitted to clips, in closed form.

An untrained temporal half is almost linear: its residual branches start at zero. What remains are the first and last
convolutions and those that halve and double the frame rate. Halving keeps the principal components of the frames that
it merges; doubling is fitted by least squares, layer by layer, to the features before the halving.

The last norms and SiLUs let their input pass: silu(x) - silu(-x) is x, so each feature comes with both signs, and
constant channels in every group keep the norm's deviation almost the same for all clips.

Features are as in `mg.models.layers.least_squares`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mg.models.layers.least_squares import (
    Features,
    Layers,
    both_signs,
    check_rules,
    convolve,
    deviation,
    merge,
    principal,
)

_CONSTANT = 12.0  # deviations; of the constant channels before a last norm
_EPS = 1e-5  # of the norms


def linear_start(
    state: Mapping[str, np.ndarray], config: Mapping, clips: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Fit the straight path of an untrained temporal half.

    Args:
        state: its parameters.
        config: the whole model's config.
        clips: what it encodes, one chunk each, (C, T, h, w), T a multiple of its compression.

    Returns:
        The parameters that change.

    Raises:
        ValueError: a config whose straight path is not supported, or clips too few or too uniform for its channels.
    """
    _check(config)
    width, groups, count = config["filters"], config["norm_num_groups"], config["latent_channels"]
    halvings = len(config["temporal_downsample"])
    layers = _Layers(state)
    x = [clip.transpose(1, 2, 3, 0) for clip in clips]

    layers.write("encoder.conv_in", np.eye(x[0].shape[-1])[None])
    h, passed = x, []  # the features before each halving
    for level in range(halvings - 1):
        passed.append(h)
        merged = [merge(part, 2, 1) for part in h]
        matrix = principal(merged, width) / 2**0.5
        layers.write(f"encoder.down.{level}.downsample", matrix.reshape(2, -1, matrix.shape[-1]))
        h = [part @ matrix.astype(np.float32) for part in merged]
    passed.append(h)
    merged = [merge(part, 2, 1) for part in h]
    matrix = principal(merged, count)
    matrix = matrix / deviation([part @ matrix for part in merged], count)
    z = [(part @ matrix).astype(np.float32) for part in merged]
    signs, constants = both_signs(count, groups, width)
    layers.write(
        f"encoder.down.{halvings - 1}.downsample", (matrix @ signs).reshape(2, -1, width), constants * _CONSTANT
    )
    layers.pass_norm("encoder.norm_out", signs, constants, groups)
    layers.write("encoder.conv_out", signs.T[None])
    layers.write("quant_conv", np.eye(2 * count)[None, :, :count])  # the log-variance stays constant
    layers.write("post_quant_conv", np.eye(count)[None])

    merged = [merge(part, 2, 1) for part in passed[-1]]
    matrix = principal(merged, min(width, merged[0].shape[-1])).astype(np.float32)
    h = layers.fit("decoder.conv_in", z, [part @ matrix for part in merged])
    for level in range(halvings, 0, -1):
        target = passed[level - 1]
        if level == 1:
            signs, constants = both_signs(x[0].shape[-1], groups, width)
            scaled = (np.eye(x[0].shape[-1]) / deviation(x, 0)) @ signs
            target = [(part @ scaled + constants * _CONSTANT).astype(np.float32) for part in target]
            gain = layers.pass_norm("decoder.norm_out", signs, constants, groups)
        h = [
            _to_frames(part)
            for part in layers.fit(f"decoder.up.{level}.upsample.conv", h, [_together(part) for part in target])
        ]
    layers.fit("decoder.conv_out", [_norm_and_silu(part, groups, gain) for part in h], x)
    return layers.changed


class _Layers(Layers):
    """The layers, and what each of them is made to do."""

    def write(self, name: str, kernel: np.ndarray, bias: np.ndarray | None = None) -> None:
        """Write a kernel (taps, Cin, Cout) for the newest frames into a layer's weight; its other output channels stay
        as they are."""
        weight = self.state[f"{name}.weight"].copy()  # (Cout, Cin, kt, kh, kw)
        taps, channels, count = kernel.shape
        weight[:count] = 0
        weight[:count, :channels, -taps:, weight.shape[3] // 2, weight.shape[4] // 2] = kernel.transpose(2, 1, 0)
        self.changed[f"{name}.weight"] = weight
        if bias is not None:
            self.changed[f"{name}.bias"] = bias.astype(np.float32)

    def pass_norm(self, name: str, signs: np.ndarray, constants: np.ndarray, groups: int) -> np.ndarray:
        """Give a norm the gains with which features of deviation 1, their negatives and the constants pass it."""
        squares = np.abs(signs).sum(0) + np.square(constants * _CONSTANT)
        each = squares.reshape(groups, -1).mean(-1) ** 0.5
        self.changed[f"{name}.gamma"] = each.repeat(len(squares) // groups).astype(np.float32)
        return self.changed[f"{name}.gamma"]

    def fit(self, name: str, h: Features, target: Features) -> Features:
        """Fit a causal convolution to the target, and return its output."""
        weight, bias = self.fit_channels(name, h, target, causal=True)
        return [convolve(part, weight, bias, causal=True) for part in h]


def _together(x: np.ndarray) -> np.ndarray:
    """Two frames as one, a channel's two next to each other. (T, H, W, C) -> (T/2, H, W, 2C)"""
    return np.stack([x[0::2], x[1::2]], -1).reshape(len(x) // 2, *x.shape[1:3], -1)


def _to_frames(x: np.ndarray) -> np.ndarray:
    """What the upsampling does with its channels. (T, H, W, 2C) -> (2T, H, W, C)"""
    t, h, w, _ = x.shape
    return x.reshape(t, h, w, -1, 2).transpose(0, 4, 1, 2, 3).reshape(2 * t, h, w, -1)


def _norm_and_silu(x: np.ndarray, groups: int, gain: np.ndarray) -> np.ndarray:
    t, h, w, c = x.shape
    x = x.reshape(t * h * w, groups, -1)
    x = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + _EPS)
    x = x.reshape(t, h, w, c) * gain
    return x / (1 + np.exp(-x))


def _check(config: Mapping) -> None:
    width, multipliers = config["filters"], config["channel_multipliers"]
    rules = {
        "channel_multipliers must all be 1": set(multipliers) == {1},
        "temporal_downsample must all be true": all(config["temporal_downsample"]) and len(multipliers) > 1,
        "filters must be at least spatial_latent_channels": width >= config["spatial_latent_channels"],
    }
    check_rules("temporal VAE", rules)
