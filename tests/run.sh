#!/usr/bin/env bash
# Sets up .venv where that is needed and runs the tests. Arguments go to pytest: bash tests/run.sh -k tokenizer
# Left out unless chosen with -m: slow, parity (Hugging Face's libraries: source setup.sh dev parity), browser
# (Chromium), gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' tests/run.sh; exit 0 ;; esac

source setup.sh dev

rust() {
    cd rustbpe
    cargo test --quiet
    # Not every Rust comes with these two.
    if cargo clippy --version >/dev/null 2>&1; then
        cargo clippy --quiet --all-targets --all-features -- -D warnings
    else
        echo "clippy is missing, its check is left out: rustup component add clippy, or apt-get install rust-clippy"
    fi
    if cargo fmt --version >/dev/null 2>&1; then
        cargo fmt --check
    else
        echo "rustfmt is missing, its check is left out: rustup component add rustfmt, or apt-get install rustfmt"
    fi
}

ruff check .
ruff format --check --quiet .

# Beside the Python tests, which wait a lot; what it says is shown after theirs.
said=$(mktemp) log=$(mktemp)
trap 'rm -f "$said" "$log"' EXIT
(set -e; rust) >"$said" 2>&1 &
crate=$!

chosen=("$@")
[[ " $* " == *" -m "* ]] || chosen=(-m "not slow and not parity and not browser and not gpu" "$@")
status=0
# Four at a time even on two cores: much of the time is waiting, for processes that start, stop and are killed.
python -m pytest -n 4 --dist loadfile "${chosen[@]}" 2>&1 | tee "$log" || status=$?
wait "$crate" || { status=1; echo "error: the crate's tests or checks failed:"; }
cat "$said"
tail -n 1 "$log"

# With the test data there, nothing may be skipped for want of them; other reasons are told by pytest and are no error.
data=${NANOCHAT_TEST_DATA:-../shared}
missing=$(grep '^SKIPPED .*no test data' "$log" || true)
if [ -d "$data/golden" ] && [ -n "$missing" ] && [ $# -eq 0 ]; then
    echo "error: tests were skipped although there are test data in $data" >&2
    exit 1
fi
exit "$status"
