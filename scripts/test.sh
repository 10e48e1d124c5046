#!/usr/bin/env bash
# All tests, from a fresh clone; arguments go to pytest, e.g. -m "not slow". Makes .venv and installs what is missing.
# Two processes share the tests (-n 0: one); MindSpore compiles on one core, so that each has another to do it on.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements-test.txt
install requirements-lpips.txt --no-deps
python -m pytest -n 2 --dist worksteal "$@"
