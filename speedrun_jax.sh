#!/usr/bin/env bash
# The whole road, top to bottom: from a bare machine to a model one can talk to.
#
#   bash speedrun_jax.sh              what this machine can do: d20 on NVIDIA GPUs, cpu without
#   bash speedrun_jax.sh d26          a preset of configs/ (or CONFIG=path/to/preset.toml bash speedrun_jax.sh)
#   bash speedrun_jax.sh --rl         with reinforcement learning at the end (always in the cpu preset)
#   bash speedrun_jax.sh --fresh      start over; what was there is moved aside
#
# Kill it anywhere and start it again: it goes on where it was. Everything it makes lies in $NANOCHAT_BASE_DIR
# (default ~/.cache/nanochat). WANDB_RUN=name logs to wandb as well, where that is installed.

set -euo pipefail
road=$(realpath "${BASH_SOURCE[0]}")

preset=${CONFIG:-} rl= fresh=
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$road"; exit 0 ;;
        --rl) rl=1 ;;
        --fresh) fresh=1 ;;
        -*) echo "error: unknown option $argument (see --help)" >&2; exit 2 ;;
        *) preset=$argument ;;
    esac
done

# Which model: by what this machine has.
if [ -z "$preset" ]; then
    if gpus=$(nvidia-smi --list-gpus 2>/dev/null) && [ -n "$gpus" ]; then
        preset=d20
        echo "preset d20: this machine has $(echo "$gpus" | wc -l) NVIDIA GPU(s)"
    else
        preset=cpu
        echo "preset cpu: no NVIDIA GPU here (nvidia-smi lists none)"
    fi
fi
# Paths were meant from where the caller is.
base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
base=$(realpath -m "${base/#\~/$HOME}")
[ ! -f "$preset" ] || preset=$(realpath "$preset")
[ -z "${CORE_DIR:-}" ] || CORE_DIR=$(realpath "$CORE_DIR")
cd "$(dirname "$road")"
if [ ! -f "configs/$preset.toml" ] && { [ ! -f "$preset" ] || [[ "$preset" != *.toml ]]; }; then
    echo "error: no preset $preset, nor a file of that name that ends in .toml; there are:" \
        "$(cd configs && echo *.toml | sed 's/\.toml//g')" >&2
    exit 2
fi

# The environment, with what the road needs beyond the core: the web chat and the report's plots.
source setup.sh serve report

export NANOCHAT_BASE_DIR=$base PYTHONUNBUFFERED=1
tag=$(basename "$preset" .toml)
marks=$base/road/$tag
few=()
if [ "$tag" = cpu ]; then rl=1 few=(-x 100); fi # a small model learns enough to show in seconds

if [ -n "$fresh" ]; then
    old=$base/before-$(date +%Y%m%d-%H%M%S)
    mkdir -p "$old"
    for made in "report/$tag" "road/$tag" {base,mid,sft,rl}_checkpoints/"$tag"; do
        if [ -e "$base/$made" ]; then mkdir -p "$old/$(dirname "$made")" && mv "$base/$made" "$old/$made"; fi
    done
    echo "starting over; what was there is in $old"
fi
mkdir -p "$marks" || { echo "error: set NANOCHAT_BASE_DIR to a folder that can be written" >&2; exit 2; }

say() { printf '\n== %s  [%s]\n' "$*" "$(date +%H:%M:%S)"; }

# Training knows by itself whether it is done. An evaluation is done when what it judged is not newer than its mark; two
# files made within a few milliseconds have one time, so "older" would be too much to ask.
judged() { [ -e "$1" ] && [ ! "$2" -nt "$1" ]; }
train() { say "train $1"; python -m scripts.train --stage="$1" --config="$preset"; }
judge() {
    local stage=$1 mark=$marks/$2; shift 2
    local newest
    newest=$(ls -t "$base/${stage}_checkpoints/$tag"/step_*/manifest.json | head -n 1)
    if judged "$mark" "$newest"; then say "${mark##*/}: done before"; return; fi
    say "${mark##*/}"
    python -m "$@" --config="$preset" || return
    touch "$mark"
}

# What would be trained here: a batch that this machine cannot take is better said before the download than after.
[ "$tag" = cpu ] || python -m scripts.doctor --config="$preset"
[ -e "$base/report/$tag/start.json" ] || python -m nanochat_jax.report reset -g "$tag"

# Text and tokenizer. The validation shard and one more tell whether the hub can be reached; the rest comes meanwhile,
# in order, and the tokenizer waits for those that it is trained on: as many as its settings say.
if [ "$tag" != cpu ]; then
    python -m nanochat_jax.dataset --config="$preset" -n 1
    python -m nanochat_jax.dataset --config="$preset" &
    download=$!
    trap 'kill "$download" 2>/dev/null || true' EXIT
fi
say "tokenizer"
python -m scripts.tok_train --config="$preset" ${fresh:+--fresh}
if ! judged "$marks/tok_eval" "$base/tokenizer/nanochat.json"; then
    python -m scripts.tok_eval --config="$preset"
    touch "$marks/tok_eval"
fi
if [ -n "${download:-}" ]; then
    say "waiting for the text"
    wait "$download"
    trap - EXIT
fi

# Pretraining: the model learns to predict text.
train base
judge base base_loss scripts.base_loss -i base -g "$tag"
core=${CORE_DIR:-$base/eval_bundle}
if [ -d "$core" ]; then
    judge base base_eval scripts.base_eval -i base -g "$tag" --core_dir="$core"
elif [ "$tag" = cpu ]; then
    say "CORE skipped: its bundle is not in $core, and this preset does not download it (CORE_DIR=... if you have it)"
else
    code=0
    judge base base_eval scripts.base_eval -i base -g "$tag" || code=$?
    case $code in
        0) ;;
        2) say "CORE skipped, see above (CORE_DIR=... if you have its bundle)" ;; # what can be mended outside of here
        *) exit "$code" ;;
    esac
fi

# Midtraining: the format of conversations, tools and multiple choice.
train mid
judge mid chat_eval_mid scripts.chat_eval -i mid -g "$tag" "${few[@]}"

# Supervised finetuning: to answer, and to stop.
train sft
judge sft chat_eval_sft scripts.chat_eval -i sft -g "$tag"

# Reinforcement learning: to be right more often.
last=sft
if [ -n "$rl" ]; then
    train rl
    judge rl chat_eval_rl scripts.chat_eval -i rl -g "$tag"
    last=rl
fi

say "report"
python -m nanochat_jax.report generate -g "$tag"

say "a question"
question="What is 37 * 12?"
echo "> $question"
python -m scripts.chat_cli -i "$last" -g "$tag" -p "$question"

cat <<TXT

== done in $((SECONDS / 60)) min $((SECONDS % 60)) s; the report is in report.md. Talk to the model:
   .venv/bin/python -m scripts.chat_cli -i $last -g $tag
   .venv/bin/python -m scripts.chat_web -i $last -g $tag
TXT
