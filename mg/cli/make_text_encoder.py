"""Make a small text encoder with random weights for the words of a CSV's captions, if T5 can't be downloaded.

    mg-make-text-encoder --csv_path train.csv --output_dir outputs/text_encoder

writes a folder for text_encoder.from_pretrained. The words mean nothing to it; a denoiser trained with it learns what
each word should mean, and needs the same folder from then on.
"""

from dataclasses import dataclass
from pathlib import Path

from mg import runtime
from mg.config import parse_config, require, run_command_line
from mg.data.index import read_index
from mg.text.words import make_word_encoder, words_of


@dataclass(kw_only=True)
class Options:
    """Options of make_text_encoder.

    Attributes:
        csv_path: a CSV with a column `caption` or `text`.
        output_dir: the folder to write to.
        channels: of the encoded captions.
        seed: of the weights.
    """

    csv_path: str
    output_dir: str
    channels: int = 64
    seed: int = 0

    def __post_init__(self):
        require(self.channels >= 1, self, "channels", "at least 1")
        require(self.seed >= 0, self, "seed", "at least 0")


def main() -> None:
    options = parse_config(Options, __doc__.splitlines()[0])
    runtime.setup("cpu", "pynative")
    words = words_of(row.caption for row in read_index(options.csv_path))
    if not words:
        raise ValueError(f"{options.csv_path}: no row has a caption; it needs a column 'caption' or 'text'")
    make_word_encoder(Path(options.output_dir), words, options.channels, options.seed)
    print(f"{options.output_dir}: a text encoder for {len(words)} words")


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
