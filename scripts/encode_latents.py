"""The command mg-encode-latents by its path in the repository: mg/cli/encode_latents.py."""

from mg.cli.encode_latents import run

if __name__ == "__main__":
    run()
