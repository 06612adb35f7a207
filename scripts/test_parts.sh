#!/bin/sh
# Runs the tests that need real parts (snnTorch, aihwkit, onnxruntime, NEURON, PennyLane, Perceval, MuJoCo, ngspice):
# installs these into .venv beside what test.sh needs, unless that was done already, then runs tests_parts/.
#
#   sh scripts/test_parts.sh [arguments of pytest]
#
# Needs a package index the first time. PYTHON=... names the interpreter; aihwkit has wheels for Python 3.10 to 3.13,
# PennyLane, Perceval and MuJoCo for 3.11 and newer. ngspice is a program: it is Debian's package, installed here as root
# where apt-get is; else install it by hand, or its tests are skipped and say so.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
use_environment dev
use_environment parts
if ! command -v ngspice >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    say "installing ngspice by apt-get"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ngspice; } \
        >/dev/null || say "could not; tests of it are skipped"
fi
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$venv/bin/python" -m pytest tests_parts -n 2 "$@"
