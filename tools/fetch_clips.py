"""The command mg-fetch-clips by its path in the repository: mg/cli/fetch_clips.py."""

from mg.cli.fetch_clips import run

if __name__ == "__main__":
    run()
