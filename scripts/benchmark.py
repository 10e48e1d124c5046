"""The command mg-benchmark by its path in the repository: mg/cli/benchmark.py."""

from mg.cli.benchmark import run

if __name__ == "__main__":
    run()
