#!/usr/bin/env bash
# Sets up .venv if needed, and runs the static checks (ruff, ty, import-linter, codespell) and the tests.
# Arguments go to pytest, for example: bash tests/run.sh -k tokenizer
# Tests with the markers slow, parity, browser, gpu and aot run only if -m selects them. The parity tests need Hugging
# Face's libraries (bash setup.sh dev parity), the aot tests need XLA's compiler for GPUs (bash setup.sh dev aot), and
# the browser tests need Chromium.
# --cov prints the test coverage of each room (see CONTRIBUTING.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' tests/run.sh; exit 0 ;; esac

pytest_args=() selected= coverage=
for argument in "$@"; do
    if [ "$argument" = --cov ]; then coverage=1; else pytest_args+=("$argument") selected=1; fi
done

bash setup.sh dev
PATH=$PWD/.venv/bin:$PATH

check_rust() {
    cd rustbpe
    cargo test --quiet
    # Some Rust installations lack clippy and rustfmt.
    if cargo clippy --version >/dev/null 2>&1; then
        cargo clippy --quiet --all-targets --all-features -- -D warnings
    else
        echo "clippy is missing, skipping its check: rustup component add clippy, or apt-get install rust-clippy"
    fi
    if cargo fmt --version >/dev/null 2>&1; then
        cargo fmt --check
    else
        echo "rustfmt is missing, skipping its check: rustup component add rustfmt, or apt-get install rustfmt"
    fi
}

ruff check .
ruff format --check --quiet .
ty check --quiet
lint-imports --no-logo
codespell

# Check the Rust crate in the background, because the Python tests often leave a core idle.
rust_log=$(mktemp) pytest_log=$(mktemp)
trap 'rm -f "$rust_log" "$pytest_log"' EXIT
(set -e; check_rust) >"$rust_log" 2>&1 &
rust_check=$!

[[ " ${pytest_args[*]-} " == *" -m "* ]] || pytest_args+=(-m "not slow and not parity and not browser and not gpu and not aot")
if [ -n "$coverage" ]; then pytest_args+=(--cov --cov-report=json:.coverage.json) && rm -f .coverage.json; fi
status=0
# Use four workers even on two cores, because the tests often wait for processes to start or stop. GPU tests share one
# process, because a process that uses a GPU takes most of its memory. XLA compiles for GPUs on all cores.
workers=4
[[ " ${pytest_args[*]} " != *" -m gpu "* && " ${pytest_args[*]} " != *" -m aot "* ]] || workers=0
python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "${pytest_args[@]}" 2>&1 | tee "$pytest_log" || status=$?
wait "$rust_check" || { status=1; echo "error: the tests or checks of the Rust crate failed:"; }
cat "$rust_log"
[ ! -f .coverage.json ] || python tests/support/coverage_by_room.py .coverage.json
tail -n 1 "$pytest_log"

# If the test data is present, no test may be skipped because of missing data. Tests may be skipped for other reasons.
data=${NANOCHAT_TEST_DATA:-../shared}
missing=$(grep '^SKIPPED .*no test data' "$pytest_log" || true)
if [ -d "$data/golden" ] && [ -n "$missing" ] && [ -z "$selected" ]; then
    echo "error: tests were skipped for lack of test data, although $data has it" >&2
    exit 1
fi
exit "$status"
