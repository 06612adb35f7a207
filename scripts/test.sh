#!/bin/sh
# Runs every check of the project: sets everything up in .venv, then style, types and tests.
#
#   sh scripts/test.sh [arguments of pytest]
#
# Paths among the arguments are relative to the root of the checkout. PYTHON=... names the interpreter.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
use_environment dev
cd "$root"
# Two processes run the tests; threads of their own would only make them wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
exec "$venv/bin/python" -m pytest -n 2 "$@"
