"""Train the same small denoiser on the latents of several autoencoders, and measure how well it learns on each.

    mg-benchmark-latents --csv_path train.csv --test_csv_path test.csv --num_frames 16 --image_size 128 \\
        --models assets/tae assets/image_vae --output_path outputs/latent_benchmark

writes results.csv, summary.json and report.html, which opens in any browser. Running it again resumes a stopped run,
and trains on no autoencoder twice.
"""

from mg import runtime
from mg.cli import end_of_benchmark
from mg.config import parse_config, run_command_line
from mg.generation.latent_benchmark import format_results, run_latent_benchmark
from mg.generation.latent_learning import LatentBenchmarkConfig


def main() -> int:
    """0 if a denoiser was trained on every autoencoder's latents, 1 if not."""
    config = parse_config(LatentBenchmarkConfig, __doc__.splitlines()[0])
    runtime.setup(config.device, config.mode, config.seed)
    benchmark = run_latent_benchmark(config)
    return end_of_benchmark(benchmark, format_results(benchmark.results))


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
