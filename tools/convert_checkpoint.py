"""The command mg-convert by its path in the repository: mg/cli/convert.py."""

from mg.cli.convert import run

if __name__ == "__main__":
    run()
