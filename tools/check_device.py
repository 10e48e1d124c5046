"""The command mg-check-device by its path in the repository: mg/cli/check_device.py."""

from mg.cli.check_device import run

if __name__ == "__main__":
    run()
