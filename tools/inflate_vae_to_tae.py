"""The command mg-inflate by its path in the repository: mg/cli/inflate.py."""

from mg.cli.inflate import run

if __name__ == "__main__":
    run()
