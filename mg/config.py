"""YAML files and `--a.b value` overrides -> nested dataclasses, with help texts from their docstrings."""

import argparse
import difflib
import itertools
import json
import logging
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, get_loader

from mg.launcher import process_name
from mg.plain_text import one_line
from mg.settings import require as require

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

# What the originals call the index and the output folder.
PATH_ALIASES = {"data_path": "csv_path", "data-path": "csv_path", "save_dir": "output_path", "save-dir": "output_path"}


def parse_config(cls: type[T], description: str, argv: list[str] | None = None) -> T:
    """Fill the dataclass `cls` from the command line and a YAML file, given by `--config` or as the first argument.

    Later arguments override earlier ones, including those of the file. A switch may be written `--flag`, `--flag true`
    or `--flag=False`, a list `--list a b c`, `--list=a b c` or `--list "[a, b, c]"`.

    An option may have other names, on the command line and as keys of a file: the class attribute
    `aliases: ClassVar[dict[str, str]]` maps them to the option's name, dotted for those in a section.

    Args:
        cls: a dataclass whose docstring describes each field.
        description: one line for `--help`.
        argv: the arguments, by default the process's own.

    Raises:
        ValueError: an unknown key (the message suggests the nearest one), a wrong type, a missing or invalid YAML file,
            or two values for one option under two of its names.
    """
    aliases: dict[str, str] = getattr(cls, "aliases", {})
    parser = ArgumentParser(
        description=description,
        usage="%(prog)s [FILE.yaml] [--option value ...]",
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        action="config",
        help="YAML file with the keys below. As the first argument it needs no --config.",
    )
    parser.add_class_arguments(cls)
    actions = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    for field in fields(cls):
        for section in filter(is_dataclass, get_args(field.type)):  # that may be null: the parser sees one option
            for inner in fields(section):
                actions[f"{field.name}.{inner.name}"] = argparse.Namespace(_typehint=inner.type, type=None)
    actions["print_config"].help = "print the resulting config as YAML, and exit"
    for field in fields(cls):
        if is_dataclass(field.type):  # a section may be read from its own file, which needs no mention
            actions[field.name].help = argparse.SUPPRESS
    for name in dict.fromkeys(aliases.values()):
        others = ", ".join(f"--{alias}" for alias in aliases if aliases[alias] == name)
        actions[name].help = f"{actions[name].help or ''} Also {others}.".lstrip()
    actions |= {alias: actions[name] for alias, name in aliases.items()}
    try:
        parsed = parser.parse_args(_spelled_out(_name_first(sys.argv[1:] if argv is None else argv), actions, aliases))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), actions)) from error
    for field in fields(cls):
        if is_dataclass(field.type) and not hasattr(parsed[field.name], "as_dict"):
            raise ValueError(_no_section(field.name, parsed[field.name]))
    try:
        values = vars(parser.instantiate(parsed))
    except ValueError as error:
        within = re.search(r"any of the Union subtypes.*?Errors:\n\s+- ([^\n]*)", str(error), re.DOTALL)
        raise (ValueError(within[1]) if within else error) from error
    return cls(**{field.name: values[field.name] for field in fields(cls)})


def gives_section(name: str, argv: list[str] | None = None) -> bool:
    """Whether a command's arguments, or the config file that they name, set an option or a section.

    Raises:
        ValueError: a file that is missing or isn't YAML.
    """
    argv = _name_first(sys.argv[1:] if argv is None else argv)
    for argument, following in zip(argv, [*argv[1:], ""]):
        option, equals, value = argument.partition("=")
        if option == f"--{name}" or option.startswith(f"--{name}."):
            return True
        file = value if equals else following
        if option == "--config" and file and not file.endswith(".py") and name in _read_file(config_file(file)):
            return True
    return False


def config_file(name: str) -> str:
    """Resolve a config's name: that file or, if it is configs/... and missing, the one that mg ships.

    Raises:
        ValueError: mg ships none of that name either; the message suggests the nearest one.
    """
    path = Path(name)
    if path.exists() or path.parts[:1] != ("configs",) or ".." in path.parts:
        return name
    package = Path(__file__).parent  # its folder configs/ is the repository's, or a copy if mg is installed
    if (package / path).is_file():
        return str(package / path)
    shipped = [str(file.relative_to(package)) for file in package.glob("configs/**/*.yaml")]
    near = difflib.get_close_matches(str(path), shipped, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{name}: there is no such file here, and mg ships no config of that name{hint}")


def to_dict(config) -> dict:
    """Convert a dataclass, including nested ones, to plain values for YAML or JSON."""
    if hasattr(config, "__dataclass_fields__"):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    return config


def run_command_line(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its return value, with 2 and one line on stderr (no traceback) after a user
    error, or with 130 after Ctrl-C or SIGTERM."""
    process = process_name()
    if not process:  # Ctrl-C arrives as SIGTERM where MindSpore has replaced its handler, see mg.runtime.CtrlC
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal's encoding may not support all names and captions
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format=f"{process}%(levelname)s %(name)s: %(message)s")
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        sys.stderr.write(f"{process}error: {one_line(error)}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def exit_status(failed: int, done: int, world_size: int = 1) -> int:
    """The exit status of a command over many clips: 0 if none failed, else 1. With several workers it is 1 only if all
    of a worker's clips failed: msrun kills the others as soon as one doesn't exit with 0."""
    return int(failed > 0 and (world_size == 1 or done == 0))


class _HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter with types in plain words, omitted if an option already lists its choices."""

    def _get_type_str(self, action):
        text = super()._get_type_str(action)
        return None if text is None or (action.metavar or "").startswith("{") else _plain_type(text)


def _name_first(argv: list[str]) -> list[str]:
    """`FILE.yaml ...` -> `--config=FILE.yaml ...`"""
    return [f"--config={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else argv


def _spelled_out(argv: list[str], actions: dict, aliases: dict[str, str]) -> list[str]:
    """Every argument as `--option=value`, by the option's own name: a switch gets its value, the values of a list are
    joined, and a file that uses other names is replaced by its content."""
    spelled, rest = [], list(argv)
    given: dict[str, dict[str, Any]] = {}  # option -> each name it was given under -> the last value
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            stray = " ".join([argument, *_until_option(rest)])
            raise ValueError(
                f"{stray!r} belongs to no option; a config goes first or after --config, all else after --option"
            )
        name, equals, value = argument.removeprefix("--").partition("=")
        option = aliases.get(name, name)
        _check_known(option, actions)
        hint = getattr(actions.get(option), "_typehint", None)
        takes_list = _takes(list, hint)
        values = [value] if equals else []
        if takes_list or not equals:
            values += _until_option(rest, None if takes_list else 1)
        if not values and bool in (hint, *get_args(hint)):
            values = ["true"]
        if not values:
            spelled.append(argument)
            continue
        value = _joined(values, hint) if takes_list else values[0]
        given.setdefault(option, {})[f"--{name}"] = value
        spelled.append(f"--{option}={_file_argument(value, actions, aliases) if option == 'config' else value}")
    for names in given.values():
        if len(set(names.values())) > 1:
            raise ValueError(_two_values(names))
    return spelled


def _until_option(rest: list[str], most: int | None = None) -> list[str]:
    """Take the values in front of the next option from `rest`."""
    count = next((place for place, argument in enumerate(rest[:most]) if argument.startswith("--")), len(rest[:most]))
    values, rest[:] = rest[:count], rest[count:]
    return values


def _read_file(name: str) -> dict:
    try:
        with open(name, encoding="utf-8") as file:
            content = get_loader("yaml")(file.read())
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not a YAML file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: a config holds keys and values, `key: value`; found {str(content)[:40]!r}")
    return content


def _file_argument(name: str, actions: dict, aliases: dict[str, str]) -> str:
    """A file's name, or its content if it uses other names of options."""
    if name.endswith(".py"):
        missing = "" if Path(name).exists() else ", and there is no such file"
        raise ValueError(
            f"{name}: configs are YAML files here{missing}; those that come with mg are in its configs folder"
        )
    name = config_file(name)
    content, taken = _take_aliases(_read_file(name), actions, aliases)
    for alias, value in taken.items():
        if not _is_nothing(value):
            _put(content, aliases[alias], alias, value, name)
    return yaml.safe_dump(content, sort_keys=False) if taken else name


def _take_aliases(content: dict, actions: dict, aliases: dict[str, str], prefix: str = "") -> tuple[dict, dict]:
    """Split a file's content into the keys that are options, and those that are other names: dotted name -> value."""
    kept, taken = {}, {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in aliases:
            taken[name] = value
            continue
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in actions):
            value, within = _take_aliases(value, actions, aliases, f"{name}.")
            taken |= within
            if within and not value:
                continue  # a section without any other keys
        else:
            _check_known(name, actions)
        kept[key] = value
    return kept, taken


def _check_known(name: str, actions: dict) -> None:
    """Raise ValueError, with the nearest option, unless there is an option of that name, or one that holds any keys."""
    *sections, _ = itertools.accumulate(name.split("."), "{}.{}".format)
    open_keys = any(_takes(dict, getattr(actions.get(one), "_typehint", None)) for one in sections)
    if name not in actions and not open_keys:
        near = difflib.get_close_matches(name, actions, 1, cutoff=0.5)
        raise ValueError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help"))


def _put(content: dict, option: str, alias: str, value: Any, file: str) -> None:
    """Set a dotted option in a file's content to the value that it has there under another name."""
    *sections, key = option.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"{file}: {_no_section(section, content)}")
    if content.setdefault(key, value) != value:
        raise ValueError(f"{file}: {_two_values({option: content[key], alias: value})}")


def _is_nothing(value: Any) -> bool:
    """null, or a list of nulls: an option that the originals' configs leave unset."""
    return value is None or (isinstance(value, list) and bool(value) and all(map(_is_nothing, value)))


def _no_section(name: str, value: Any) -> str:
    return f"{name} is {value!r}; it must be a section with its own keys"


def _two_values(given: dict[str, Any]) -> str:
    return " and ".join(f"{name} is {value!r}" for name, value in given.items()) + ", but they are one option"


def _takes(container: type, hint: Any) -> bool:
    return any(get_origin(kind) is container for kind in (hint, *get_args(hint)))


def _joined(values: list[str], hint: Any) -> str:
    """The values of a list as YAML. A single one stays if it is YAML already, or may be of another type than a list."""
    kinds = [hint] if get_origin(hint) is list else [kind for kind in get_args(hint) if kind is not type(None)]
    (item,) = (get_args(kind)[0] for kind in kinds if get_origin(kind) is list)
    one = values[0]
    as_yaml = (one.startswith("[") and one.endswith("]")) or (one == "null" and type(None) in get_args(hint))
    if len(values) == 1 and (as_yaml or len(kinds) > 1):
        return one
    plain = {"null"} if type(None) in get_args(item) else set(values) if item in (int, float) else set()
    return f"[{', '.join(value if value in plain else json.dumps(value) for value in values)}]"


def _explain(message: str, actions: dict) -> str:
    """Shorten jsonargparse's message, and name the type that a value must have."""
    within = re.search(r'Parser key "(\w+)":.*Problem with given class_path[^\n]*\n\s+(.*?)\n +- ', message, re.DOTALL)
    if within:  # a section that may be null: the same message, about a key in it
        message = within[2].replace('Parser key "', f'Parser key "{within[1]}.')
    mistyped = re.search(r'Parser key "([\w.]+)":.*(?:Got value|Given value): (.*)', message, re.DOTALL)
    if mistyped and mistyped[1] in actions:
        return f"{mistyped[1]} is {mistyped[2]!r}; it must be {_type_name(actions[mistyped[1]])}"
    no_path = re.search(r'Parser key "([\w.]+)":\s+Not of type Path', message)
    if no_path:
        return f"{no_path[1]} must be a path"
    no_section = re.search(r"""Parser key "([\w.]+)":\s+Unable to load config '(.*?)'""", message)
    if no_section:
        return _no_section(no_section[1], no_section[2])
    missing = re.search(r"following arguments are required: (.*)", message)
    if missing:
        return f"{' and '.join(_with_other_name(name, actions) for name in missing[1].split(', '))} must be given"
    return message


def _with_other_name(name: str, actions: dict) -> str:
    other = next((key for key, action in actions.items() if action is actions[name] and key != name), None)
    return f"--{name}" + (f" (or --{other})" if other else "")


def _type_name(action: argparse.Action) -> str:
    hint: Any = getattr(action, "_typehint", action.type)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if bool in get_args(hint):
        words = [word for kind in get_args(hint) for word in get_args(kind)]
        return f"true, false or {' or '.join(words)}"
    if any(map(is_dataclass, get_args(hint))):
        return "null or a section with its own keys"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(hint) or (
        hint.__name__ if isinstance(hint, type) and not get_args(hint) else _plain_type(str(hint))
    )


def _plain_type(text: str) -> str:
    """Python's name of a type, which depends on its version, in terms of YAML:
    Optional[Literal['a', 'b']] or Literal['a', 'b'] | None -> a | b | null"""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text.replace("typing.", "").replace("pathlib.Path", "path"))
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), text)
    text = re.sub(r"^Union\[(.*)\]$", lambda found: found[1].replace(", ", " | "), text)
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)
    return re.sub(r"\bNone\b", "null", text)
