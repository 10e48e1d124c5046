"""The command mg-convert-lpips by its path in the repository: mg/cli/convert_lpips.py."""

from mg.cli.convert_lpips import run

if __name__ == "__main__":
    run()
