"""The command mg-make-text-encoder by its path in the repository: mg/cli/make_text_encoder.py."""

from mg.cli.make_text_encoder import run

if __name__ == "__main__":
    run()
