"""Make train and test clips from the photographs that come with scikit-image; nothing is downloaded.

    mg-make-clips --output_dir outputs/clips
    mg-make-clips --output_dir outputs/photographs --train_clips 0 --test_clips 0 --images

writes videos/*.mp4, train.csv and test.csv (video, caption), and with --images also the train photographs themselves,
images/*.png and images.csv (path, caption). A second run with the same options does nothing.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from mg.config import parse_config, run_command_line
from mg.data.synthetic import ClipSettings, make_clips, make_images


@dataclass(frozen=True, kw_only=True)
class Options(ClipSettings):
    """Options of make_clips.

    Attributes:
        output_dir: the folder to write to.
        images: also write the train photographs.
    """

    output_dir: str
    images: bool = False


def main() -> None:
    options = parse_config(Options, "Make clips from photographs with simulated camera motion.")
    settings = ClipSettings(**{field.name: getattr(options, field.name) for field in fields(ClipSettings)})
    folder = Path(options.output_dir)
    if options.images:
        print(f"{folder / 'images.csv'}: {'written' if make_images(folder) else 'there already'}")
    if settings.train_clips or settings.test_clips:
        written = make_clips(folder, settings)
        print(f"{folder / 'train.csv'}, {folder / 'test.csv'}: {'written' if written else 'there already'}")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
