"""Options come from a YAML file and the command line into dataclasses; every mistake is one line that names it."""

import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from mg.config import parse_config, require, run_command_line, to_dict
from mg.evaluation.pairs import EvaluateConfig
from mg.generation.config import GenerateConfig
from mg.generation.training.config import DenoiserTrainConfig
from mg.models.discriminator import DiscriminatorConfig
from mg.training.autoencoder import TrainConfig

ROOT = Path(__file__).parents[1]
TRAINING = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "train" in (path.parent.name, path.stem))


@dataclass
class Section:
    """A section.

    Args:
        rate: how fast.
        extra: anything.
    """

    rate: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Options:
    """What the test sets.

    Args:
        name: what it is called.
        count: how many.
        fast: whether it hurries.
        mode: how.
        pair: two numbers.
        gait: which.
        paths: where to.
        steps: how far each.
        beside: with whom, one or several.
        section: the section.
    """

    aliases: ClassVar = {"label": "name", "data.label": "name", "how-many": "count", "speed": "section.rate"}

    name: str
    count: int = 3
    fast: bool = False
    mode: Literal["walk", "run"] = "walk"
    pair: tuple[float, float] | None = None
    section: Section = field(default_factory=Section)
    gait: Literal["trot", "pace"] | None = None
    paths: list[str] = field(default_factory=list)
    steps: list[int] | None = None
    beside: list[str] | str = ""

    def __post_init__(self):
        require(self.count >= 0, self, "count", "at least 0")


def parse(*argv: str) -> Options:
    return parse_config(Options, "Do it.", list(argv))


@pytest.fixture
def write(tmp_path):
    def write(content, name="options.yaml") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def test_arguments_override_the_file_and_the_file_the_defaults(write):
    file = write({"name": "file", "count": 5, "section": {"rate": 2.0, "extra": {"a": [1, 2]}}})
    assert parse("--name", "x") == Options("x")
    assert parse("--config", file) == Options("file", 5, section=Section(2.0, {"a": [1, 2]}))
    later = parse("--config", file, "--count=7", "--section.rate", "1e-3", "--section.extra.b", "true")
    assert (later.count, later.section) == (7, Section(1e-3, {"a": [1, 2], "b": True}))
    assert parse("--count", "7", "--config", file).count == 5
    assert parse("--count", "7", "--count", "8", "--name", "x").count == 8
    assert parse("--config", file, "--config", write({"count": 9}, "second.yaml")) == Options(
        "file", 9, section=Section(2.0, {"a": [1, 2]})
    )


def test_a_config_may_come_first_without_its_option(write):
    file, second = write({"name": "file", "how-many": 5}), write({"count": 9}, "second.yaml")
    assert parse(file) == Options("file", 5)
    assert parse(file, "--count", "0", "--paths", "a", "b") == Options("file", 0, paths=["a", "b"])
    assert parse(file, "--config", second) == Options("file", 9) == parse(file, f"--config={second}")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["a.yaml", "b.yaml"], "'b.yaml' belongs to no option; a config goes first or after --config"),
        (["--config", "a.yaml", "b.yaml", "--count", "4"], "'b.yaml' belongs to no option"),
        (["--name", "x", "a.yaml", "--count", "4"], "'a.yaml' belongs to no option"),
        (["--name=x", "a.yaml", "and more"], "'a.yaml and more' belongs to no option"),
        (["--fast", "a.yaml", "--name", "x"], "fast is 'a.yaml'; it must be true or false"),
        (["--steps", "1", "a.yaml", "--name", "x"], "a.yaml"),
        (["nowhere.yaml", "--name", "x"], "nowhere.yaml: No such file"),
        (["configs/vae/train/stage1.py"], "configs/vae/train/stage1.py: configs are YAML files here"),
        (["--config", "stage1.py", "--name", "x"], "stage1.py: configs are YAML files here"),
    ],
)
def test_a_config_at_a_wrong_place_or_of_a_wrong_kind_is_named(write, monkeypatch, tmp_path, argv, message):
    for name in ("a.yaml", "b.yaml"):
        write({"name": "file"}, name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert message in str(error.value)


def test_values_are_read_as_their_types_say(write):
    assert parse("--name", "3", "--pair", "[1, 2.5]", "--section.rate", "2") == Options(
        "3", pair=(1.0, 2.5), section=Section(2.0)
    )
    assert parse("--config", write("name: x\npair: [1, 2]\nsection: {rate: 1e-5}")).section.rate == 1e-5
    assert parse("--config", write("name: x\npair: [1, 2]"), "--pair", "null").pair is None


@pytest.mark.parametrize("on", [["--fast"], ["--fast", "true"], ["--fast=True"], ["--fast", "--count", "4"]])
@pytest.mark.parametrize("off", [["--fast=False"], ["--fast", "false"]])
def test_switches_may_be_bare_or_spelled_out(on, off):
    assert parse("--name", "x", *on).fast is True
    assert parse("--name", "x", *on, *off).fast is False
    assert parse(*off, "--name", "x").fast is False


@pytest.mark.parametrize("given", [["--paths", "a,b: c", "1"], ["--paths=a,b: c", "1"], ["--paths", '["a,b: c", "1"]']])
def test_lists_may_be_written_with_spaces_or_in_brackets(write, given):
    assert parse(*given, "--name", "x").paths == ["a,b: c", "1"]
    assert parse("--name", "x", *given, "--count", "4").paths == ["a,b: c", "1"]
    assert parse("--config", write({"name": "x", "paths": ["file"]}), *given).paths == ["a,b: c", "1"]


def test_a_list_of_one_or_of_numbers_and_one_that_may_be_a_text():
    assert parse("--name", "x", "--paths", "a b").paths == ["a b"]
    assert parse("--name", "x", "--paths", "[]").paths == []
    assert parse("--name", "x", "--steps", "1", "-2").steps == [1, -2]
    assert parse("--name", "x", "--steps", "null").steps is None
    assert parse("--name", "x", "--beside", "a").beside == "a"
    assert parse("--name", "x", "--beside", "a", "b").beside == ["a", "b"]
    with pytest.raises(ValueError, match="steps is"):
        parse("--name", "x", "--steps", "1", "two")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--nam", "x"], "unknown option 'nam'; did you mean 'name'?"),
        (["--name", "x", "--coun", "3"], "unknown option 'coun'; did you mean 'count'?"),
        (["--name", "x", "--section.rte=3"], "unknown option 'section.rte'; did you mean 'section.rate'?"),
        (["--name", "x", "--zzzzzz", "3"], "unknown option 'zzzzzz'; see --help"),
        (["--name", "x", "--count", "many"], "count is 'many'; it must be a whole number"),
        (["--name", "x", "--count", "1.5"], "count is '1.5'; it must be a whole number"),
        (["--name", "x", "--section.rate", "fast"], "section.rate is 'fast'; it must be a number"),
        (["--name", "x", "--section", "3"], "section is '3'; it must be a section with its own keys"),
        (["--name", "x", "--fast", "perhaps"], "fast is 'perhaps'; it must be true or false"),
        (["--name", "x", "--mode", "fly"], "mode is 'fly'; it must be one of walk, run"),
        (["--name", "x", "--pair", "[1]"], "pair is '[1]'; it must be tuple[float, float] | null"),
        (["--name", "x", "--count", "-1"], "count is -1; it must be at least 0"),
        ([], "--name (or --label) must be given"),
    ],
)
def test_a_wrong_argument_is_named_with_a_remedy(argv, message):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"name": "x", "conut": 3}, "unknown option 'conut'; did you mean 'count'?"),
        ({"name": "x", "section": {"rat": 3}}, "unknown option 'section.rat'; did you mean 'section.rate'?"),
        ({"name": "x", "section": {"rate": "fast"}}, "section.rate is 'fast'; it must be a number"),
        ({"name": "x", "section": 3}, "section is 3; it must be a section with its own keys"),
        ("name: [1\n", "options.yaml: not a YAML file"),
        ("- name\n", "options.yaml: a config holds keys and values"),
        ("", "options.yaml: a config holds keys and values"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_a_wrong_file_is_named_with_a_remedy(write, content, message, joined):
    file = write(content)
    with pytest.raises(ValueError) as error:
        parse(*([f"--config={file}"] if joined else ["--config", file]))
    assert message in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml: No such file"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    "argv",
    [
        ["--label", "x", "--how-many=4", "--speed", "1e-3"],
        ["--data.label=x", "--count", "4", "--section.rate=1e-3"],
        ["--label", "z", "--label", "x", "--name", "x", "--how-many", "4", "--speed=1e-3"],
    ],
)
def test_an_option_has_other_names_on_the_command_line(argv):
    assert parse(*argv) == Options("x", 4, section=Section(1e-3))


@pytest.mark.parametrize(
    "content",
    [
        "label: x\nhow-many: 4\nspeed: 1e-3",
        "data: {label: x}\ncount: 4\nsection: {extra: {label: z}}\nspeed: 1e-3",
        "data.label: x\nname: x\nhow-many: 4\nsection: {rate: 1e-3}",
    ],
)
def test_an_option_has_other_names_in_a_file(write, content):
    options = parse("--config", write(content))
    options.section.extra.pop("label", None)  # within a section, it is no other name
    assert options == Options("x", 4, section=Section(1e-3))


def test_other_names_keep_the_order_of_files_and_arguments(write):
    file = write("label: file\nhow-many: 5")
    assert parse("--config", file, "--name", "later", "--how-many=6") == Options("later", 6)
    assert parse("--count", "7", f"--config={file}") == Options("file", 5)
    assert parse("--config", write("name: a", "a.yaml"), "--config", file, "--data.label", "b") == Options("b", 5)


@pytest.mark.parametrize(
    "argv, content, message",
    [
        (["--name", "x", "--label=y"], "count: 1", "--name is 'x' and --label is 'y', but they are one option"),
        (["--label", "x", "--data.label", "y"], "count: 1", "--label is 'x' and --data.label is 'y', but they are one"),
        ([], "name: x\ndata: {label: y}", "options.yaml: name is 'x' and data.label is 'y', but they are one option"),
        ([], "section: 3\nspeed: 2", "options.yaml: section is 3; it must be a section with its own keys"),
        (["--name", "x"], "how-many: many", "count is 'many'; it must be a whole number"),
        (["--lable", "x"], "count: 1", "unknown option 'lable'; did you mean 'label'?"),
        (["--name", "x"], "data: {label: x, lbl: 3}", "unknown option 'data"),
    ],
)
def test_two_values_under_two_names_are_named_with_both(write, argv, content, message):
    with pytest.raises(ValueError) as error:
        parse("--config", write(content), *argv)
    assert message in str(error.value)


def test_to_dict_returns_what_a_file_can_hold(write):
    options = Options("x", 4, True, "run", (1.0, 2.0), Section(0.5, {"a": {"b": 1}}))
    values = to_dict(options)
    assert values["section"] == {"rate": 0.5, "extra": {"a": {"b": 1}}}
    assert parse("--config", write(yaml.safe_dump(values | {"pair": list(values["pair"])}))) == options


def test_help_says_what_the_docstrings_say_under_the_sections_titles(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.startswith("usage: ") and len(text.split("\n\n")[0].splitlines()) == 1
    for line in (
        "Do it.",
        "What the test sets:",
        "  --count COUNT         how many. Also --how-many. (type: int, default: 3)",
        "  --fast {true,false}   whether it hurries. (default: False)",
        "  --mode {walk,run}     how. (default: walk)",
        "  --pair PAIR           two numbers. (type: tuple[float, float] | null, default: null)",
        "  --gait GAIT           which. (type: trot | pace | null, default: null)",
        "                        print the resulting config as YAML, and exit",
        "the section:",
        "  --section.rate RATE   how fast. Also --speed. (type: float, default: 1.0)",
    ):
        assert line in text.splitlines()
    assert "what it is called. Also --label, --data.label. (required, type: str)" in text
    assert "configuration file" not in text  # jsonargparse's own --section


@dataclass
class Files:
    """Files.

    Args:
        target: what to write.
    """

    target: Path


def test_help_calls_a_path_a_path(capsys):
    with pytest.raises(SystemExit):
        parse_config(Files, "", ["--help"])
    assert "what to write. (required, type: Path)" in " ".join(capsys.readouterr().out.split())


def test_every_option_of_training_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainConfig, "", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("csv_path", "model.config", "loss.kl_weight", "optim.lr", "data.image_ratio", "jit_level"):
        after = text.split(f"--{name} ", 1)[1].split(maxsplit=1)[1]  # past the placeholder
        assert after[0].islower() or after[0] == "L", (name, after[:40])


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (None, 0, ""),
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x.csv"), 2, "error: x.csv: No such file\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_script_ends_with_one_line_and_a_code(raised, code, said, capsys):
    def main():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as end:
        run_command_line(main)
    assert (end.value.code or 0, capsys.readouterr().err) == (code, said)


def test_a_fault_of_the_program_keeps_its_traceback():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command_line(main)


def test_every_command_accepts_the_same_names_for_frames_and_stride():
    clips = ["--num_frames", "8", "--frame_stride", "2"]
    folders = ["--real_video_dir", "a", "--generated_video_dir", "b"]
    evaluate = parse_config(EvaluateConfig, "", [*folders, *clips])
    generate = parse_config(GenerateConfig, "", ["--image_size", "16", "16", *clips])
    assert (evaluate.num_frames, evaluate.frame_stride) == (generate.num_frames, generate.frame_interval) == (8, 2)
    for config in (TrainConfig, DenoiserTrainConfig):
        section = [argument.replace("--", "--data.") for argument in clips]
        data = parse_config(config, "", ["--csv_path", "train.csv", *section]).data
        assert (data.sample_n_frames, data.sample_stride) == (8, 2)


def test_training_takes_its_config_first(tmp_path):
    (tmp_path / "run.yaml").write_text("csv_path: of the file.csv\n")
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train_vae.py"), "run.yaml", "--output_path", "out", "--print_config"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    assert (printed["csv_path"], printed["output_path"]) == ("of the file.csv", "out")


def test_a_mistake_on_the_command_line_of_training_shows_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train_tae.py"), "--csv_path", "nowhere.csv", "--optim.lrr", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown option 'optim.lrr'; did you mean 'optim.lr'?\n"
    assert list(tmp_path.iterdir()) == []


def set_keys(node: yaml.MappingNode, defaults, aliases: dict, prefix: str = ""):
    """The options that a config file sets: dotted name, line, and default. Sections of open keys are one option."""
    for key, value in node.value:
        name = aliases.get(prefix + key.value, prefix + key.value)
        default = defaults
        for part in name.split("."):
            default = getattr(default, part, None)
        within = isinstance(value, yaml.MappingNode)
        if within and (is_dataclass(default) or any(alias.startswith(f"{name}.") for alias in aliases)):
            yield from set_keys(value, defaults, aliases, f"{name}.")
        else:
            yield name, key.start_mark.line, default


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_each_line_of_a_shipped_training_config_differs_from_the_defaults_or_has_a_comment(path):
    of_denoiser = "generation" in path.parts
    cls = DenoiserTrainConfig if of_denoiser else TrainConfig
    defaults = cls(csv_path="x") if of_denoiser else cls(csv_path="x", discriminator=DiscriminatorConfig())
    config = parse_config(cls, "", [str(path), "--csv_path", "train.csv"])
    lines = path.read_text(encoding="utf-8").splitlines()
    for name, number, default in set_keys(yaml.compose("\n".join(lines)), defaults, cls.aliases):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        names_part = name.endswith(("name", "type"))  # of a model or a schedule: what the recipe is for
        assert value != default or names_part or "#" in lines[number], f"{path.name}: {lines[number]} is the default"
