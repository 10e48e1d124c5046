"""The command mg-encode-text by its path in the repository: mg/cli/encode_text.py."""

from mg.cli.encode_text import run

if __name__ == "__main__":
    run()
