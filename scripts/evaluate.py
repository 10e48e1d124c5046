"""The command mg-evaluate by its path in the repository: mg/cli/evaluate.py."""

from mg.cli.evaluate import run

if __name__ == "__main__":
    run()
