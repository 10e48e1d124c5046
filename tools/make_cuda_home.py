"""The command mg-make-cuda-home by its path in the repository: mg/cli/make_cuda_home.py."""

from mg.cli.make_cuda_home import run

if __name__ == "__main__":
    run()
