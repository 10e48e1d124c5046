"""The command mg-decode-latents by its path in the repository: mg/cli/decode_latents.py."""

from mg.cli.decode_latents import run

if __name__ == "__main__":
    run()
