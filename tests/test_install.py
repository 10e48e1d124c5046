"""What `pip install` gives: a package that needs no checkout, a command for each script, the shipped configs."""

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mg
from mg.config import config_file

if sys.version_info >= (3, 11):
    import tomllib
else:  # where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "tools").glob("*.py")])
PROJECT_DATA = ["benchmark/page.html", "benchmark/report.html", "generation/gallery.html", "data/aspects.json"]
PROJECT_DATA += ["generation/latent_report.html"]
PROJECT_DATA += ["ascend/symbols.txt", "py.typed"]
BUILT_FROM = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "mg", "configs"]

# Every command of the distribution, in one process: MindSpore is imported once. Prints where mg is, then the names.
ASK_FOR_HELP = """
import sys
from importlib import metadata

import mg

print(mg.__file__, metadata.version("mg-video"), mg.__version__)
for command in metadata.distribution("mg-video").entry_points:
    sys.argv = [command.name, "--help"]
    try:
        command.load()()
    except SystemExit as stopped:
        print("answered", command.name, stopped.code)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel in it, and the packages of this one but for mg; nothing of the checkout."""
    folder = tmp_path_factory.mktemp("install")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for path in (ROOT / name for name in BUILT_FROM):
        if path.is_dir():
            shutil.copytree(path, source / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    venv.create(environment, symlinks=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    # As plain folders: a .pth file in them, such as that of an editable mg, is not read.
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    python = environment / "bin" / "python"
    pip("--python", python, "install", "--no-deps", next(folder.glob("mg_video-*.whl")))
    return environment


def pip(*arguments: object) -> None:
    """pip, without a network."""
    words = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env={**without_checkout(), "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def without_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(command: Path, *arguments: object, folder: Path) -> str:
    """What an installed command prints, run in `folder`."""
    done = subprocess.run(
        [str(command), *map(str, arguments)], cwd=folder, env=without_checkout(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_of_the_wheel_run_in_any_folder(installed, tmp_path):
    sizes = ["--size", 16, "--num_frames", 2, "--train_clips", 1, "--test_clips", 0]
    run(installed / "bin" / "mg-make-clips", "--output_dir", "clips", *sizes, folder=tmp_path)
    assert len(list((tmp_path / "clips" / "videos").iterdir())) == 1
    shipped = ["--config", "configs/tae/quickstart/train.yaml", "--csv_path", "clips/train.csv", "--print_config"]
    assert "max_steps: 160\n" in run(installed / "bin" / "mg-train", *shipped, folder=tmp_path)


def test_every_command_of_the_wheel_answers(installed, tmp_path):
    said = run(installed / "bin" / "python", "-c", ASK_FOR_HELP, folder=tmp_path)
    file, *versions = said.splitlines()[0].split()
    assert installed in Path(file).parents and versions == [mg.__version__] * 2
    answered = re.findall(r"^answered (.*)$", said, re.MULTILINE)
    assert sorted(answered) == sorted(f"{name} 0" for name in PROJECT["scripts"])
    assert said.count("usage: mg-") == len(PROJECT["scripts"])


def test_the_wheel_has_all_modules_all_configs_and_the_marker_of_types(installed):
    package = next(installed.glob("lib/python*/site-packages/mg"))

    def files(folder: Path, pattern: str) -> list[Path]:
        return sorted(path.relative_to(folder) for path in folder.glob(pattern))

    assert files(package, "**/*.py") == files(ROOT / "mg", "**/*.py")
    assert files(package / "configs", "**/*.yaml") == files(ROOT / "configs", "**/*.yaml")
    for data in PROJECT_DATA:
        assert (package / data).is_file(), data
    assert not (package / "configs").is_symlink()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_thin_over_a_command_that_the_documents_name(script):
    module = re.search(r"^from (mg\.cli\.\w+) import run$", script.read_text(), re.MULTILINE)[1]
    command = f"mg-{module.rpartition('.')[2].replace('_', '-')}"
    assert script.read_text().endswith('import run\n\nif __name__ == "__main__":\n    run()\n')
    assert len(script.read_text().splitlines()) == 6
    assert PROJECT["scripts"][command] == f"{module}:run"
    rows = [
        line for line in (ROOT / "docs" / "commands.md").read_text().splitlines() if line.startswith(f"| `{command}` |")
    ]
    assert len(rows) == 1 and f"`{script.relative_to(ROOT)}`" in rows[0]


def test_every_command_has_a_script_and_every_module_a_command():
    imported = {re.search(r"mg\.cli\.\w+", script.read_text())[0] for script in SCRIPTS}
    modules = {f"mg.cli.{path.stem}" for path in (ROOT / "mg" / "cli").glob("*.py") if path.stem != "__init__"}
    assert {entry.removesuffix(":run") for entry in PROJECT["scripts"].values()} == imported == modules


@pytest.mark.parametrize("entry", PROJECT["scripts"].values())
def test_a_mistake_at_any_command_is_one_line_and_code_2(entry, monkeypatch, capsys):
    module, _, function = entry.partition(":")
    monkeypatch.setattr(sys, "argv", ["command", "--config", "none.yaml"])
    with pytest.raises(SystemExit) as stopped:
        getattr(import_module(module), function)()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: none.yaml: No such file or directory\n"


def test_nothing_in_the_package_imports_the_commands():
    others = [path for path in (ROOT / "mg").rglob("*.py") if path.parent.name != "cli"]
    imports = re.compile(r"^\s*(from|import) mg\.cli|^\s*from mg import .*\bcli\b", re.MULTILINE)
    assert others and not [path for path in others if imports.search(path.read_text())]


def test_a_users_own_config_overrides_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/tae/quickstart/train.yaml"
    shipped = Path(config_file(name))
    assert shipped.is_absolute() and shipped.samefile(ROOT / name)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("max_steps: 1\n")
    assert config_file(name) == name
    for other in ("mine.yaml", "configs/../mg/config.py", str(tmp_path / "configs" / "none.yaml")):
        assert config_file(other) == other
    with pytest.raises(ValueError, match=r"^configs/tae/quickstart/trian.yaml: .*; did you mean " + re.escape(name)):
        config_file("configs/tae/quickstart/trian.yaml")


def test_the_pins_are_within_what_the_package_asks_for():
    listed = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    asked = {asks.name.lower(): asks.specifier for asks in map(Requirement, listed)}
    lines = [line.partition("#")[0].strip() for file in ROOT.glob("requirements*.txt") for line in file.open()]
    pins = [pin for pin in map(Requirement, filter(re.compile("[a-zA-Z]").match, lines)) if pin.name.lower() in asked]
    assert len(pins) > 20
    for pin in pins:
        assert asked[pin.name.lower()].contains(str(pin.specifier).removeprefix("==")), pin
