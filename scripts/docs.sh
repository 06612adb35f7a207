#!/bin/sh
# Builds the documentation site into site/, with warnings as errors, and checks it: every snippet of README and docs runs, every
# notebook runs, every link leads somewhere. Sets everything up in .venv first.
#
#   sh scripts/docs.sh            build and check; open site/index.html, or see the next line for a site with search
#   sh scripts/docs.sh serve      serve it on http://127.0.0.1:8000, built anew when a page changes
#
# PYTHON=... names the interpreter. Needs a package index the first time.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/scripts/environment.sh"
use_environment docs
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" JUPYTER_PLATFORM_DIRS=1 PYDEVD_DISABLE_FILE_VALIDATION=1 NO_MKDOCS_2_WARNING=1
PATH=$venv/bin:$PATH
export PATH
if [ "${1:-build}" = serve ]; then
    exec "$venv/bin/python" -m mkdocs serve
fi
"$venv/bin/python" -m pytest README.md docs tests/test_docs.py
rm -rf .cache/mkdocs-jupyter  # what notebooks showed when the library was another
"$venv/bin/python" -m mkdocs build --strict --clean
"$venv/bin/python" scripts/check_links.py site
