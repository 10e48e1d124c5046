#!/usr/bin/env bash
# Runs the tests that depend on the Python version, on each other supported Python installed here, as python3.X or by
# pyenv. Each gets an environment of its own (3.5 GB) that goes when its tests end, without torch: test.sh runs the
# comparisons with it.
set -euo pipefail
cd "$(dirname "$0")/.."
tests="config models_by_name convert_checkpoint buckets tiling data_video clips metrics checkpoint_files report data_index
    data_transforms"
export PYTHONPATH="$PWD" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
pins=$(grep -hvE '^(-r|#|torch|diffusers)' requirements.txt requirements-test.txt)
for version in 3.10 3.11 3.12; do
    [ "$version" != "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ] || continue  # test.sh runs it
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python none; do
        "$python" -c 'import ensurepip' 2> /dev/null && break
    done
    if [ "$python" = none ]; then
        echo "Python $version is not installed here"
        continue
    fi
    echo "Python $version"
    "$python" -m venv --clear "$environment"
    "$environment/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check -r <(echo "$pins")
    "$environment/bin/python" -m pytest -n 2 -q $(printf 'tests/test_%s.py ' $tests)
done
