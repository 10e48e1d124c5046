#!/usr/bin/env bash
# CI's static checks: ruff check, ruff format, mypy. Runs all three, or those named:
# ./scripts/lint.sh [check] [format] [types]. Creates .venv and installs missing packages; doesn't need MindSpore.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment
install requirements-dev.txt
[ $# -gt 0 ] || set -- check format types
failed=0
for step in "$@"; do
    case $step in
        check) ruff check . ;;
        format) ruff format --check . ;;
        types) mypy ;;
        *) echo "error: $step is not one of check, format, types" >&2 && exit 2 ;;
    esac || failed=1
done
exit $failed
