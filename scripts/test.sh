#!/usr/bin/env bash
# Runs the tests, from a fresh clone on. Creates .venv and installs missing packages.
#
#     ./scripts/test.sh                       the quick tests: every contract at least once
#     ./scripts/test.sh --all                 every test: full-size models, long runs, several workers
#     ./scripts/test.sh tests/test_x.py ...   arguments go to pytest
#
# Two processes share the tests (-n 0: one), with one thread each: MindSpore compiles on one core anyway.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements-test.txt
install requirements-lpips.txt --no-deps
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n 2 --dist worksteal "$@"
