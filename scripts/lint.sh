#!/usr/bin/env bash
# What CI asks of the code's form: ruff's findings, its format, mypy's types. All three, or those named:
# ./scripts/lint.sh [check] [format] [types]. Makes .venv and installs what is missing; needs no MindSpore.
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
        *) echo "error: $step is none of check, format, types" >&2 && exit 2 ;;
    esac || failed=1
done
exit $failed
