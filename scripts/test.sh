#!/usr/bin/env bash
# All tests, from a fresh clone; arguments go to pytest, e.g. -m "not slow". Makes .venv and installs what is missing.
# Two processes share the tests (-n 0: one), with a thread each: MindSpore compiles on one core in any case.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements-test.txt
install requirements-lpips.txt --no-deps
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n 2 --dist worksteal "$@"
