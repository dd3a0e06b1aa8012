#!/usr/bin/env bash
# The whole pipeline, top to bottom: from a bare machine to a model you can talk to.
#
#   bash speedrun_jax.sh              runs the preset d20 if this machine has an NVIDIA GPU, else the preset cpu
#   bash speedrun_jax.sh d26          runs a preset from configs/ (or CONFIG=path/to/preset.toml bash speedrun_jax.sh)
#   bash speedrun_jax.sh --rl         adds reinforcement learning as the last stage (the cpu preset always has it)
#   bash speedrun_jax.sh --fresh      starts over, and moves existing results aside
#
# You can stop the script at any point and run it again. It resumes where it stopped. It writes everything to
# $NANOCHAT_BASE_DIR (default ~/.cache/nanochat). WANDB_RUN=name also logs to wandb, if wandb is installed.

set -euo pipefail

# macOS has bash 3.2, no `readlink -f`, and no `realpath -m`, so paths are made absolute here.
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; } # the path need not exist
script=$(absolute "${BASH_SOURCE[0]}")
while [ -L "$script" ]; do
    target=$(readlink "$script")
    script=$(cd "$(dirname "$script")" && absolute "$target")
done

# -----------------------------------------------------------------------------
# Arguments, preset and folders

preset=${CONFIG:-} named='' rl='' fresh=''
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$script"; exit 0 ;;
        --rl) rl=1 ;;
        --fresh) fresh=1 ;;
        -*) echo "error: unknown option $argument; the options are --rl and --fresh (see --help)" >&2; exit 2 ;;
        *)
            [ -z "$named" ] || { echo "error: two presets, $named and $argument: name one" >&2; exit 2; }
            preset=$argument named=$argument ;;
    esac
done

# If this machine has GPUs, JAX must not fall back to the CPU, where a large preset would take years.
gpus=$(nvidia-smi --list-gpus 2>/dev/null) || gpus=''
[[ "$gpus" == "GPU "* ]] || gpus=''
case ${CUDA_VISIBLE_DEVICES-all} in '' | -1 | NoDevFiles) gpus='' ;; esac # all GPUs are hidden
[ -z "$gpus" ] || export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}

# If no preset is given, choose one that suits this machine.
if [ -z "$preset" ]; then
    if [ -n "$gpus" ]; then
        preset=d20
        echo "preset d20: NVIDIA GPUs on this machine: $(echo "$gpus" | wc -l)"
    else
        preset=cpu
        echo "preset cpu: no NVIDIA GPU here (nvidia-smi lists none, or CUDA_VISIBLE_DEVICES hides them)"
    fi
fi

# Make relative paths absolute, because the next lines change the working directory.
base=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
base=$(absolute "${base/#\~/$HOME}")
[ ! -f "$preset" ] || preset=$(absolute "$preset")
[ -z "${CORE_DIR:-}" ] || CORE_DIR=$(absolute "$CORE_DIR")
cd "$(dirname "$script")"
if [ ! -f "configs/$preset.toml" ] && { [ ! -f "$preset" ] || [[ "$preset" != *.toml ]]; }; then
    echo "error: no preset or .toml file named $preset; the presets are:" \
        "$(cd configs && echo *.toml | sed 's/\.toml//g')" >&2
    exit 2
fi

# Set up .venv with the extras for the web chat (serve) and the report's plots (report).
bash setup.sh serve report
PATH=$PWD/.venv/bin:$PATH

export NANOCHAT_BASE_DIR=$base PYTHONUNBUFFERED=1
tag=$(basename "$preset" .toml)
marks=$base/road/$tag # one file per finished evaluation, which identifies what was evaluated
mid_limit=()
# A preset with local text, such as cpu, downloads nothing and always runs RL. Its evaluation after midtraining uses only
# 100 problems per task.
local_text=$(python -c '
import sys
from nanochat_jax import commandline, config
try:
    cfg = commandline.parse(config.Dataset, ["--config=" + sys.argv[1]])
    print("yes" if cfg.data_dir or cfg.data == "local" else "")
except config.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
' "$preset")
if [ -n "$local_text" ]; then
    rl=1 mid_limit=(-x 100)
elif [ -z "$gpus" ]; then
    echo "warning: no NVIDIA GPU here, and preset $preset is made for GPUs (the preset cpu is not)" >&2
fi

if [ -n "$fresh" ]; then
    old=$base/before-$(date +%Y%m%d-%H%M%S)
    mkdir -p "$old"
    for path in "report/$tag" "road/$tag" {base,mid,sft,rl}_checkpoints/"$tag"; do
        if [ -e "$base/$path" ]; then mkdir -p "$old/$(dirname "$path")" && mv "$base/$path" "$old/$path"; fi
    done
    echo "starting over; previous results are in $old"
fi
mkdir -p "$marks" || { echo "error: cannot write to $base: set NANOCHAT_BASE_DIR to a writable folder" >&2; exit 2; }

# -----------------------------------------------------------------------------
# How a command is run, and when it is skipped

banner() { printf '\n== %s  [%s]\n' "$*" "$(date +%H:%M:%S)"; }

child='' stopped='' # the running command, and the exit status if a signal has come

# run COMMAND... runs a command, and forwards SIGHUP and SIGTERM to it, so that training can save its state. Bash handles
# a signal only while it waits for a background process. SIGINT is not forwarded: Ctrl-C in a terminal also reaches the
# command, and a second SIGINT could end it before it has saved.
run() {
    (trap - INT; exec "$@") & # without the trap, a background process would ignore Ctrl-C
    child=$!
    local code
    while true; do
        code=0 signalled=''
        wait "$child" || code=$?
        [ -n "$signalled" ] || break # a signal ends `wait` before the command ends
    done
    child=''
    [ -z "$stopped" ] || exit "$stopped"
    return "$code"
}

handle() {
    signalled=1 stopped=$((128 + $1))
    [ -n "$child" ] || exit "$stopped"
    [ "$1" = 2 ] || kill -"$1" "$child" 2>/dev/null || true
}
trap 'handle 1' HUP
trap 'handle 2' INT
trap 'handle 15' TERM

# identify STAGE prints what identifies the latest weights of a stage: the step and a hash. `identify tokenizer` prints
# the tokenizer's hash. Times of files would not do, because copying the base folder changes them.
identify() {
    python -c '
import sys
from nanochat_jax import checkpoint, config, files

what, tag = sys.argv[1:]
try:
    if what == "tokenizer":
        print(what, files.sha256(config.base_dir() / "tokenizer" / "tokenizer.json"))
    else:
        print(checkpoint.WeightsId.latest(what, checkpoint.run_dir(what, tag)))
except (OSError, config.UserError) as error:
    sys.exit(f"error: {error}")
' "$1" "$tag"
}

# train STAGE trains one stage. It needs no mark, because scripts.train itself detects a finished run.
train() { banner "train $1"; run python -m scripts.train --stage="$1" --config="$preset"; }

# evaluate WHAT MARK MODULE ARGUMENTS... evaluates the latest checkpoint of a stage, or the tokenizer, unless the mark
# says that exactly this has been evaluated.
evaluate() {
    local what=$1 name=$2 mark=$marks/$2 now before why=''; shift 2
    now=$(identify "$what") || return
    if [ -e "$mark" ]; then
        before=$(cat "$mark") || return
        if [ "$before" = "$now" ]; then banner "$name: already done"; return; fi
        why=" again: it was done for ${before:-something that an earlier version of this script did not note}"
    fi
    banner "$name$why"
    run python -m "$@" --config="$preset" || return
    echo "$now" > "$mark"
}

# -----------------------------------------------------------------------------
# Text and tokenizer

# Before the download, check that this machine can train the preset. A batch that does not fit should fail now.
[ -n "$local_text" ] || run python -m scripts.doctor --config="$preset"
[ -e "$base/report/$tag/start.json" ] || run python -m nanochat_jax.report reset -g "$tag"

# First download the validation shard and one training shard, to check that the hub can be reached. The other shards
# download in the background, and after them the data of the later stages and evaluations, for which the GPUs would
# otherwise wait. The tokenizer and pretraining wait for the shards that they need.
if [ -z "$local_text" ]; then
    run python -m nanochat_jax.dataset --config="$preset" --begin
    python -m nanochat_jax.dataset --config="$preset" --tasks &
    download=$!
    trap 'kill "$download" 2>/dev/null || true' EXIT
fi
banner "tokenizer"
run python -m scripts.tok_train --config="$preset" ${fresh:+--fresh}
evaluate tokenizer tok_eval scripts.tok_eval

# -----------------------------------------------------------------------------
# Pretraining: the model learns to predict text

train base
if [ -n "${download:-}" ]; then
    banner "waiting for the rest of the download"
    wait "$download" || echo "warning: some files could not be downloaded (see above); pretraining did not need them"
    trap - EXIT
fi
evaluate base base_loss scripts.base_loss -i base -g "$tag"
core=${CORE_DIR:-$base/eval_bundle}
if [ -d "$core" ]; then
    evaluate base base_eval scripts.base_eval -i base -g "$tag" --core_dir="$core"
elif [ -n "$local_text" ]; then
    banner "CORE skipped: no bundle in $core, and this preset does not download it (set CORE_DIR if you have it)"
else
    code=0
    evaluate base base_eval scripts.base_eval -i base -g "$tag" || code=$?
    case $code in
        0) ;;
        2) banner "CORE skipped, see above (set CORE_DIR if you have its bundle)" ;; # the user can fix the error
        *) exit "$code" ;;
    esac
fi

# -----------------------------------------------------------------------------
# Midtraining: the model learns the format of conversations, tools and multiple choice

train mid
evaluate mid chat_eval_mid scripts.chat_eval -i mid -g "$tag" ${mid_limit[@]+"${mid_limit[@]}"}

# -----------------------------------------------------------------------------
# Supervised finetuning: the model learns to answer, and to stop

train sft
evaluate sft chat_eval_sft scripts.chat_eval -i sft -g "$tag"

# -----------------------------------------------------------------------------
# Reinforcement learning: the model learns to be right more often

last=sft
if [ -n "$rl" ]; then
    train rl
    evaluate rl chat_eval_rl scripts.chat_eval -i rl -g "$tag"
    last=rl
fi

# -----------------------------------------------------------------------------
# Report, and a first question

banner "report"
run python -m nanochat_jax.report generate -g "$tag"

banner "a sample question"
question="What is 37 * 12?"
echo "> $question"
run python -m scripts.chat_cli -i "$last" -g "$tag" -p "$question"

cat <<TXT

== done in $((SECONDS / 60)) min $((SECONDS % 60)) s; the report is in report.md. Talk to the model:
   .venv/bin/python -m scripts.chat_cli -i $last -g $tag
   .venv/bin/python -m scripts.chat_web -i $last -g $tag
TXT
