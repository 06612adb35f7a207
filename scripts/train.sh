#!/bin/sh
# Trains a network with forward passes only: sets everything up in .venv, then runs `hzo train` with the arguments
# given here. Without arguments, a residual MLP learns the digits of scikit-learn.
#
#   sh scripts/train.sh [arguments of hzo train]
#
# Paths among the arguments are relative to the directory that this is called from. PYTHON=... names the interpreter.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
use_environment train
exec "$venv/bin/hzo" train "$@"
