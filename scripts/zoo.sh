#!/bin/sh
# Sweeps model families of other libraries (hzo zoo): installs them into .venv-zoo, an environment of its own beside .venv,
# unless that was done already, then runs python -m hzo_lab.zoo.
#
#   sh scripts/zoo.sh [arguments of python -m hzo_lab.zoo]
#   sh scripts/zoo.sh --smoke --all-right      40 families of transformers, for continuous integration
#   sh scripts/zoo.sh                          all families; goes on where it was stopped
#
# Needs a package index the first time. PYTHON=... names the interpreter. One environment serves all libraries: beside a CPU
# build of torch, torchvision's Python part is enough (src/hzo_lab/zoo/imports.py).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/.venv-zoo
stamp=$venv/installed
wanted=$(printf '%s\n' "$root" && cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/zoo_constraints.txt" | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv --clear "$venv"
    printf '%s\n' "hzo: installing the libraries of the zoo into $venv (a minute or two the first time)" >&2
    (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -c scripts/zoo_constraints.txt -e . \
        numpy scipy transformers timm torchvision torch-geometric diffusers peft snntorch norse)
    printf '%s\n' "$wanted" >"$stamp"
fi
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
exec "$venv/bin/python" -m hzo_lab.zoo "$@"
