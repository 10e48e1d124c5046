"""A TAE's starting point for training: the layers on its straight path fitted to clips, in closed form, in seconds.

An untrained TAE is almost linear: its residual branches start at zero, and the last norm and SiLU of encoder and
decoder pass their input through (`mg.models.layers.resnet`). What remains (the first and last convolutions, the
shortcuts, the downsampling and upsampling convolutions) is a chain of small linear maps. Downsampling keeps the
principal components of the pixels or frames that it merges; upsampling is fitted by least squares, layer by layer, to
the features before the downsampling. The branches then learn what a linear map cannot do.

Features are as in `mg.models.layers.least_squares`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mg.models.layers.least_squares import COLOURS, Features, Layers, check_rules, merge, principal
from mg.models.layers.resnet import through_transparent


def linear_start(
    state: Mapping[str, np.ndarray], config: Mapping, clips: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Fit the straight path of an untrained TAE.

    Args:
        state: its parameters.
        config: its config.
        clips: (3, T, H, W) in [-1, 1], T, H and W multiples of the compression.

    Returns:
        The parameters that change.

    Raises:
        ValueError: a config whose straight path is not supported, or clips too few or too uniform for its channels.
    """
    _check(config)
    widths = [config["ch"] * multiplier for multiplier in config["ch_mult"]]
    halved = config["temporal_downsample_level"]
    layers = _Layers(state)
    pixels = [clip.transpose(1, 2, 3, 0) for clip in clips]

    h = layers.put("encoder.conv_in.conv_spat", pixels, COLOURS.T)
    passed = []  # the features before each halving of the frame
    for level, width in enumerate(widths[:-1]):
        passed.append(h)
        layers.pass_on(f"encoder.down.{level}.block.0.nin_shortcut.conv_spat", h)
        h = layers.halve(f"encoder.down.{level}.downsample_spat.conv", h, width, frames=1, side=2)
        if level in halved:
            h = layers.halve(f"encoder.down.{level}.downsample_temp.conv", h, width, frames=2, side=1)
    spread, gather = through_transparent(h[0].shape[-1], widths[-1])
    layers.put(f"encoder.down.{len(widths) - 1}.block.0.nin_shortcut.conv_spat", h, spread)
    components = principal(h, config["z_channels"])
    z = [part @ components.astype(np.float32) for part in h]
    deviation = np.sqrt(sum(np.square(part).sum((0, 1, 2)) for part in z) / sum(part[..., 0].size for part in z))
    if not deviation.min() > 1e-6 * deviation.max():
        raise ValueError(f"the clips are too few or too uniform to fit {len(deviation)} latent channels to; give more")
    z = [part / deviation for part in z]
    layers.put("encoder.conv_out.conv_spat", [], gather @ (components / deviation))

    h = layers.fit("decoder.conv_in.conv_spat", z, h, _around)
    for level in range(len(widths) - 1, 0, -1):
        h = layers.pass_on(f"decoder.up.{level}.block.0.nin_shortcut.conv_spat", h)
        target, doubles = passed[level - 1], level - 1 in halved
        h = layers.fit(
            f"decoder.up.{level}.upsample_spat.conv",
            [part.repeat(2, 1).repeat(2, 2) for part in h],
            [merge(part, 2, 1) for part in target] if doubles else target,
            _around,
        )
        if doubles:
            h = layers.fit(f"decoder.up.{level}.upsample_temp.conv", [part.repeat(2, 0) for part in h], target, _along)
    h = [part[..., : len(COLOURS)] for part in h]
    spread, gather = through_transparent(len(COLOURS), widths[0])
    layers.put("decoder.up.0.block.0.nin_shortcut.conv_spat", h, spread)
    layers.fit("decoder.conv_out.conv_spat", h, pixels, _around, before=gather)
    return layers.changed


class _Layers(Layers):
    """The layers, and what each of them is made to do: new weights, and zero biases where the input has both signs."""

    def put(self, name: str, h: Features, matrix: np.ndarray) -> Features:
        """Make a layer multiply every pixel by `matrix`, (Cin, Cout)."""
        self._set(name, matrix[None], 1)
        return [part @ matrix.astype(np.float32) for part in h]

    def pass_on(self, name: str, h: Features) -> Features:
        """Make a shortcut, if there is one, change only the number of channels."""
        if f"{name}.weight" not in self.state:
            return h
        return self.put(name, h, np.eye(h[0].shape[-1])[:, : len(self.state[f"{name}.weight"])])

    def halve(self, name: str, h: Features, most: int, frames: int, side: int) -> Features:
        """Make a layer output the principal components of the blocks that it merges, divided by sqrt(taps)."""
        channels, taps = h[0].shape[-1], frames * side * side
        h = [merge(part, frames, side) for part in h]
        components = principal(h, min(most, h[0].shape[-1]))
        self._set(name, components.reshape(taps, channels, -1) / taps**0.5, taps)
        return [part @ components.astype(np.float32) / np.float32(taps**0.5) for part in h]

    def fit(
        self,
        name: str,
        h: Features,
        target: Features,
        taps: Callable[[np.ndarray], np.ndarray],
        before: np.ndarray | None = None,
    ) -> Features:
        """Fit a layer's first channels to bring h as close to the target as possible; its other channels stay random
        and give the next layer more inputs. `before` (C, Cin) is what the input is multiplied by first."""
        square, product = np.zeros(()), np.zeros(())
        for part, wanted in zip(h, target):
            seen = taps(part).reshape(-1, taps(part[:1, :1, :1]).shape[-1])
            square = square + (seen.T @ seen).astype(np.float64)
            product = product + (seen.T @ wanted.reshape(len(seen), -1)).astype(np.float64)
        square += 1e-5 * np.trace(square) / len(square) * np.eye(len(square))
        solved = np.linalg.solve(square, product)
        channels = h[0].shape[-1]
        kernel = solved.reshape(-1, channels, solved.shape[-1])
        weight = self._set(name, kernel if before is None else before @ kernel, len(kernel))
        if before is None:  # (Cout, Cin, kh, kw), all of it
            solved = weight[:, :channels].transpose(2, 3, 1, 0).reshape(solved.shape[0], -1)
        return [taps(part) @ solved.astype(np.float32) for part in h]

    def _set(self, name: str, kernel: np.ndarray, taps: int) -> np.ndarray:
        """Write a kernel (taps, Cin, Cout) into the layer's weight; its other output channels stay as they are."""
        weight = self.state[f"{name}.weight"].copy()  # (Cout, Cin, kh, kw), or (Cout, Cin, 1, kt)
        count, channels = kernel.shape[2], kernel.shape[1]
        weight[:count] = 0
        height, width = weight.shape[2:]
        down, right = {1: (height // 2, width // 2), 2: (0, 1), 4: (0, 0)}.get(taps, (0, 0))
        shape = {1: (1, 1), 2: (1, 2), 4: (2, 2), 3: (1, 3), 9: (3, 3)}[taps]
        placed = kernel.reshape(*shape, channels, count).transpose(3, 2, 0, 1)
        weight[:count, :channels, down : down + shape[0], right : right + shape[1]] = placed
        self.changed[f"{name}.weight"] = weight
        if name.endswith("conv_out.conv_spat"):  # it removed SiLU's offset, which features of both signs don't have
            bias = self.state[f"{name}.bias"].copy()
            bias[:count] = 0
            self.changed[f"{name}.bias"] = bias
        return weight


def _around(x: np.ndarray) -> np.ndarray:
    """What a 3x3 kernel sees, with zeros around the frame. (T, H, W, C) -> (T, H, W, 9C)"""
    _, height, width, _ = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], -1)


def _along(x: np.ndarray) -> np.ndarray:
    """What a kernel of three frames sees, with edges repeated. (T, H, W, C) -> (T, H, W, 3C)"""
    return np.concatenate([np.concatenate([x[:1], x[:-1]]), x, np.concatenate([x[1:], x[-1:]])], -1)


def _check(config: Mapping) -> None:
    multipliers, groups = config["ch_mult"], config["norm_num_groups"]
    down, up = config["temporal_downsample_level"], config["temporal_upsample_level"]
    shuts = [config["ch"] * multipliers[level] // groups for level in (0, -1)]
    rules = {
        "ch_mult must differ between its first two levels, and between its last two": (
            len(multipliers) > 1 and multipliers[0] != multipliers[1] and multipliers[-1] != multipliers[-2]
        ),
        "each norm group must have a multiple of 4 channels": all(size % 4 == 0 for size in shuts),
        "temporal_upsample_level must be temporal_downsample_level with 1 added to each": (
            {level + 1 for level in down} == set(up)
        ),
        "use_quant_conv and use_post_quant_conv must be false": (
            not config["use_quant_conv"] and not config["use_post_quant_conv"]
        ),
    }
    check_rules("TAE", rules)
