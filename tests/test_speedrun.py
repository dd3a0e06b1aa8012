"""The shell scripts: which steps of the pipeline run once, which run again, and what stops it.

The real speedrun_jax.sh runs in a copy of the tree in which `python` is a stub that records its arguments and creates
the files that the pipeline looks for. It runs `python -c CODE` only if $REAL is a Python. Otherwise, it looks for local
text with grep, and whatever else speedrun_jax.sh asks for in this way is always "the same".
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_jax.config import REPOSITORY

H100 = "GPU 0: NVIDIA H100 (UUID: GPU-0)"
STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
    [ -z "${REAL:-}" ] || exec "$REAL" "$@"
    case $2 in
        *config.Dataset*) ! grep -qs '^data = "local"' "configs/$3.toml" "$3" || echo yes ;;
        *) echo "the same" ;;
    esac
    exit
fi
echo "$*" >> "$CALLS"
echo "${JAX_PLATFORMS:-}" >> "$CALLS.platforms"
case "$*" in
    *scripts.train*) stage=$(sed 's/.*--stage=\\([a-z]*\\).*/\\1/' <<< "$*") tag=${!#}
        step=$NANOCHAT_BASE_DIR/${stage}_checkpoints/${tag#--config=}/step_000001
        [ -e "$step/manifest.json" ] || { mkdir -p "$step"; echo {} > "$step/manifest.json"; } ;;
    "-m nanochat_jax.dataset --config=d12 --tasks") sleep "${DOWNLOAD:-0}"; echo "downloaded" >> "$CALLS"
        exit "${DOWNLOAD_STATUS:-0}" ;;
    *tok_train*) folder=$NANOCHAT_BASE_DIR/tokenizer
        [ -e "$folder/tokenizer.json" ] || { mkdir -p "$folder"; echo {} > "$folder/tokenizer.json"; } ;;
    *"report reset -g cpu"*) mkdir -p "$NANOCHAT_BASE_DIR/report/cpu"
        echo {} > "$NANOCHAT_BASE_DIR/report/cpu/start.json" ;;
esac
[[ -z "${FAIL:-}" || "$*" != *"$FAIL"* ]] || exit "${CODE:-2}"
"""


@pytest.fixture
def road(tmp_path):
    """road(*arguments, **environment) -> (process, the arguments of each python command it ran)."""
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    for name in ("speedrun_jax.sh", "configs"):
        source = REPOSITORY / name
        shutil.copytree(source, tree / name) if source.is_dir() else shutil.copy(source, tree / name)
    (tree / "setup.sh").write_text("mkdir -p .venv && ln -sfn ../bin .venv/bin\n")
    (tree / "bin" / "python").write_text(STUB)
    (tree / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    for stub in (tree / "bin").iterdir():
        stub.chmod(0o755)

    def run(*arguments: str, **environment: str):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        env = run.environment | {"NANOCHAT_BASE_DIR": str(run.base)} | environment
        process = subprocess.run(
            ["bash", str(tree / "speedrun_jax.sh"), *arguments], cwd=tmp_path, env=env, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        return process, calls.read_text().splitlines() if calls.exists() else []

    run.base = tmp_path / "made"
    path = f"{tree}/bin:{os.environ['PATH']}"
    run.environment = os.environ | {"CALLS": str(tmp_path / "calls"), "NANOCHAT_BASE_DIR": str(run.base), "PATH": path}
    return run


def stages(calls: list[str]) -> list[str]:
    return [c.split("--stage=")[1].split()[0] for c in calls if "--stage=" in c]


def evaluations(calls: list[str]) -> list[str]:
    return [c for c in calls if "chat_eval" in c or "base_loss" in c or "base_eval" in c or "tok_eval" in c]


def test_the_whole_road_in_order(road):
    process, calls = road()
    assert process.returncode == 0, process.stderr
    assert "preset cpu: no NVIDIA GPU" in process.stdout and "CORE skipped" in process.stdout
    assert stages(calls) == ["base", "mid", "sft", "rl"]
    assert len(evaluations(calls)) == 5
    assert "chat_cli" in calls[-1] and "scripts.chat_web" in process.stdout


@pytest.mark.parametrize(
    ("listed", "given", "used"),
    [
        ("GPU 0: NVIDIA H100 (UUID: GPU-0)", "", "cuda"),
        ("GPU 0: NVIDIA H100 (UUID: GPU-0)", "cpu", "cpu"),
        ("", "", ""),
    ],
)
def test_jax_may_not_fall_back_to_the_cpu_where_there_are_gpus(road, tmp_path, listed, given, used):
    (tmp_path / "tree" / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
    process, _ = road("cpu", JAX_PLATFORMS=given)
    assert process.returncode == 0, process.stderr
    assert set((tmp_path / "calls.platforms").read_text().splitlines()) == {used}


def test_second_time_nothing_is_evaluated_again(road):
    _, calls = road()
    assert sum("report reset -g cpu" in c for c in calls) == 1
    process, calls = road()
    assert process.returncode == 0 and evaluations(calls) == [] and not any("report reset" in c for c in calls)


def test_only_what_has_changed_is_evaluated_again(road):
    def evaluated() -> list[str]:
        """Runs the script with the real rule for what is current, and returns which evaluations it ran."""
        process, calls = road(REAL=sys.executable, PYTHONPATH=str(REPOSITORY))
        assert process.returncode == 0, process.stderr
        output.append(process.stdout)
        return [c.split("scripts.")[1].partition(" -g")[0] for c in evaluations(calls)]

    output: list[str] = []
    assert len(evaluated()) == 5
    sft = road.base / "sft_checkpoints" / "cpu"
    for name in ("step_000001-hf", "step_12", "step_000009.bak", "step_000008"):  # the last one is half-written
        (sft / name).mkdir()
    (sft / "step_000001-hf" / "manifest.json").write_text("exported weights")
    (sft / "step_000009.bak" / "manifest.json").write_text("a copy")
    copy = shutil.copytree(road.base, road.base.with_name("copy"), copy_function=shutil.copy)
    road.base = copy
    for path in copy.rglob("*"):  # in a copy, files have any times
        is_mark = path.parent.parent.name == "road"
        os.utime(path, (1e9, 1e9) if is_mark else (2e9, 2e9))
    assert evaluated() == []

    sft = copy / "sft_checkpoints" / "cpu"
    for step in ("step_1000000", "step_999999"):  # the name that sorts last is not the last step
        (sft / step).mkdir()
        (sft / step / "manifest.json").write_text(step)
        os.utime(sft / step / "manifest.json", (1e8, 1e8))
    assert evaluated() == ["chat_eval -i sft"]
    assert "chat_eval_sft again: it was done for sft cpu step 1 " in output[-1]
    assert "sft cpu step 1000000 " in (copy / "road" / "cpu" / "chat_eval_sft").read_text()

    (copy / "mid_checkpoints" / "cpu" / "step_000001" / "manifest.json").write_text("trained again")
    (copy / "tokenizer" / "tokenizer.json").write_text("another")
    (copy / "road" / "cpu" / "chat_eval_rl").write_text("")
    assert evaluated() == ["tok_eval --config=cpu", "chat_eval -i mid", "chat_eval -i rl"]
    assert "chat_eval_rl again: it was done for something that an earlier version of this script" in output[-1]


def test_training_that_leaves_no_checkpoint_is_one_line(road, tmp_path):
    stub = tmp_path / "tree" / "bin" / "python"
    stub.write_text(f'#!/usr/bin/env bash\n[[ "$*" != *scripts.train* ]] || exit 0\n{STUB}')
    process, calls = road(REAL=sys.executable, PYTHONPATH=str(REPOSITORY))
    assert process.returncode == 1 and not any("base_loss" in c for c in calls)
    assert process.stderr == f"error: {road.base}/base_checkpoints/cpu has no complete checkpoint\n"


def test_another_presets_start_is_not_this_ones(road):
    start = road.base / "report" / "d20" / "start.json"
    start.parent.mkdir(parents=True)
    start.write_text("{}")
    _, calls = road("cpu")
    assert any("report reset -g cpu" in c for c in calls) and any("report generate -g cpu" in c for c in calls)
    road("--fresh", "cpu")
    (old,) = road.base.glob("before-*")
    assert start.exists() and [p.name for p in (old / "report").iterdir()] == ["cpu"]


def test_failure_ends_the_road_and_is_not_marked_as_done(road):
    process, calls = road(FAIL="chat_eval -i mid")
    assert process.returncode == 2 and stages(calls) == ["base", "mid"]
    process, calls = road()
    assert process.returncode == 0 and len(evaluations(calls)) == 3  # mid, sft, rl; the earlier ones are not repeated


def test_core_is_run_where_its_bundle_is(road, tmp_path):
    (tmp_path / "core").mkdir()
    process, calls = road(CORE_DIR="core")  # relative to the caller's folder
    assert process.returncode == 0
    assert any("base_eval" in c and f"--core_dir={tmp_path / 'core'}" in c for c in calls)


def test_core_is_skipped_without_its_bundle_and_nothing_else_is(road):
    process, calls = road("d12", FAIL="base_eval")
    assert process.returncode == 0 and "CORE skipped, see above" in process.stdout
    assert stages(calls) == ["base", "mid", "sft"]
    process, calls = road("d12", FAIL="base_eval", CODE="137")
    assert process.returncode == 137 and "CORE skipped" not in process.stdout
    assert stages(calls) == ["base"]


def test_training_starts_before_the_download_ends(road):
    process, calls = road("d12", DOWNLOAD="1")
    assert process.returncode == 0, process.stderr
    (base,) = [i for i, call in enumerate(calls) if "--stage=base" in call]
    (evaluated,) = [i for i, call in enumerate(calls) if "base_loss" in call]
    assert base < calls.index("downloaded") < evaluated


def test_a_download_that_fails_in_part_costs_no_training(road):
    process, calls = road("d12", DOWNLOAD_STATUS="2")
    assert process.returncode == 0 and stages(calls) == ["base", "mid", "sft"]
    assert "warning: some files could not be downloaded" in process.stdout


def test_fresh_moves_everything_aside(road):
    road()
    process, calls = road("--fresh")
    assert "starting over" in process.stdout and len(evaluations(calls)) >= 4
    (old,) = road.base.glob("before-*")
    assert (old / "sft_checkpoints" / "cpu" / "step_000001" / "manifest.json").exists()
    assert any("tok_train" in c and "--fresh" in c for c in calls)


@pytest.mark.parametrize(("given", "meant"), [("~/mine", "{home}/mine"), ("made here", "{cwd}/made here")])
def test_the_base_folder_is_the_callers(road, tmp_path, given, meant):
    (tmp_path / "home").mkdir()
    where = Path(meant.format(home=tmp_path / "home", cwd=tmp_path))
    for _ in range(2):
        process, calls = road(NANOCHAT_BASE_DIR=given, HOME=str(tmp_path / "home"))
        assert process.returncode == 0, process.stderr
        assert (where / "sft_checkpoints" / "cpu" / "step_000001" / "manifest.json").exists()
    assert not any("report reset" in c for c in calls), "not the first time"


def test_what_does_not_fit_a_gpu_machine_is_said_before_the_download(road):
    process, calls = road("d20", FAIL="scripts.doctor")
    assert process.returncode == 2 and not any("dataset" in c for c in calls)


OLD_TOOL = """#!/bin/sh
case $1 in -*) echo "illegal option -- $1" >&2; exit 1 ;; esac
exec {real} "$@"
"""


def test_the_road_needs_no_gnu_tools(road, tmp_path):
    """As on macOS, where realpath and readlink know no options. The script may be a link, and paths may be relative."""
    for tool in ("realpath", "readlink"):
        stub = tmp_path / "tree" / "bin" / tool
        stub.write_text(OLD_TOOL.format(real=shutil.which(tool)))
        stub.chmod(0o755)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "road").symlink_to("../tree/speedrun_jax.sh")
    shutil.copy(REPOSITORY / "configs" / "cpu.toml", tmp_path / "mine.toml")
    done = subprocess.run(
        ["bash", "links/road", "mine.toml"], cwd=tmp_path, env=road.environment | {"NANOCHAT_BASE_DIR": "new/made"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"--config={tmp_path}/mine.toml" in (tmp_path / "calls").read_text()
    assert (tmp_path / "new" / "made" / "base_checkpoints").is_dir()


ONLY_GNU = (  # and forms that bash 3.2 does not know
    r"realpath -|readlink -\w|sed -(i|z)|sed [^|]*[^;]\}'|grep -\w*P|head -n -|date -|sort -V|xargs -\w*r|\bnproc\b"
    r"|\btac\b|\btimeout \d|stat -c|cp -\w*[tT]|mktemp -\w*p|find [^|]*-printf"
    r"|mapfile|readarray|declare -A|\$\{\w+(,,|\^\^|@Q)|\|&|&>>"
)


@pytest.mark.parametrize("name", ["speedrun_jax.sh", "setup.sh", "tests/run.sh"])
def test_shell_scripts_run_with_the_tools_and_the_bash_of_macos(name):
    """Bash 3.2 takes an empty array for an unset variable, so one that may be empty needs ${name[@]+...}."""
    code = re.sub(r"(^|\s)#.*", "", (REPOSITORY / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not re.search(ONLY_GNU, code)
    may_be_empty = set(re.findall(r"(\w+)=\(\)", code)) - set(re.findall(r"\]\] \|\| (\w+)\+=\(", code))
    for array in may_be_empty:
        assert not re.search(rf'(?<!\+)"\$\{{{array}\[@\]\}}"', code), array


@pytest.mark.parametrize("arguments", [["d99"], ["--quick"], ["mine.conf"]])
def test_unknown_preset_or_option_is_one_line(road, tmp_path, arguments):
    (tmp_path / "mine.conf").write_text("depth = 4\n")
    process, calls = road(*arguments)
    assert process.returncode == 2 and calls == []
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


def test_two_presets_are_refused(road):
    process, calls = road("cpu", "d20")
    assert process.returncode == 2 and process.stderr == "error: two presets, cpu and d20: name one\n" and not calls


def test_a_copy_of_the_cpu_preset_runs_as_the_preset_does(road, tmp_path):
    (tmp_path / "mine.toml").write_text((REPOSITORY / "configs" / "cpu.toml").read_text())
    _, expected = road("cpu")
    process, calls = road(str(tmp_path / "mine.toml"))
    assert process.returncode == 0 and "CORE skipped" in process.stdout and "warning" not in process.stderr
    as_cpu = [call.replace(str(tmp_path / "mine.toml"), "cpu").replace("-g mine", "-g cpu") for call in calls]
    assert as_cpu == expected and "--stage=rl" in "".join(calls)


def test_a_preset_that_cannot_be_read_is_one_line(road, tmp_path):
    (tmp_path / "mine.toml").write_text("depht = 4\n")
    process, calls = road(str(tmp_path / "mine.toml"), REAL=sys.executable, PYTHONPATH=str(REPOSITORY))
    assert process.returncode == 2 and not calls
    assert process.stderr.startswith("error: ") and "did you mean depth?" in process.stderr
    assert process.stderr.count("\n") == 1


def test_a_preset_for_gpus_is_doubted_on_a_machine_without(road):
    process, _ = road("d12")
    assert "warning: no NVIDIA GPU here, and preset d12 is made for GPUs" in process.stderr


def test_help_from_another_folder(road):
    process, _ = road("--help")
    assert process.returncode == 0 and "--fresh" in process.stdout


# -----------------------------------------------------------------------------
# Signals

# Training for these tests: it saves for half a second after a signal, and ends with 128 + the signal's number.
TRAINING = """#!/usr/bin/env python3
import signal, sys, time

def save(signum, frame):
    for other in caught:
        signal.signal(other, signal.SIG_IGN)
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(128 + signum)

caught = [s for s in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
for signum in caught:
    signal.signal(signum, save)
print("training", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("signum", "everyone"),
    [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
)
def test_a_signal_reaches_training_and_the_script_waits_for_it(road, tmp_path, signum, everyone):
    """`kill` reaches the script alone. Ctrl-C in a terminal, and some schedulers, reach the whole process group."""
    stub = tmp_path / "tree" / "bin" / "python"
    stub.write_text(f'#!/usr/bin/env bash\n[[ "$*" != *scripts.train* ]] || exec {tmp_path}/train\n{STUB}')
    (tmp_path / "train").write_text(TRAINING)
    (tmp_path / "train").chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(tmp_path / "tree" / "speedrun_jax.sh"), "cpu"], env=road.environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert any(line == "training\n" for line in process.stdout)
        os.killpg(process.pid, signum) if everyone else process.send_signal(signum)
        rest = process.stdout.read()  # ends when neither the script nor training has it open
    assert process.returncode == 128 + signum, rest
    assert rest == "saved\n", "training saved, and nothing ran after it"


def test_training_that_is_killed_ends_the_script(road, tmp_path):
    """As when the machine runs out of memory."""
    stub = tmp_path / "tree" / "bin" / "python"
    stub.write_text(f'#!/usr/bin/env bash\n[[ "$*" != *scripts.train* ]] || kill -KILL $$\n{STUB}')
    process, calls = road("cpu")
    assert process.returncode == 128 + signal.SIGKILL
    assert "chat_eval" not in " ".join(calls) and "already done" not in process.stdout
