"""Imports in mg/ run downward: a room imports only from the rooms below it."""

import ast
from pathlib import Path

import mg

PACKAGE = Path(mg.__file__).parent

# From the bottom to the top.
ROOMS = """
    launcher memory plain_text settings overlap tiling packages config checkpoints runtime sampling collectives
    data latents codec models losses text diffusion deploy evaluation inference training benchmark generation ascend cli
""".split()


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, also within functions."""
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    names = {node.module for node in found if node.module}
    names |= {f"mg.{alias.name}" for node in found if node.module == "mg" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("mg.")}


def test_every_room_imports_only_from_those_below():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":  # the top-level names, from any room
            continue
        above = set(ROOMS[ROOMS.index(room) + 1 :])
        upward += [f"{path.relative_to(PACKAGE)} imports mg.{other}" for other in imported(path) & above]
    assert not upward


def test_all_rooms_have_a_place():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(ROOMS)
