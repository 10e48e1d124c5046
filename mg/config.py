"""YAML files and `--a.b value` overrides -> nested dataclasses, with help texts from their docstrings."""

import argparse
import difflib
import json
import logging
import re
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
    argv = _name_first(sys.argv[1:] if argv is None else argv)
    argv = _read_files(_rename_arguments(argv, aliases), aliases)
    try:
        parsed = parser.parse_args(_spell_out_switches(_join_lists(argv, actions), actions))
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
    error, or with 130 after Ctrl-C."""
    process = process_name()
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


def _rename_arguments(argv: list[str], aliases: dict[str, str]) -> list[str]:
    """`--alias value` -> `--option value`."""
    renamed: list[str] = []
    given: dict[str, dict[str, str]] = {}  # option -> each name it was given under -> the last value
    for argument, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            option = aliases.get(name, name)
            given.setdefault(option, {})[name] = value if equals else following
            argument = f"--{option}{equals}{value}"
        renamed.append(argument)
    for values in given.values():
        if len(set(values.values())) > 1:
            raise ValueError(_two_values({f"--{name}": value for name, value in values.items()}))
    return renamed


def _read_files(argv: list[str], aliases: dict[str, str]) -> list[str]:
    """`--config FILE` -> `--config=CONTENT` if the file uses other names of options. A file that isn't a config is an
    error that names the file, which jsonargparse's doesn't."""
    result, arguments = [], iter(argv)
    for argument in arguments:
        name = next(arguments, None) if argument == "--config" else argument.removeprefix("--config=")
        if name in (None, argument):  # not a file: leave it to jsonargparse
            result.append(argument)
            continue
        if name.endswith(".py"):
            missing = "" if Path(name).exists() else ", and there is no such file"
            raise ValueError(
                f"{name}: configs are YAML files here{missing}; those that come with mg are in its configs folder"
            )
        name = config_file(name)
        content, taken = _take_aliases(_read_file(name), aliases)
        for alias, value in taken.items():
            if not _is_nothing(value):
                _put(content, aliases[alias], alias, value, name)
        result.append(f"--config={yaml.safe_dump(content, sort_keys=False) if taken else name}")
    return result


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


def _take_aliases(content: dict, aliases: dict[str, str], prefix: str = "") -> tuple[dict, dict]:
    """Split a file's content into the keys that aren't other names of options, and those that are: dotted name ->
    value."""
    kept, taken = {}, {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in aliases:
            taken[name] = value
            continue
        if isinstance(value, dict):
            value, within = _take_aliases(value, aliases, f"{name}.")
            taken |= within
            if within and not value:
                continue  # a section without any other keys
        kept[key] = value
    return kept, taken


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


def _join_lists(argv: list[str], actions: dict) -> list[str]:
    """`--list a b` -> `--list=["a", "b"]` if --list takes a list; a value already written as a list stays."""
    joined, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        hint = getattr(actions.get(option.removeprefix("--")), "_typehint", None) if option.startswith("--") else None
        kinds = [hint] if get_origin(hint) is list else [kind for kind in get_args(hint) if kind is not type(None)]
        lists = [kind for kind in kinds if get_origin(kind) is list]
        if not lists:
            joined.append(argument)
            continue
        values = [value] if equals else []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        one = values[0] if len(values) == 1 else ""
        as_yaml = (one.startswith("[") and one.endswith("]")) or (one == "null" and hint not in lists)
        if len(values) > 1 or (values and lists == kinds and not as_yaml):
            item = get_args(lists[0])[0]
            plain = {"null"} if type(None) in get_args(item) else set(values) if item in (int, float) else set()
            written = [value if value in plain else json.dumps(value) for value in values]
            joined.append(f"{option}=[{', '.join(written)}]")
        else:
            joined += [f"{option}={value}" for value in values] or [option]
    return joined


def _spell_out_switches(argv: list[str], actions: dict) -> list[str]:
    """`--flag` without a value -> `--flag=true`, if --flag may be a bool."""
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        action = actions.get(argument.removeprefix("--")) if argument.startswith("--") else None
        hint = getattr(action, "_typehint", None)
        is_switch = bool in (hint, *get_args(hint))
        spelled.append(f"{argument}=true" if is_switch and following.startswith("--") else argument)
    return spelled


def _explain(message: str, actions: dict) -> str:
    """Shorten jsonargparse's message; suggest the nearest option to an unknown one, name the type a value must have."""
    within = re.search(r'Parser key "(\w+)":.*Problem with given class_path[^\n]*\n\s+(.*?)\n +- ', message, re.DOTALL)
    if within:  # a section that may be null: the same message, about a key in it
        message = re.sub(r"""(Parser key "|Option ')""", rf"\1{within[1]}.", within[2])
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
    stray = re.search(r"unrecognized arguments: ([^-].*?)(?: -|$)", message)
    if stray:
        return f"{stray[1]!r} belongs to no option; a config goes first or after --config, all else after --option"
    unknown = re.search(r"unrecognized arguments: --([\w.\-]+)", message)
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    plain = re.search(r"Option '([\w.]+)' is not accepted", message)
    found = group or unknown or plain
    if not found:
        return message
    key = ".".join(found.groups())
    near = difflib.get_close_matches(key, actions, 1, cutoff=0.5)
    return f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")


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
