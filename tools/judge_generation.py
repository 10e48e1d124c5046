"""The command mg-judge-generation by its path in the repository: mg/cli/judge_generation.py."""

from mg.cli.judge_generation import run

if __name__ == "__main__":
    run()
