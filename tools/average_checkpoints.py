"""The command mg-average by its path in the repository: mg/cli/average.py."""

from mg.cli.average import run

if __name__ == "__main__":
    run()
