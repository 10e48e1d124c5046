"""README, docs/ and docstrings of commands: links lead somewhere, and programs accept every command."""

import importlib
import re
import sys
from pathlib import Path

from documents import PAGES, ROOT, examples, program


class Parsed(Exception):
    """The command's options were accepted."""


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them"""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def test_every_command_is_accepted_by_its_program(monkeypatch, capsys):
    """Options, their values and the config files that are named; other files need not exist."""
    monkeypatch.chdir(ROOT)
    commands, refused = [example for example in examples() if example.language == "shell"], []
    assert len(commands) > 80
    for page, _, line in commands:
        module, arguments = program(re.sub(r"\b[A-Z]+_FOLDER\b", "x", line))
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
                refused.append(f"{page}: {line}\n    {capsys.readouterr().err.strip()}")
    assert not refused, "\n".join(refused)
