#!/usr/bin/env bash
# All tests, from a fresh clone; arguments go to pytest, e.g. -m "not slow". Makes .venv and installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements-test.txt
install requirements-lpips.txt --no-deps
python -m pytest "$@"
