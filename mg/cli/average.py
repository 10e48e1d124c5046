"""Average the weights of several checkpoints of one model, or move part of the way from one to another.

    mg-average --src outputs/run_5/tae.ckpt outputs/run_6/tae.ckpt --target outputs/average.ckpt
    mg-average --src outputs/inflated.ckpt outputs/tae_small/tae.ckpt --shares 0.6 0.4 --target outputs/between.ckpt

The average of runs that started from the same weights is often better than each of them (model soups, arXiv
2203.05482). The average of a model and its fine-tuned version keeps much of what training gained and loses less where
the new clips are no guide (WiSE-FT, arXiv 2109.01903).
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mg.checkpoints import StateDict, open_state_dict
from mg.cli.convert import MODELS, fitting_weights, target_files, target_format, whole_config, write_target
from mg.config import parse_config, require, run_command_line
from mg.models.stored import StoredModel


@dataclass
class Options:
    """What to average.

    Attributes:
        src: two or more checkpoints of models with the same config, in any format that mg-convert reads.
        target: .safetensors or .ckpt file, or folder, to write, in our names.
        shares: of each source in the average, divided by their sum; by default all are equal.
        dtype: precision of the weights in the target.
    """

    src: list[str]
    target: str
    shares: list[float] = field(default_factory=list)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self):
        require(len(self.src) > 1, self, "src", "at least two checkpoints")
        fit = not self.shares or len(self.shares) == len(self.src)
        require(fit, self, "shares", f"as many numbers as there are checkpoints, {len(self.src)}")
        require(all(0 < share < float("inf") for share in self.shares), self, "shares", "numbers above 0")


def main() -> None:
    options = parse_config(Options, "Average the weights of several checkpoints of one model.")
    shares = np.array(options.shares or [1] * len(options.src), np.float64)
    shares /= shares.sum()

    with ExitStack() as opened:
        sources = [opened.enter_context(open_state_dict(path)) for path in options.src]
        model, config = described(sources[0])
        for source in sources[1:]:
            check_alike(source, model, config, sources[0])
        written = target_format("ours", model)
        files = target_files(options.target, written, *options.src)
        average: dict[str, np.ndarray] = {}
        for source, share in zip(sources, shares):
            for name, value in fitting_weights(source, model, config).items():
                average[name] = average.get(name, 0) + share * value.astype(np.float64)

    state = {name: value.astype(np.float32) for name, value in average.items()}
    write_target(files, state, written, config, options.dtype)
    print(f"{options.target}: " + " + ".join(f"{share:.3g} x {path}" for share, path in zip(shares, options.src)))


def described(source: StateDict) -> tuple[type[StoredModel], dict]:
    """The model that a checkpoint holds, and its whole config."""
    model = MODELS.model_class(MODELS.model_name(source))
    return model, whole_config(source, model)


def check_alike(source: StateDict, model: type[StoredModel], config: dict, first: StateDict) -> None:
    """
    Raises:
        ValueError: it holds another model than the first checkpoint, or one with another config.
    """
    other, values = described(source)
    if other is not model:
        raise ValueError(f"{source} is a {other.name} and {first} a {model.name}: they have no average")
    for key, value in values.items():
        if value != config[key]:
            raise ValueError(f"{source} and {first} have no average: {key} is {value!r} and {config[key]!r}")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
