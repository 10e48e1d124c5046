"""The command mg-benchmark-loader by its path in the repository: mg/cli/benchmark_loader.py."""

from mg.cli.benchmark_loader import run

if __name__ == "__main__":
    run()
