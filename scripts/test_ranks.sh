#!/bin/sh
# Runs the tests that need several processes under libraries that distribute (Accelerate, Lightning, transformers, dask,
# Ray, loky): installs these into .venv beside what test.sh needs, unless that was done already, then runs tests_ranks/.
#
#   sh scripts/test_ranks.sh [arguments of pytest]
#
# Needs a package index the first time. PYTHON=... names the interpreter. Everything runs on this machine, over loopback.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
use_environment dev
use_environment ranks
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest tests_ranks "$@"
