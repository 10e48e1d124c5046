"""The layers next to the convolutions: moving pixels to channels and back, averaging, repeating, and gates."""

from mindspore import ops

from mg.models.layers import layout, shortcuts
from mg.models.layers.forms.pieces import InPieces


class Enter(layout.Enter):
    def construct(self, x):
        return layout.swap_frames(x)


class Leave(layout.Leave):
    def construct(self, x):
        return layout.swap_frames(x)


class AverageChannels(shortcuts.AverageChannels):
    def construct(self, x):
        b, t, c, h, w = x.shape
        size = c // self.channels
        total = x.reshape(b * t, self.channels, size, h * w).sum(axis=2)
        return (total * (1 / size)).reshape(b, t, self.channels, h, w)


class RepeatChannels(shortcuts.RepeatChannels):
    def construct(self, x):
        return copied(x, self.channels // x.shape[2])


class PixelsToChannels(shortcuts.PixelsToChannels):
    def construct(self, x):
        b, t, c, h, w = x.shape
        frames = 2 if self.temporal and t > 1 else 1
        pixels = ()
        for frame in ops.unstack(x.reshape(b, t // frames, frames, c, h, w), axis=2):
            even, odd = ops.unstack(frame.reshape(b, t // frames, c, h, w // 2, 2), axis=5)
            even = ops.unstack(even.reshape(b, t // frames, c, h // 2, 2, w // 2), axis=4)
            odd = ops.unstack(odd.reshape(b, t // frames, c, h // 2, 2, w // 2), axis=4)
            pixels += (even[0], odd[0], even[1], odd[1])
        x = ops.stack(pixels, axis=3)  # (B, T / frames, C, frames * 2 * 2, H / 2, W / 2)
        return self.average(x.reshape(b, t // frames, c * frames * 4, h // 2, w // 2))


class ChannelsToPixels(shortcuts.ChannelsToPixels):
    def construct(self, x, frames):
        b, t, c, h, w = x.shape
        x = copied(x, self.channels * frames * 4 // c)
        places = ops.unstack(x.reshape(b, t, self.channels, frames * 4, h, w), axis=3)
        filled = ()
        for i in range(frames):
            top = ops.stack((places[4 * i], places[4 * i + 1]), axis=5).reshape(b, t, self.channels, h, 2 * w)
            bottom = ops.stack((places[4 * i + 2], places[4 * i + 3]), axis=5).reshape(b, t, self.channels, h, 2 * w)
            filled += (ops.stack((top, bottom), axis=4).reshape(b, t, self.channels, 2 * h, 2 * w),)
        x = ops.stack(filled, axis=2) if frames > 1 else filled[0]
        return x.reshape(b, t * frames, self.channels, 2 * h, 2 * w)


class Gate(InPieces, shortcuts.Gate):
    def construct(self, x):
        y, gate = ops.split(x, x.shape[2] // 2, 2)
        return y * ops.silu(gate)


def copied(x, copies: int):
    """Repeat each channel `copies` times. (B, T, C, H, W) -> (B, T, C * copies, H, W)"""
    b, t, c, h, w = x.shape
    return ops.broadcast_to(x.reshape(b * t, c, 1, h, w), (b * t, c, copies, h, w)).reshape(b, t, c * copies, h, w)
