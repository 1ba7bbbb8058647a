#!/bin/sh
# Makes the virtual environment $1, unless it is there and works.
set -eu
venv=$1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "curvlib needs Python 3.10 or newer, but '$python' is missing or older;" \
        "name another one: make PYTHON=/path/to/python3 ..." >&2
    exit 1
fi
if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
rm -rf "$venv"
if "$python" -m venv "$venv" 2>/dev/null; then
    exit 0
fi
# Some distributions ship Python without what `venv` needs to bring its own pip.
rm -rf "$venv"
"$python" -m venv --without-pip "$venv"
"$python" -m pip --python "$venv/bin/python" install --quiet pip
