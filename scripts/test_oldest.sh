#!/bin/sh
# Runs a selection of the tests under the oldest Python and torch that pyproject.toml names, in an environment of its own,
# .venv-oldest.
#
#   sh scripts/test_oldest.sh [arguments of pytest]     without arguments: the selection below
#   sh scripts/test_oldest.sh --if-there                no error where there is no such Python
#
# OLDEST_PYTHON=... names the interpreter; else python3.10 is looked for, also among those of pyenv. The first time pip fetches
# PyPI's build of torch for CUDA, several GB: there is no small one of that version on PyPI.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"
venv=$root/.venv-oldest
say() { printf '%s\n' "hzo: $*" >&2; }
oldest=$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)

find_oldest() {
    for candidate in ${OLDEST_PYTHON:-"python$oldest" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$oldest".*/bin/"python$oldest"}; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$oldest')" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

if ! python=$(find_oldest); then
    say "found no Python $oldest; name one: OLDEST_PYTHON=/path/to/python$oldest sh $0"
    [ "${1:-}" = --if-there ] && exit 0
    exit 1
fi
[ "${1:-}" = --if-there ] && shift
wanted=$(printf '%s\n' "$root" "$python" && cat pyproject.toml scripts/oldest_constraints.txt | cksum)
if [ ! -f "$venv/installed" ] || [ "$(cat "$venv/installed")" != "$wanted" ]; then
    say "installing the oldest versions into $venv (several GB the first time)"
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/oldest_constraints.txt -e . \
        numpy pytest pytest-xdist hypothesis
    printf '%s\n' "$wanted" >"$venv/installed"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ $# -eq 0 ]; then
    set -- tests/tape tests/plans tests/planner tests/execution tests/finite_differences tests/verification \
        tests/gradients/test_gradient.py tests/gradients/test_bad_input.py tests/external/test_box.py tests/test_refusals.py \
        tests/rules/test_products.py tests/rules/test_convolution.py tests/rules/test_normalization.py \
        tests/rules/test_attention.py tests/rules/test_losses.py tests/rules/test_recurrent.py tests/rules/test_indexing.py
fi
# torch 2.11 has no derivative of three operators, so that there is nothing to compare with; parts that hang are about time.
exec "$venv/bin/python" -m pytest -n 2 -k "not nextafter and not aminmax and not narrow_copy and not hanging" "$@"
