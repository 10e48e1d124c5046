"""The command mg-make-clips by its path in the repository: mg/cli/make_clips.py."""

from mg.cli.make_clips import run

if __name__ == "__main__":
    run()
