"""Reconstruct the same clips with several video autoencoders, and measure quality, speed and memory.

    mg-benchmark --csv_path test.csv --video_folder videos --num_frames 17 --image_size 256 \
        --models configs/tae/inference/video_256x256.yaml=tae.ckpt configs/temporal_vae/inference/video.yaml \
        --baseline 8x8 --output_path outputs/benchmark

writes results.csv, summary.json and report.html, which opens in any browser. Running it again resumes a stopped run.
"""

from mg import runtime
from mg.benchmark.quality import BenchmarkConfig, run_benchmark
from mg.benchmark.summary import format_summary
from mg.cli import end_of_benchmark
from mg.config import parse_config, run_command_line


def main() -> int:
    """0 if every model reconstructed every clip, 1 if not."""
    config = parse_config(BenchmarkConfig, __doc__.splitlines()[0])
    runtime.setup(config.device, config.mode)
    benchmark = run_benchmark(config)
    return end_of_benchmark(benchmark, format_summary(benchmark.summary))


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
