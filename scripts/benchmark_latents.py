"""The command mg-benchmark-latents by its path in the repository: mg/cli/benchmark_latents.py."""

from mg.cli.benchmark_latents import run

if __name__ == "__main__":
    run()
