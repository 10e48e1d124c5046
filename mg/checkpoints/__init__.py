"""Reading and writing weights: safetensors, PyTorch's files without torch, MindSpore's .ckpt.

A file from elsewhere is never trusted: nothing in it runs, no size that it claims is believed before it is checked,
and whatever is wrong with it comes out as one CheckpointError that names the file. Files are written whole or not at
all. Neither MindSpore nor torch is needed.
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
