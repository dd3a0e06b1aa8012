#!/usr/bin/env bash
# Creates .venv, and installs the project, the Rust tokenizer and the extras that the arguments name. If everything is
# already installed, it returns at once.
#
#   bash setup.sh serve report && source .venv/bin/activate
#
# The extras are those of pyproject.toml. The newest suitable Python on PATH is used. PYTHON=/path/to/python3 chooses
# another.

# If this file is sourced, its `exit` would end the caller's shell.
[ "${BASH_SOURCE[0]:-}" = "$0" ] || { echo "error: run it as bash setup.sh, then source .venv/bin/activate" >&2; return 2; }
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' setup.sh; exit 0 ;; esac

fail() { echo "error: $*" >&2; exit 2; }

# The versions of Python for which all packages are published. The newest JAX needs Python 3.12.
OLDEST=11 NEWEST=14

is_suitable() {
    "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, $OLDEST) <= sys.version_info[:2] <= (3, $NEWEST))" 2>/dev/null
}

# Prints the path of $PYTHON or, if it is not set, of the newest usable Python on PATH.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.$OLDEST to 3.$NEWEST with venv: set it to one," \
            "or unset it to take the newest on PATH"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3.14 python3.13 python3.12 python3 python3.11; do
        if is_suitable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.$OLDEST to 3.$NEWEST with venv is needed; found $(python3 --version 2>&1 || echo none):" \
        "install it (e.g. apt-get install python3-venv, or https://docs.astral.sh/uv) or set PYTHON=/path/to/python3"
}

# Prints the extra that installs JAX for this machine's GPU driver, or nothing if there is no GPU. CUDA 13 needs driver
# 580 or newer. CUDA 12 also runs on older drivers.
gpu_extra() {
    local gpus driver
    # The output goes to variables, not through a pipe. If `head` or `grep -q` closed a pipe early, nvidia-smi would fail.
    gpus=$(nvidia-smi --list-gpus 2>/dev/null) || return 0
    [[ "$gpus" == "GPU "* ]] || return 0
    driver=$(nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader 2>&1) || true
    [[ "${driver%%.*}" =~ ^[0-9]+$ ]] || fail "nvidia-smi lists GPUs, but not the version of their driver" \
        "(${driver:-no output}): reinstall the driver, or take nvidia-smi off PATH to use the CPU"
    if [ "${driver%%.*}" -ge 580 ]; then echo cuda13; else echo cuda12; fi
}

# Prints the first 16 digits of the SHA-256 hash of its input. Older versions of macOS have no sha256sum.
hash_of_input() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -c1-16; }

usable() { .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_environment() {
    # Run only one setup at a time, because two would install into the same environment. Some systems have no flock.
    if command -v flock >/dev/null; then
        exec 9>"${TMPDIR:-/tmp}/nanochat-setup-$(pwd | hash_of_input)-$(id -u).lock"
        flock -n 9 || { echo "== waiting for another setup of .venv to finish"; flock 9; }
    fi
    build_environment "$@"
    if command -v flock >/dev/null; then exec 9>&-; fi
}

build_environment() {
    local wanted have gpu other remake='' source wheels build python=''
    gpu=$(gpu_extra) || exit 2
    case $gpu in cuda12) other=cuda13 ;; cuda13) other=cuda12 ;; *) other=none ;; esac
    [[ " $* " != *" $other "* ]] || fail "the extra $other does not fit this machine's GPU driver: leave it out"
    [[ "$gpu" != cuda12 || " $* " != *" aot "* ]] || fail "the extra aot holds CUDA 13, and cuda12, which this" \
        "machine's GPU driver needs, has a compiler of its own: leave it out"
    wanted=$(echo "$* $gpu" | xargs)
    source=$( (pwd; cat pyproject.toml rustbpe/pyproject.toml rustbpe/Cargo.toml rustbpe/src/*.rs) | hash_of_input)
    # .venv/.made holds the hash of the sources, followed by the names of the installed extras.
    have=$(usable && cat .venv/.made 2>/dev/null || true)
    if [[ " $have " == *" $other "* ]]; then # an environment must not hold the libraries of both CUDA versions
        have=${have#* }
        wanted=$(echo "${have//$other/} $wanted" | xargs)
        have='' remake=1
    fi
    if [ "${have%% *}" = "$source" ]; then
        local missing=
        for extra in $wanted; do [[ " $have " == *" $extra "* ]] || missing=1; done
        [ -n "$missing" ] || return 0
        wanted=$(echo "${have#* } $wanted" | xargs)
    fi
    if [ "${have%% *}" != "$source" ]; then
        command -v cargo >/dev/null || fail "cargo is missing: install Rust 1.85 or newer from https://rustup.rs"
    fi
    if [ -n "$remake" ] || ! usable; then
        if command -v uv >/dev/null && [ -z "${PYTHON:-}" ]; then
            python=$(find_python 2>/dev/null) || python=">=3.12,<3.$((NEWEST + 1))" # uv downloads it
        else
            python=$(find_python) || exit 2
        fi
    fi
    if [ -n "$remake" ]; then
        echo "== the GPU driver has changed: making .venv again, with $gpu instead of $other"
        rm -rf .venv
    fi
    echo "== setting up .venv [$wanted]: Python packages and the Rust tokenizer; takes a few minutes, once"
    if [ -n "$python" ]; then
        echo "== Python: $python $("$python" --version 2>/dev/null || true)"
        ! "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))' 2>/dev/null ||
            echo "note: with Python 3.12 or newer, a newer version of JAX would be installed"
    fi
    if command -v uv >/dev/null; then
        usable || uv venv --quiet --clear --seed --python "$python" .venv
        install() { uv pip install --quiet --python .venv/bin/python "$@"; }
    else
        usable || "$python" -m venv --clear .venv
        install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
    fi
    if [ "${have%% *}" != "$source" ]; then
        # Compile the Rust tokenizer while the Python packages download.
        wheels=$(mktemp -d)
        .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$wheels" ./rustbpe &
        build=$!
    fi
    install -e ".[${wanted// /,}]" || fail "installing the Python packages failed: see above, fix it and run this again"
    if [ -n "${build:-}" ]; then
        wait "$build" || fail "building the Rust tokenizer failed: see above; Rust 1.85 or newer is needed (rustup update)"
        install --force-reinstall --no-deps "$wheels"/*.whl
        rm -rf "$wheels"
    fi
    echo "$source $wanted" > .venv/.made
}

for extra in "$@"; do
    grep -q "^$extra = \[" pyproject.toml || fail "unknown extra $extra: use it as bash setup.sh EXTRA ...," \
        "with the extras of pyproject.toml, such as serve, report or dev"
done
make_environment "$@"
