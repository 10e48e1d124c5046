"""Measure how often a denoiser follows captions, and how well it keeps and continues a given first frame.

    mg-judge-generation --config configs/generation/quickstart/inference.yaml --csv_path clips/train.csv \
        --test_csv_path clips/test.csv --validation outputs/train/validation.jsonl --save_dir outputs/judged

reads the configs of mg-generate and writes judged.json. Clips are generated for all captions from the same noise; a
caption is followed if the nearest of all training clips has it.
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
            f"{what}: followed in {each['share']:.0%} of {found['generated']} clips, by chance {each['chance']:.0%} "
            f"({each['different']} different ones); the nearest clip with the same one has {each['own']:.2f} dB, with "
            f"another {each['others']:.2f} dB"
        )
    if first := found.get("first_frames"):
        print(
            f"given first frame: {first['kept']:.1f} dB to the autoencoder's reconstruction (100: equal); the frames "
            f"after it {first['after']:.2f} dB to the true ones, {first['still']:.2f} dB if it is repeated; better "
            f"than that in {first['nearer']:.0%} of {first['clips']} clips"
        )
    if loss := found.get("validation"):
        print(
            f"validation loss: {loss['trained']:.4f}; untrained {loss['untrained']:.4f}, predicting the mean "
            f"{loss['baseline']:.4f}"
        )
    print(f"see {config.save_dir}/{FILE}")


def _bar(batches: list, config: JudgeConfig) -> Iterator:
    yield from tqdm(batches, desc="clips", unit="batch", disable=not config.verbose)


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
