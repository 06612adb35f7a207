# Sourced by the scripts beside it: gives the checkout a virtual environment of its own, .venv, and keeps it up to date.
#
#   use_environment EXTRA    install hzo with its extra EXTRA (train, dev, parts, ranks) into .venv, unless that was done
#                            already; afterwards "$venv/bin" has it
#
# Expects $root, the directory of the checkout. PYTHON names the interpreter to start from; without it, the first one
# on the path that is recent enough.

say() { printf '%s\n' "hzo: $*" >&2; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

version_of() { "$1" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null || true; }

# Prints the interpreter to start from.
find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.10 python; fi
    for candidate in "$@"; do
        if is_recent "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    say "needs Python 3.10 or newer, found none as: $*. Name one: PYTHON=/path/to/python3 sh $0"
    return 1
}

# Whether .venv is there, whole, and made by the Python that was asked for.
is_usable() {
    is_recent "$venv/bin/python" || return 1
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$venv/bin/python")" = "$(version_of "$PYTHON")" ]
}

# What an installation depends on: a change of any of it asks for a new one. The path is part of it because an
# editable installation breaks when the checkout is moved or copied.
fingerprint() {
    printf '%s %s\n' "$root" "$(version_of "$venv/bin/python")"
    cksum <"$root/pyproject.toml"
    cksum <"$root/constraints.txt"
}

install() {
    (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@")
}

use_environment() {
    extra=$1
    venv=$root/.venv
    # The extra "dev" holds all of "train".
    case $extra in train) holders="train dev" ;; *) holders=$extra ;; esac
    for holder in $holders; do
        stamp=$venv/installed-$holder
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && is_usable; then return 0; fi
    done
    if ! is_usable; then
        python=$(find_python)
        say "creating $venv with $python ($(version_of "$python"))"
        # --clear: what an interrupted creation or another Python left there is of no use.
        if ! "$python" -m venv --clear "$venv"; then
            say "could not create it; on Debian and Ubuntu the venv module is a package of its own, python3-venv"
            return 1
        fi
    fi
    say "installing hzo[$extra] there (minutes the first time)"
    # The constraints pin torch: left open, pip takes the newest build there is, on Linux one for CUDA.
    if ! install -e ".[$extra]"; then
        say "could not install hzo[$extra], see above; the first time, pip must reach its package index"
        return 1
    fi
    # Of its dependencies it imports none but torch, numpy and scipy; torchvision would be one more thing to match torch.
    if [ "$extra" = parts ] && ! install --no-deps --only-binary aihwkit aihwkit; then
        say "could not install aihwkit, see above; pip's index must have a wheel for this Python (1.1.0: 3.10 to 3.12; 1.2.0: 3.12 and 3.13)"
        return 1
    fi
    fingerprint >"$venv/installed-$extra"
}
