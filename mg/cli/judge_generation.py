"""Measure whether a denoiser heeds its captions, and what it makes of a first frame that it is given.

    mg-judge-generation --config configs/generation/quickstart/inference.yaml --csv_path clips/train.csv \
        --test_csv_path clips/test.csv --validation outputs/train/validation.jsonl --save_dir outputs/judged

takes the configs of mg-generate, and writes judged.json. Clips are generated under all captions from the same noise; a
caption is heeded where the nearest of all training clips has it.
"""

from collections.abc import Iterator

from tqdm import tqdm

from mg import runtime
from mg.config import parse_config, run_command_line
from mg.generation.judging import FILE, JudgeConfig, judge


def main() -> None:
    config = parse_config(JudgeConfig, __doc__.splitlines()[0])
    runtime.setup(config.device, config.mode, config.seed)
    found = judge(config, lambda batches: _bar(batches, config))
    for name, each in found["captions"].items():
        what = "caption" if name == "all" else f"part {name} of the caption"
        print(
            f"{what}: heeded by {each['share']:.0%} of {found['generated']} clips, by chance {each['chance']:.0%} "
            f"({each['different']} of them); the nearest clip of the same one has {each['own']:.2f} dB, of another "
            f"{each['others']:.2f} dB"
        )
    if first := found.get("first_frames"):
        print(
            f"first frame given: {first['kept']:.1f} dB to the autoencoder's reconstruction (100: equal); the frames "
            f"after it {first['after']:.2f} dB to the true ones, held still {first['still']:.2f} dB; nearer than that "
            f"{first['nearer']:.0%} of {first['clips']} clips"
        )
    if loss := found.get("validation"):
        print(
            f"validation loss: {loss['trained']:.4f}; untrained {loss['untrained']:.4f}, of answering the mean "
            f"{loss['baseline']:.4f}"
        )
    print(f"see {config.save_dir}/{FILE}")


def _bar(batches: list, config: JudgeConfig) -> Iterator:
    yield from tqdm(batches, desc="clips", unit="batch", disable=not config.verbose)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
