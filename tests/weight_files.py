"""Small weight files of every format that `mg.checkpoints` reads."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from mg.checkpoints import write_state_dict


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "transposed": rng.standard_normal((5, 2)).astype(np.float32).T,
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "long": np.arange(300, dtype=np.int64),
        "bytes": np.array([0, 255], np.uint8),
        "switch": np.array([True, False]),
        "special": np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40], np.float32),
    }


def whole_files(folder: Path) -> list[Path]:
    """One good file of every format."""
    write_state_dict(folder / "w.safetensors", some_tensors(), "bf16", {"format": "np"})
    write_state_dict(folder / "w.ckpt", some_tensors())
    torch = pytest.importorskip("torch")
    state = OrderedDict((name, torch.from_numpy(array)) for name, array in some_tensors().items())
    torch.save({"state_dict": state, "epoch": 1}, folder / "w.pt")
    torch.save(state, folder / "w.bin", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())
