# Sourced by quickstart.sh, test.sh and lint.sh in the repository's root.

# Use the active virtual environment as it is; otherwise create .venv, once.
use_environment() {
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        environment=given
        return
    fi
    environment=own
    if [ ! -x .venv/bin/python ]; then
        local name
        for name in python3.12 python3.11 python3.10 python3 python none; do
            "$name" -c 'import sys, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2> /dev/null && break
        done
        if [ "$name" = none ]; then
            echo "error: Python 3.10, 3.11 or 3.12 with its venv module is needed" >&2
            exit 2
        fi
        "$name" -m venv .venv
    fi
    source .venv/bin/activate
}

# install FILE [pip options]: installs the pins of a requirements file into our own .venv, if they have changed. Into an
# active environment only missing packages are installed: on an Ascend host MindSpore must stay the one that fits CANN.
install() {
    local file=$1 stamp="${VIRTUAL_ENV:-}/.mg-$1"
    shift
    if [ "$environment" = own ]; then
        if ! cat requirements*.txt | cmp -s - "$stamp"; then
            echo "installing $file into .venv (minutes, once)"
            pip_install "$@" -r "$file"
            cat requirements*.txt > "$stamp"
        fi
    else
        local missing
        missing=$(python - "$file" << 'EOP'
import pathlib, re, sys
from importlib import metadata

def lines(path):
    for line in pathlib.Path(path).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            yield from lines(line.split()[1])
        elif line:
            yield line

installed = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in metadata.distributions()}
for line in lines(sys.argv[1]):
    if re.sub(r"[-_.]+", "-", re.match(r"[\w.\-]+", line)[0]).lower() not in installed:
        print(line)
EOP
        )
        if [ -n "$missing" ]; then
            echo "installing into the active environment:" $missing
            pip_install "$@" -r <(echo "$missing") "numpy<2"
        fi
    fi
    python -c 'import importlib.metadata as m; m.version("mg-video")' 2> /dev/null || pip_install --no-deps --editable .
}

pip_install() {
    python -m pip install --quiet --disable-pip-version-check "$@"
}
