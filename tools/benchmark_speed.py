"""The command mg-benchmark-speed by its path in the repository: mg/cli/benchmark_speed.py."""

from mg.cli.benchmark_speed import run

if __name__ == "__main__":
    run()
