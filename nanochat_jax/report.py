"""Writes report.md from the runs' files.

The report says what was run, on what machine, how long it took, and how good the result is.

    python -m nanochat_jax.report reset       record the start time and the machine
    python -m nanochat_jax.report generate    write report/report.md in the base folder, and ./report.md

The report covers the run that was saved last, its ancestors and its descendants (see lineage.py). A stage without a run
gets no section. With --model_tag=TAG, the report covers the runs called TAG. `reset` and `generate` then use the folder
report/TAG, so each tag has its own start time. Plots are PNG files in the folder of report.md. Without matplotlib, no
plots are drawn.
"""

import dataclasses
import json
import math
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax import checkpoint, commandline, config, environment, lineage, run_log
from nanochat_jax.config import STAGES, GPTConfig, UserError, base_dir
from nanochat_jax.evals.score import with_error
from nanochat_jax.files import read_json, write_text
from nanochat_jax.parallel import devices
from nanochat_jax.progress import clock

TITLES = {"base": "Pretraining", "mid": "Midtraining", "sft": "Supervised finetuning", "rl": "Reinforcement learning"}
METRICS = ("CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "SpellingBee", "ChatCORE")
ALWAYS_SHOWN = ("depth", "max_seq_len", "total_batch_size", "matrix_lr", "embedding_lr", "unembedding_lr", "mixture",
                "init_lr_frac", "num_epochs", "target_param_data_ratio", "packing", "seed")  # fmt: skip
TOKENIZER_FACTS = (
    "source", "documents", "chars", "reached_vocab_size", "special_tokens", "token_bytes_min", "token_bytes_max",
    "token_bytes_mean", "token_bytes_std",
)  # fmt: skip
SCORES = "Scores come with standard error and number of problems. For bits per byte, the error is computed from rows.\n"
NEVER_SHOWN = ("run", "model_tag", "resume", "tag")


@dataclass
class LoggedRun:
    """A run of one stage, read from its folder."""

    stage: str
    tag: str
    folder: Path
    records: list[dict]
    settings: dict
    step: int | None  # step of the last checkpoint, or None without a checkpoint
    meta: dict  # metadata of the last checkpoint, or {} without a checkpoint

    def of(self, kind: str) -> list[dict]:
        """Returns the records of one kind, sorted by step."""
        return sorted((r for r in self.records if r["kind"] == kind), key=lambda r: r["step"])

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which the number `name` was logged, and its values at these steps."""
        points = [(r["step"], r[name]) for r in self.of(kind) if isinstance(r.get(name), int | float)]
        return [step for step, _ in points], [value for _, value in points]

    def scores(self) -> dict[str, dict]:
        """Returns {task: record} with each task's most reliable record on the test split.

        If a task has several records, these criteria decide, in this order: the last checkpoint, greedy answers, the
        most problems, the longest answers allowed, the newest record.
        """

        def rank(record: dict) -> tuple:
            greedy = not record.get("temperature") and (record.get("num_samples") or 1) == 1
            size = record.get("n") or 0, record.get("max_new_tokens") or 0
            return record["step"] == self.step, greedy, *size, record.get("time") or 0

        best: dict[str, dict] = {}
        for record in sorted(self.of("eval"), key=rank):
            is_test = record.get("split") in (None, "test")  # records of CORE and of bits per byte have no split
            if is_test and isinstance(record.get("score"), int | float) and record.get("task"):
                best[record["task"]] = record
        return best

    def unusual(self, record: dict) -> str:
        """Says what is unusual about a score, such as "step 30, temperature 0.8".

        Returns "" for greedy answers of the last checkpoint.
        """
        step, temperature, samples = record["step"], record.get("temperature"), record.get("num_samples") or 1
        notes = [f"step {step:,}"] if self.step is not None and step != self.step else []
        notes += [f"temperature {temperature:g}"] if temperature else []
        notes += [f"best of {samples}"] if samples > 1 else []
        return ", ".join(notes)

    @property
    def began(self) -> float:
        """The time of the first record, or 0.0 if no record has a time."""
        return min((r["time"] for r in self.records if r.get("time")), default=0.0)

    @property
    def ended(self) -> float:
        """The time at which training finished.

        For an unfinished run, this is the time of the last record that is not an evaluation.
        """
        timed = [r for r in self.records if r.get("time")]
        finished = [r["time"] for r in timed if r["kind"] == "note" and r.get("text") == "finished"]
        return max(finished or [r["time"] for r in timed if r["kind"] != "eval"] or [self.began])


# -----------------------------------------------------------------------------
# Reading


def read_run(stage: str, folder: Path) -> LoggedRun:
    """Reads a run from its folder. Prints a line if the metadata of its last checkpoint is damaged."""
    steps = checkpoint.steps(folder)
    step = steps[-1] if steps else None
    meta = {} if step is None else read_json(checkpoint.step_dir(folder, step) / "meta.json")
    if step is not None and not meta:
        print(f"{checkpoint.step_dir(folder, step) / 'meta.json'} is damaged: no model and no parent are reported")
    return LoggedRun(stage, folder.name, folder, run_log.read(folder), read_json(folder / "config.json"), step, meta)


# -----------------------------------------------------------------------------
# The start


def reset(tag: str = "") -> Path:
    """Records the machine and the current time in start.json, and returns the path of this file."""
    path = _folder(tag) / "start.json"
    start = {"time": round(time.time(), 3), "environment": environment.describe(devices.described_by_child())}
    write_text(path, json.dumps(start, indent=1) + "\n")
    return path


def _start(folder: Path, runs: dict[str, LoggedRun]) -> dict:
    """Returns what `reset` recorded in `folder`. Returns {} if there was no reset before the first of `runs` began."""
    start = read_json(folder / "start.json")
    first = min((run.began for run in runs.values() if run.began), default=math.inf)
    return start if isinstance(start.get("time"), int | float) and start["time"] <= first else {}


def _folder(tag: str) -> Path:
    """Returns the folder of report.md and start.json for the runs called `tag`."""
    return base_dir() / "report" / tag


# -----------------------------------------------------------------------------
# Writing


def generate(tag: str = "", output: Path = Path("report.md")) -> Path:
    """Writes report.md below the base folder and returns its path. Also writes a copy to `output`.

    Raises UserError if there is nothing to report on.
    """
    chosen = lineage.find(tag)
    runs = {stage: read_run(stage, folder) for stage, folder in chosen.runs.items()}
    tokenizer = run_log.read(base_dir() / "tokenizer")
    if not runs and (tag or not tokenizer):
        missing = f"a run called {tag!r}" if tag else "a tokenizer or a run"
        first = f"python -m scripts.train --stage=base --model_tag={tag}" if tag else "python -m scripts.tok_train"
        fix = f"choose another --model_tag, or run {first} first" if tag else f"run {first} first"
        raise UserError(f"nothing to report on: {base_dir()} does not hold {missing} yet: {fix}")
    folder = _folder(tag)
    folder.mkdir(parents=True, exist_ok=True)
    start = _start(folder, runs)
    plots, remark = _plots(runs, folder)

    parts = ["# nanochat report\n", _header(start), "## Summary\n", _summary(runs, start), remark]
    parts += [f"{text}\n" for text in chosen.remarks]
    parts += [_tokenizer(tokenizer)] if tokenizer else []
    parts += [_section(run, plots.get(stage)) for stage, run in runs.items()]
    text = "\n".join(part for part in parts if part)
    write_text(folder / "report.md", text)
    # The plots stay in `folder`, so the copy must refer to them by paths that are relative to the copy's own folder.
    for plot in plots.values():
        relative = Path(os.path.relpath((folder / plot).resolve(), output.resolve().parent)).as_posix()
        text = text.replace(f"]({plot})", f"]({relative})")
    write_text(output, text)
    for text in chosen.remarks:
        print(text)
    return folder / "report.md"


def _header(start: dict) -> str:
    now = environment.describe(devices.described_by_child())
    facts = start.get("environment") or now
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    changed = [f"{k.lower()} {now[k]}" for k in ("Code", "Devices", "Versions") if facts.get(k) != now[k]]
    lines += [f"- Different when the report was written: {'; '.join(changed)}"] if changed else []
    return "\n".join(lines) + "\n"


def _summary(runs: dict[str, LoggedRun], start: dict) -> str:
    scores = {stage: run.scores() for stage, run in runs.items()}
    # Chat tasks outside METRICS get rows at the end. CORE's tasks get no rows, because each run's section lists them.
    others = {t for s in scores.values() for t, r in s.items() if r.get("suite") == "chat" and t not in METRICS}
    header = [f"{s.upper()} ({runs[s].tag})" if s in runs else s.upper() for s in STAGES]
    rows = [["bits per byte", *(_bpb(runs[s]) if s in runs else "-" for s in STAGES)]]
    for name in (*METRICS, *sorted(others)):
        cells = [_cell(runs[s], scores[s], name) if s in runs else "-" for s in STAGES]
        if name in ("CORE", "ChatCORE") or set(cells) != {"-"}:
            rows.append([name, *cells])
    lines = [_table(["Metric", *header], rows), SCORES]
    if runs:
        total, without_rl = _wall_time(runs, start)
        after = f" ({clock(total)} with reinforcement learning)" if total > without_rl else ""
        since = "the reset" if start else "the first record"
        lines.append(f"Total wall-clock time since {since}: {clock(without_rl)}{after}.\n")
    return "\n".join(lines)


def _cell(run: LoggedRun, scores: dict[str, dict], name: str) -> str:
    if name in scores:
        return _score(scores[name]["score"], scores[name], run.unusual(scores[name]))
    measured = [r for r in run.of("core") if isinstance(r.get("core"), int | float)]
    return _score(measured[-1]["core"], measured[-1], "in training") if name == "CORE" and measured else "-"


def _bpb(run: LoggedRun) -> str:
    if record := run.scores().get("val_bpb"):
        return _score(record["score"], record, run.unusual(record))
    measured = [r for r in run.of("val") if isinstance(r.get("bpb"), int | float)]
    return _score(measured[-1]["bpb"], measured[-1]) if measured else "-"


def _score(score: float, record: dict, note: str = "", digits: int = 4) -> str:
    """Formats a score with its standard error and the number of problems: "0.4512 ± 0.0031 (n=1,319, step 30)".

    Records written by early versions may lack both numbers.
    """
    stderr = record["stderr"] if isinstance(record.get("stderr"), int | float) else None
    size = f"n={record['n']:,}" if record.get("n") else ""
    size += f" tokens, {record['rows']:,} rows" if size and record.get("rows") else ""
    return with_error(score, stderr, ", ".join(filter(None, [size, note])), digits)


def _wall_time(runs: dict[str, LoggedRun], start: dict) -> tuple[float, float]:
    """Returns the seconds from the start to the end of the last stage, with and without reinforcement learning.

    The end of a stage is the end of its training plus the seconds of evaluations that ran later. Idle time before an
    evaluation does not count.
    """
    begin = start.get("time") or min(run.began for run in runs.values())
    ends = {stage: run.ended + _evaluation_seconds(run) for stage, run in runs.items()}
    before_rl = [end for stage, end in ends.items() if stage != "rl"]
    return max(ends.values()) - begin, max(before_rl, default=begin) - begin


def _evaluation_seconds(run: LoggedRun) -> float:
    """Returns the seconds that evaluations took after training. An evaluation counts only if its score is shown.

    CORE and ChatCORE are left out, because their tasks are counted one by one.
    """
    shown = [r for task, r in run.scores().items() if task not in ("CORE", "ChatCORE")]
    return sum(r.get("seconds") or 0 for r in shown if (r.get("time") or 0) > run.ended)


def _tokenizer(records: list[dict]) -> str:
    lines = ["## Tokenizer\n"]
    for record in (r for r in records if r["kind"] == "tok_train"):
        lines += [f"- {name.replace('_', ' ')}: {_show(record[name])}" for name in TOKENIZER_FACTS if name in record]
        lines += [f"- time: {clock(record['seconds'])}"] if "seconds" in record else []
        lines.append("")
    rows = []
    for record in (r for r in records if r["kind"] == "tok_eval"):
        ours = record["tokens"]
        row = [record["task"], f"{record['bytes']:,}", f"{ours:,}", f"{record['bytes'] / max(ours, 1):.2f}"]
        for peer in ("gpt2_tokens", "gpt4_tokens"):
            theirs = record.get(peer)
            row.append(f"{100 * (theirs - ours) / max(theirs, 1):+.1f}%" if theirs else "-")
        rows.append(row)
    if rows:
        lines.append("Bytes per token (more is better), and the share of tokens that ours saves against others:\n")
        lines.append(_table(["Text", "Bytes", "Tokens", "Bytes/token", "vs GPT-2", "vs GPT-4"], rows))
    return "\n".join(lines)


def _section(run: LoggedRun, plot: str | None) -> str:
    lines = [f"## {TITLES[run.stage]} ({run.tag})\n", *_facts(run), ""]
    lines += [f"![{TITLES[run.stage]}]({plot})\n"] if plot else []
    scores = run.scores()
    core = [
        [
            name,
            _score(r["score"], r, run.unusual(r)),
            with_error(r["centered"], r["stderr"] / (1 - (r.get("baseline") or 0)), sign="+"),
            _count(r, "cut"),
        ]
        for name, r in scores.items()
        if r.get("suite") == "core" and name != "CORE"
    ]
    if core:
        lines.append(
            "CORE by task (centered accuracy: 0 is guessing, 1 is perfect; cut: prompts cut to the context):\n"
        )
        lines.append(_table(["Task", "Accuracy", "Centered", "Cut"], core))
    chat = [
        [
            r["task"],
            _cell(run, scores, name),
            "-" if r.get("truncated") is None else f"{r['truncated']:.1%}",
            _count(r, "cut"),
            clock(r["seconds"]) if r.get("seconds") else "-",
        ]
        for name, r in scores.items()
        if r.get("suite") == "chat"
    ]
    if chat:
        lines.append("Chat tasks (truncated: answers that reached the token limit; cut: prompts cut to the context):\n")
        lines.append(_table(["Task", "Score", "Truncated", "Cut", "Time"], chat))
    samples = run.of("sample")
    if samples:
        last = samples[-1]["step"]
        lines.append(f"Samples at step {last:,}, greedy:\n")
        lines += [f"- {_code(r.get('task', ''))} → {_code(r.get('text', ''))}" for r in samples if r["step"] == last]
        lines.append("")
    return "\n".join(lines)


def _facts(run: LoggedRun) -> list[str]:
    """Lists a run's model, settings, cost and results as lines of Markdown."""
    facts: dict[str, str] = {}
    if "model" in run.meta:
        model_cfg = GPTConfig(**run.meta["model"])
        facts["model"] = f"{model_cfg.num_params:,} parameters, {model_cfg.describe()}"
    facts["parent"] = run.meta.get("parent", "")
    facts["settings"] = ", ".join(f"{k} {_show(v)}" for k, v in _settings(run).items())
    train = run.of("train")
    if train:
        last = train[-1]
        facts["steps"] = f"{last['step']:,}"
        facts["tokens"] = _show(last.get("tokens"))
        facts["FLOPs"] = f"{last['flops']:.3e}" if last.get("flops") else ""
        seconds = sum(r["dt"] for r in train if r.get("dt") and r["step"] > config.UNTIMED_STEPS)
        in_steps = f"{clock(seconds)} in steps (without the first {config.UNTIMED_STEPS})"
        facts["time"] = f"{in_steps}, {clock(run.ended - run.began)} from start to end"
        _, losses = run.series("train", "loss")
        facts["final training loss"] = f"{smooth(losses)[-1]:.4f} (moving average)" if losses else ""
        _, speeds = run.series("train", "tok_per_s")
        facts["speed"] = f"{statistics.median(speeds):,.0f} tokens/s (median)" if speeds else ""
        _, mfu = run.series("train", "mfu")
        unknown = "n/a (no peak known for this device)" if speeds else ""
        facts["MFU"] = f"{statistics.median(mfu):.1%} (median)" if mfu else unknown
        _, rewards = run.series("train", "reward")
        rewarded = [r for r in train if isinstance(r.get("reward"), int | float)]
        if rewards:
            last_step = _score(rewards[-1], rewarded[-1])
            facts["final reward"] = f"{smooth(rewards)[-1]:.4f} (moving average), last step {last_step}"
        for name, what in (("cut", "problems cut to the context"), ("other_format", "right answers in another format")):
            counts = [r[name] for r in train if r.get(name)]
            facts[what] = f"{sum(counts):,}, in {len(counts):,} of {len(train):,} steps" if counts else ""
    if measured := [r for r in run.of("val") if isinstance(r.get("bpb"), int | float)]:
        at_end = _score(measured[-1]["bpb"], measured[-1], digits=6)
        best = min(r["bpb"] for r in measured)
        facts["validation bits per byte"] = f"{at_end} at the end, {best:.6f} at best"
    passed = run.of("val")[-1] if run.of("val") else {}
    rates = [
        f"{k} {with_error(v, passed.get(f'{k}_stderr'))}"
        for k, v in passed.items()
        if re.fullmatch(r"pass@\d+", k) and isinstance(v, float)
    ]
    facts["validation"] = f"{', '.join(rates)} (n={passed.get('n')})" if rates else ""
    for split in ("train", "val"):
        record = run.scores().get(f"{split}_bpb")
        facts[f"base_loss, {split}"] = f"{_score(record['score'], record, digits=6)} bits per byte" if record else ""
    return [f"- {name}: {value}" for name, value in facts.items() if value not in ("", "-")]


def _settings(run: LoggedRun) -> dict:
    defaults = dataclasses.asdict(config.TRAINING[run.stage]())
    shape = {field.name for field in dataclasses.fields(config.ModelFlags)}
    return {
        name: value
        for name, value in run.settings.items()
        if value or name not in shape  # later stages take the model's shape from their parent
        if name not in NEVER_SHOWN and (name in ALWAYS_SHOWN or (name in defaults and value != defaults[name]))
    }


def _count(record: dict, name: str) -> str:
    """Returns the count `name` in a record, or "-" if an early version wrote the record without this count."""
    return "-" if record.get(name) is None else f"{record[name]:,}"


def _show(value: Any) -> str:
    """Formats a value as a person would write it: 12345 -> "12,345", 0.30000001 -> "0.3"."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return " + ".join(f"{k} {_show(v)}" for k, v in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    """Formats a model's text as inline code on one line."""
    return "`" + repr(text)[1:-1].replace("`", "'") + "`"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


# -----------------------------------------------------------------------------
# Plots


def smooth(values: list[float], factor: float = 0.9) -> list[float]:
    """Returns exponential moving averages of `values`, with bias correction."""
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = factor * average + (1 - factor) * value, factor * weight + (1 - factor)
        result.append(average / weight)
    return result


def _plots(runs: dict[str, LoggedRun], folder: Path) -> tuple[dict[str, str], str]:
    """Draws each stage's curves. Returns {stage: file name}, and a remark if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return {}, "Plots are skipped: matplotlib is not installed (pip install 'nanochat-jax[report]').\n"
    matplotlib.use("Agg")
    names = {}
    for stage, run in runs.items():
        if len(run.of("train")) > 1:
            names[stage] = f"{stage}.png"
            _plot(run, folder / names[stage])
    return names, ""


def _plot(run: LoggedRun, path: Path) -> None:
    """Draws training and validation in two plots side by side, because they measure different quantities."""
    import matplotlib.pyplot as plt

    steps, losses = run.series("train", "reward" if run.stage == "rl" else "loss")
    validation = "pass@1" if run.stage == "rl" else "bpb"
    at, measured = run.series("val", validation)
    figure, axes = plt.subplots(1, 1 + bool(at), figsize=(10 if at else 5.5, 3.4), squeeze=False, layout="constrained")
    left = axes[0, 0]
    left.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="each step")
    left.plot(steps, smooth(losses), color="#1f4e79", linewidth=1.8, label="moving average")
    left.set_title("reward" if run.stage == "rl" else "training loss (nats per token)", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    if at:
        right = axes[0, 1]
        right.plot(at, measured, color="#b5541c", linewidth=1.8, marker="o", markersize=3.5)
        name = "validation pass@1" if run.stage == "rl" else "validation bits per byte"
        right.set_title(f"{name}, last {measured[-1]:.4f}", loc="left", fontsize=10)
    for axis in axes.flat:
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{TITLES[run.stage]} ({run.tag})", fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# -----------------------------------------------------------------------------


def main(cfg: config.Report) -> None:
    if cfg.command == "reset":
        print(f"the start time and this machine are recorded in {reset(cfg.model_tag or cfg.preset)}")
    else:
        print(f"written to {generate(cfg.model_tag or cfg.preset, Path(cfg.output))} and {cfg.output}")


if __name__ == "__main__":
    commandline.run(main, config.Report)
