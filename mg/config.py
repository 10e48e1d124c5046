"""YAML files and `--a.b value` overrides -> nested dataclasses, with help texts taken from their docstrings."""

import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser

T = TypeVar("T")


def parse_config(cls: type[T], description: str, argv: list[str] | None = None) -> T:
    """Fill the dataclass `cls` from the command line and the YAML file that `--config` names.

    Later arguments win over earlier ones, and over the file where it stands before them. A switch may be written
    `--flag`, `--flag true` or `--flag=False`.

    Args:
        description: one line for `--help`.
        argv: the arguments, by default the process's own.

    Raises:
        ValueError: an unknown key (the nearest one is named), a wrong type, a missing file.
    """
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; its keys are the options below")
    parser.add_class_arguments(cls)
    actions = {option: action for action in parser._actions for option in action.option_strings}
    try:
        parsed = parser.parse_args(_spell_out_switches(sys.argv[1:] if argv is None else argv, actions))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), actions)) from error
    values = vars(parser.instantiate(parsed))
    return cls(**{field.name: values[field.name] for field in fields(cls)})


def to_dict(config) -> dict:
    """A dataclass, nested ones too, as plain values for YAML or JSON."""
    if hasattr(config, "__dataclass_fields__"):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    return config


def run_command_line(main: Callable[[], int | None]) -> None:
    """Run a script's `main`; a user's mistake becomes one line on stderr and exit code 2, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)


def _spell_out_switches(argv: list[str], actions: dict) -> list[str]:
    """`--flag` alone -> `--flag=true`, where --flag is a bool."""
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        is_switch = getattr(actions.get(argument), "_typehint", None) is bool
        spelled.append(f"{argument}=true" if is_switch and following.startswith("--") else argument)
    return spelled


def _explain(message: str, options: Iterable[str]) -> str:
    """jsonargparse's message, and the nearest option where a key is unknown."""
    unknown = re.search(r"unrecognized arguments: --([\w.\-]+)", message)
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    plain = re.search(r"Option '([\w.]+)' is not accepted", message)
    if not (unknown or group or plain):
        return message
    key = ".".join((group or unknown or plain).groups())
    near = difflib.get_close_matches(key, [option.removeprefix("--") for option in options], 1, cutoff=0.5)
    return f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")
