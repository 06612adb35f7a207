#!/bin/sh
# Runs a selection of the tests under the oldest Python and torch that pyproject.toml names, or under the newest torch, each in
# an environment of its own (.venv-oldest, .venv-newest). constraints.txt has the version that sh scripts/test.sh tests.
#
#   sh scripts/test_versions.sh oldest|newest [arguments of pytest]     without arguments of pytest: the selection below
#
# OLDEST_PYTHON=... names the oldest interpreter; else python3.10 is looked for, also among those of pyenv. PYTHON=... names
# that for the newest torch. The first time pip fetches PyPI's build of torch for CUDA, several GB.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"
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

which=${1:-}
case $which in
oldest)
    if ! python=$(find_oldest); then
        say "found no Python $oldest; name one: OLDEST_PYTHON=/path/to/python$oldest sh $0 oldest"
        exit 1
    fi
    ;;
newest) python=${PYTHON:-python3} ;;
*)
    say "expected oldest or newest: sh $0 oldest|newest [arguments of pytest]"
    exit 2
    ;;
esac
shift
venv=$root/.venv-$which
constraints=scripts/${which}_constraints.txt
wanted=$(printf '%s\n' "$root" "$python" && cat pyproject.toml "$constraints" | cksum)
if [ ! -f "$venv/installed" ] || [ "$(cat "$venv/installed")" != "$wanted" ]; then
    say "installing the $which versions into $venv (several GB the first time)"
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e . \
        numpy pytest pytest-xdist hypothesis
    printf '%s\n' "$wanted" >"$venv/installed"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ $# -eq 0 ]; then
    set -- tests/tape tests/plans tests/planner tests/execution tests/finite_differences tests/verification \
        tests/gradients/test_gradient.py tests/gradients/test_bad_input.py tests/external/test_box.py tests/test_refusals.py \
        tests/rules/test_products.py tests/rules/test_convolution.py tests/rules/test_normalization.py \
        tests/rules/test_attention.py tests/rules/test_losses.py tests/rules/test_recurrent.py tests/rules/test_indexing.py \
        tests/rules/test_arithmetic.py tests/rules/test_pointwise.py tests/rules/test_linalg.py
fi
# torch 2.11 has no derivative of three operators, so that there is nothing to compare with; parts that hang are about time.
exec "$venv/bin/python" -m pytest -n 2 -k "not nextafter and not aminmax and not narrow_copy and not hanging" "$@"
