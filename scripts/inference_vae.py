"""The command mg-reconstruct by its path in the repository: mg/cli/reconstruct.py."""

from mg.cli.reconstruct import run

if __name__ == "__main__":
    run()
