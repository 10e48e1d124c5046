"""The command mg-benchmark-memory by its path in the repository: mg/cli/benchmark_memory.py."""

from mg.cli.benchmark_memory import run

if __name__ == "__main__":
    run()
