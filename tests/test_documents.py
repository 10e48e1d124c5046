"""README, docs/ and docstrings of commands: links lead somewhere, and every command is one that its program takes."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("assets/*/README.md")]
)
ENTRIES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


class Parsed(Exception):
    """The command's options were accepted."""


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them"""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_commands(text: str) -> list[str]:
    """The lines of a page's shell blocks that start a program of this repository, continued lines joined"""
    blocks = re.findall(r"^```shell\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if program(line)]


def docstring_commands(text: str) -> list[str]:
    """The commands that a module's docstring shows, indented"""
    lines = re.sub(r"\\+\n", " ", text).splitlines()
    return [line.strip() for line in lines if line.startswith("    mg-")]


def program(line: str) -> tuple[str, list[str]] | None:
    """The module of mg.cli that a line runs, and its arguments"""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        name = re.sub(r"^\$\(which (mg-[\w-]+)\)$", r"\1", word)
        if name in ENTRIES:
            return ENTRIES[name].partition(":")[0], words[place + 1 :]
        if re.fullmatch(r"(scripts|tools)/\w+\.py", word):
            return re.search(r"mg\.cli\.\w+", (ROOT / word).read_text(encoding="utf-8"))[0], words[place + 1 :]
    return None


def shown() -> list[tuple[str, str]]:
    found = [(page.name, line) for page in PAGES for line in shell_commands(page.read_text(encoding="utf-8"))]
    for entry in ENTRIES.values():
        module = entry.partition(":")[0]
        path = ROOT / f"{module.replace('.', '/')}.py"
        found += [(path.name, line) for line in docstring_commands(path.read_text(encoding="utf-8").split('"""')[1])]
    return found


def test_links_lead_to_files_and_headings():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_every_page_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name}" not in readme] == []


def test_every_command_is_one_that_its_program_takes(monkeypatch, capsys):
    """Options, their values and the config files that are named; the other files need not be there."""
    monkeypatch.chdir(ROOT)
    commands, refused = shown(), []
    assert len(commands) > 80
    for place, line in commands:
        module, arguments = program(re.sub(r"\$\w+|[A-Z]+_FOLDER\b", "x", line))
        module = importlib.import_module(module)

        def parse(*arguments, parse=module.parse_config):
            parse(*arguments)
            raise Parsed

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module.__name__, *arguments])
            patch.setattr(module, "parse_config", parse)
            try:
                module.run()
            except Parsed:
                continue
            except SystemExit:
                refused.append(f"{place}: {line}\n    {capsys.readouterr().err.strip()}")
    assert not refused, "\n".join(refused)
