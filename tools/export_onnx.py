"""The command mg-export by its path in the repository: mg/cli/export.py."""

from mg.cli.export import run

if __name__ == "__main__":
    run()
