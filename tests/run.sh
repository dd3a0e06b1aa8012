#!/usr/bin/env bash
# Sets up .venv where that is needed and runs the tests. Arguments go to pytest: bash tests/run.sh -k tokenizer
# Left out unless chosen with -m: slow, parity (Hugging Face's libraries: source setup.sh dev parity), browser (Chromium), gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source setup.sh dev
cd rustbpe
cargo test --quiet
# Not every Rust comes with these two.
if cargo clippy --version >/dev/null 2>&1; then
    cargo clippy --quiet --all-targets --all-features -- -D warnings
else
    echo "clippy is missing, its check is left out: rustup component add clippy, or apt-get install rust-clippy" >&2
fi
if cargo fmt --version >/dev/null 2>&1; then
    cargo fmt --check
else
    echo "rustfmt is missing, its check is left out: rustup component add rustfmt, or apt-get install rustfmt" >&2
fi
cd ..
ruff check .
ruff format --check --quiet .

chosen=("$@")
[[ " $* " == *" -m "* ]] || chosen=(-m "not slow and not parity and not browser and not gpu" "$@")
log=$(mktemp)
status=0
# Four at a time even on two cores: much of the time is waiting, for processes that start, stop and are killed.
python -m pytest -n 4 --dist loadfile "${chosen[@]}" 2>&1 | tee "$log" || status=$?

# With the test data there, nothing may be skipped for want of them; other reasons are told by pytest and are no error.
data=${NANOCHAT_TEST_DATA:-../shared}
missing=$(grep '^SKIPPED .*no test data' "$log" || true)
rm -f "$log"
if [ -d "$data/golden" ] && [ -n "$missing" ] && [ $# -eq 0 ]; then
    echo "error: tests were skipped although there are test data in $data" >&2
    exit 1
fi
exit "$status"
