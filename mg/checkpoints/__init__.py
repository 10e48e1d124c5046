"""Reading and writing weights: safetensors, PyTorch files without torch, MindSpore's .ckpt.

Files are never trusted: nothing in them is executed, every size they claim is checked before it is used, and anything
wrong raises a single CheckpointError that names the file. Writing is atomic. Neither MindSpore nor torch is needed.
"""

from mg.checkpoints.atomic import atomic_write, naming, sync
from mg.checkpoints.folder import where_from
from mg.checkpoints.numpy_pickle import read_numpy_pickle
from mg.checkpoints.report import CheckpointError, LoadReport, compare_names, rename, rename_back
from mg.checkpoints.state_dict import (
    StateDict,
    check_finite,
    find_config,
    open_state_dict,
    read_config,
    read_state_dict,
    write_state_dict,
)

__all__ = [
    "CheckpointError",
    "LoadReport",
    "StateDict",
    "atomic_write",
    "check_finite",
    "compare_names",
    "find_config",
    "naming",
    "open_state_dict",
    "read_config",
    "read_numpy_pickle",
    "read_state_dict",
    "rename",
    "rename_back",
    "sync",
    "where_from",
    "write_state_dict",
]
