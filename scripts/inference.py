"""The command mg-generate by its path in the repository: mg/cli/inference.py."""

from mg.cli.inference import run

if __name__ == "__main__":
    run()
