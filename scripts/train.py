"""The command mg-train by its path in the repository: mg/cli/train.py."""

from mg.cli.train import run

if __name__ == "__main__":
    run()
