"""Classifier-free guidance (arXiv 2207.12598), the conditional and unconditional halves in one batch."""

from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor


class GuidedModel:
    """A network with classifier-free guidance: its output is pushed away from the unconditional one.

    The batch is [conditional; unconditional]. The first channels of the output are null + scale * (cond - null); all
    others, such as variance values, are the conditional ones.

    Args:
        model, cond, null: as in `Schedule.sample`.
        scale: guidance scale; with 1 the network only runs on the conditional half.
        channels: how many output channels are guided; None for as many as the latents have. Open-Sora 1.0 and 1.1
            sample with 3 of their 4, a relic of RGB images.

    Raises:
        ValueError: a null input that `cond` lacks, or one of another shape.
    """

    def __init__(
        self,
        model: Callable,
        cond: Mapping[str, Any],
        null: Mapping[str, Any],
        scale: float,
        channels: int | None = None,
    ):
        self._model = model
        self._scale = scale
        self._channels = channels
        self._halves = 1 if scale == 1 else 2
        if self._halves == 2 and not null:
            raise ValueError(f"cfg_scale is {scale}, which needs a null caption; without one it must be 1")
        self._inputs = {}
        for name in null:
            if name not in cond:
                raise ValueError(f"{name!r} is in the null inputs but not in the conditional ones")
        for name, value in cond.items():
            if value is not None:
                self._inputs[name] = Tensor(self._doubled(name, _array(value), null.get(name)))

    def _doubled(self, name: str, cond: np.ndarray, null: Any) -> np.ndarray:
        if self._halves == 1:
            return cond
        if null is None:
            return np.concatenate([cond, cond])
        null = _array(null)
        try:
            return np.concatenate([cond, np.broadcast_to(null.astype(cond.dtype), cond.shape)])
        except ValueError:
            raise ValueError(
                f"the null input {name} has the shape {null.shape}, which does not fit the condition's {cond.shape}"
            ) from None

    def __call__(self, z: np.ndarray, t: float, x_mask: np.ndarray | None = None) -> np.ndarray:
        """The guided output.

        Args:
            z: (B, C, T, H, W) in fp32.
            t: the timestep of all samples, on the network's scale.
            x_mask: (B, T) bool, False for given frames.

        Returns:
            (B, C or 2C, T, H, W) in fp32.
        """
        x = Tensor(np.concatenate([z] * self._halves))
        times = Tensor(np.full(len(z) * self._halves, t, np.float32))
        masks = {} if x_mask is None else {"x_mask": Tensor(np.concatenate([x_mask] * self._halves))}
        out = self._model(x, times, **masks, **self._inputs).astype(ms.float32).asnumpy()
        if out.shape[0] != x.shape[0] or out.shape[1] < z.shape[1] or out.shape[2:] != z.shape[2:]:
            raise ValueError(f"the network answers latents of the shape {x.shape} with {out.shape}")
        if self._halves == 1:
            return out
        cond, null = np.split(out, 2)
        guided = z.shape[1] if self._channels is None else self._channels
        out = cond.copy()
        out[:, :guided] = null[:, :guided] + self._scale * (cond[:, :guided] - null[:, :guided])
        return out


def _array(value: Any) -> np.ndarray:
    return value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)
