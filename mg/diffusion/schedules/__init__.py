"""Diffusion schedules: how latents are noised in training, and how noise becomes latents in sampling.

| name | follows | trains | samples | frame masks |
|---|---|---|---|---|
| iddpm | improved DDPM (arXiv 2102.09672), as in Open-Sora 1.0 and 1.1 | yes | yes | yes |
| iddpm-speed | SpeeD (arXiv 2405.17403): iddpm with its own timestep sampling and loss weights | yes | no | yes |
| dpm-solver | DPM-Solver++ 2M (arXiv 2211.01095) | no | yes | no |
| rflow | rectified flow (arXiv 2209.03003), as in Open-Sora 1.2 | yes | yes | yes |

A schedule only knows the network as a callable, see `schedule`.
"""

import difflib
import inspect

from mg.diffusion.schedules.dpm_solver import DPMSolver
from mg.diffusion.schedules.iddpm import IDDPM
from mg.diffusion.schedules.noise import SampleNoise
from mg.diffusion.schedules.rectified_flow import RectifiedFlow, timestep_transform
from mg.diffusion.schedules.schedule import Noise, Schedule
from mg.diffusion.schedules.speed import SpeeD

__all__ = [
    "IDDPM",
    "SCHEDULES",
    "DPMSolver",
    "Noise",
    "RectifiedFlow",
    "SampleNoise",
    "Schedule",
    "SpeeD",
    "create_schedule",
    "timestep_transform",
]

SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in (IDDPM, SpeeD, DPMSolver, RectifiedFlow)}
_OTHER_NAMES = {"dmp-solver": "dpm-solver"}  # Open-Sora 1.0's documents spell it this way


def create_schedule(type: str, **config) -> Schedule:
    """Create a schedule by name, with Open-Sora's arguments and defaults.

    Args:
        type: iddpm | iddpm-speed | dpm-solver | rflow.
        config: arguments of its class.

    Raises:
        ValueError: an unknown name or argument, or invalid values; in one line.
    """
    name = _OTHER_NAMES.get(type, type)
    if name not in SCHEDULES:
        raise ValueError(f"there is no schedule {type!r}; the schedules are {', '.join(SCHEDULES)}")
    known = list(inspect.signature(SCHEDULES[name]).parameters)
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its arguments are {', '.join(known)}"
            raise ValueError(f"the schedule {name} has no argument {key!r}; {hint}")
    return SCHEDULES[name](**config)
