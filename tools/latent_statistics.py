"""The command mg-latent-statistics by its path in the repository: mg/cli/latent_statistics.py."""

from mg.cli.latent_statistics import run

if __name__ == "__main__":
    run()
