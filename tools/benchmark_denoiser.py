"""The command mg-benchmark-denoiser by its path in the repository: mg/cli/benchmark_denoiser.py."""

from mg.cli.benchmark_denoiser import run

if __name__ == "__main__":
    run()
