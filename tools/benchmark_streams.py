"""The command mg-benchmark-streams by its path in the repository: mg/cli/benchmark_streams.py."""

from mg.cli.benchmark_streams import run

if __name__ == "__main__":
    run()
