"""The command mg-generate by its path in the repository: mg/cli/generate.py."""

from mg.cli.generate import run

if __name__ == "__main__":
    run()
