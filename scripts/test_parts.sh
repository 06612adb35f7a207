#!/bin/sh
# Runs the tests that need real parts (snnTorch, aihwkit, onnxruntime): installs these into .venv beside what test.sh
# needs, unless that was done already, then runs tests_parts/.
#
#   sh scripts/test_parts.sh [arguments of pytest]
#
# Needs a package index the first time. PYTHON=... names the interpreter; aihwkit has wheels for Python 3.10 to 3.12.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
use_environment dev
use_environment parts
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest tests_parts -n 2 "$@"
