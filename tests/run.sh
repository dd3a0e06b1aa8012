#!/usr/bin/env bash
# Sets up .venv where that is needed and runs the tests. Arguments go to pytest: bash tests/run.sh -k tokenizer
# Left out unless chosen with -m: slow, parity (torch, transformers), browser (Chromium), gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source setup.sh dev
(cd rustbpe && cargo test --quiet)
ruff check .

chosen=("$@")
[[ " $* " == *" -m "* ]] || chosen=(-m "not slow and not parity and not browser and not gpu" "$@")
log=$(mktemp)
status=0
python -m pytest "${chosen[@]}" 2>&1 | tee "$log" || status=$?

# With the test data there, nothing but what needs a GPU, torch or a browser may be skipped.
data=${NANOCHAT_TEST_DATA:-../shared}
skipped=$(tail -n 1 "$log" | grep -oE '[0-9]+ skipped' | cut -d' ' -f1 || true)
rm -f "$log"
if [ -d "$data/golden" ] && [ "${skipped:-0}" -gt 0 ] && [ $# -eq 0 ]; then
    echo "error: $skipped tests were skipped although their data are in $data" >&2
    exit 1
fi
exit "$status"
