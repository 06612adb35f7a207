#!/bin/sh
# Builds the wheel and the source distribution into dist/ and checks them: metadata, README, contents, and that the wheel works
# where nothing else of the checkout is. Uploads nothing.
#
#   sh scripts/release.sh
#
# Before a release: the version in src/hzo/_version.py, CITATION.cff and CHANGELOG.md (tests/test_docs.py compares them).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
use_environment dev
cd "$root"
rm -rf dist
"$venv/bin/python" -m build --outdir dist .
"$venv/bin/python" -m twine check --strict dist/*
exec "$venv/bin/python" scripts/check_wheel.py dist
