"""The commands and snippets that README, docs/ and the docstrings of commands show."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("assets/*/README.md")]
)
ENTRIES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


class Example(NamedTuple):
    """A command line on one line, or a Python snippet, and the page that shows it."""

    page: str
    language: str
    text: str


def program(line: str) -> tuple[str, list[str]] | None:
    """The module of mg.cli that a line runs, and its arguments."""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        name = re.sub(r"^\$\(which (mg-[\w-]+)\)$", r"\1", word)
        if name in ENTRIES:
            return ENTRIES[name].partition(":")[0], words[place + 1 :]
        if re.fullmatch(r"(scripts|tools)/\w+\.py", word):
            return re.search(r"mg\.cli\.\w+", (ROOT / word).read_text(encoding="utf-8"))[0], words[place + 1 :]
    return None


def shell_commands(block: str) -> list[str]:
    """The lines that start a program of this repository, continued lines joined and variables replaced."""
    variables: dict[str, str] = {}
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), line)
        if assigned := re.fullmatch(r"(\w+)=(?:\"(.*)\"|(\S*))", line):
            variables[assigned[1]] = assigned[2] or assigned[3]
        elif program(line):
            commands.append(" ".join(line.split()))
    return commands


def page_examples(page: Path) -> list[Example]:
    """In the order of the page."""
    found = []
    for language, block in re.findall(
        r"^```(shell|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        texts = [block] if language == "python" else shell_commands(block)
        found += [Example(str(page.relative_to(ROOT)), language, text) for text in texts]
    return found


def docstring_examples(module: str) -> list[Example]:
    """The commands that a module's docstring shows, indented."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    lines = re.sub(r"\\+\n", " ", path.read_text(encoding="utf-8").split('"""')[1]).splitlines()
    return [
        Example(str(path.relative_to(ROOT)), "shell", " ".join(line.split()))
        for line in lines
        if line.startswith("    mg-")
    ]


def examples() -> list[Example]:
    """All of them, pages first."""
    found = [example for page in PAGES for example in page_examples(page)]
    return found + [example for entry in ENTRIES.values() for example in docstring_examples(entry.partition(":")[0])]
