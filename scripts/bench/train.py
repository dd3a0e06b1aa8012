"""Measures our training step, and where its time goes.

    python -m scripts.bench train
    python -m scripts.bench train --config=d20 --profile=TRACES
    python -m scripts.bench train --peer=hf --peer_python=ENVIRONMENT/bin/python
    python -m scripts.bench train --peer=nanochat --peer_dir=NANOCHAT --peer_python=ENVIRONMENT/bin/python

The step is that of training: Muon and AdamW, with the gradient of the whole loss. The tokens are random. With --peer,
the benchmark also measures a training step in PyTorch with torch.compile: "hf" is NanoChat in transformers, with AdamW
and a batched Muon; "nanochat" is the original's own model and optimizers, from a folder with its source.

Every measurement runs in a new process (train_job.py or train_peer_job.py), which warms up first. A round measures
every combination of shape, dtype and tool in turn. The first process of a combination compiles with an empty cache; the
next ones find the cache filled, so at least two rounds are needed for the time to the first step with a warm cache.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from nanochat_jax import commandline, config
from nanochat_jax.config import DEVICE_TYPE_HELP, DEVICES, GPTConfig, UserError, setting
from scripts.bench import measuring

JOB = Path(__file__).with_name("train_job.py")
PEER_JOB = Path(__file__).with_name("train_peer_job.py")
PEERS = ("hf", "nanochat")
DTYPES = ("float32", "bfloat16")
ROWS = 32  # rows per device if neither a flag nor the preset gives them, as in the original nanochat
SHAPES = {  # the default shapes of each platform: (rows per device, tokens per row, vocabulary)
    "cpu": ((4, 512, 32768), (16, 256, 4096)),
    "gpu": ((ROWS, 2048, 65536),),
}
DEPTH = {"cpu": 4, "gpu": 20}
SIZE = ("device_batch_size", "max_seq_len", "vocab_size")
STEP_FLAGS = ("attention", "remat", "shard", "scan_layers", "grad_clip", "weight_decay")  # they change the step
PARTS = ("forward", "loss", "backward", "optimizer", "communication", "host")
INSTALL = "python3 -m venv peers && peers/bin/pip install torch transformers"


@dataclass(frozen=True)
class Settings(config.Settings):
    """Time our training step and, for comparison, the same step in PyTorch."""

    prog: ClassVar[str] = "python -m scripts.bench train"
    preset_path: str = ""  # the file of the preset that --config gives; not a flag
    config: str = setting("", "preset that gives the shape (a name in configs/ or a TOML file); flags override it")
    device_type: str = setting("", DEVICE_TYPE_HELP, choices=DEVICES)
    depth: int = setting(0, "layers of the model (auto: 20 on a GPU, else 4)", auto=True, low=1)
    aspect_ratio: int = setting(0, "width per layer, as in training (auto: 64)", auto=True, low=1)
    head_dim: int = setting(0, "size of an attention head (auto: 128)", auto=True, low=2)
    n_kv_head: int = setting(0, "number of key/value heads (auto: one per query head)", auto=True, low=1)
    window_pattern: str = setting("", "attention windows, as in training (default: L)")
    device_batch_size: int = setting(
        0, "rows per device (auto: 32 on a GPU or with --config, else 4, and 16 for a second shape)", auto=True, low=1
    )
    max_seq_len: int = setting(0, "tokens per row (auto: 2048 on a GPU, else 512, and 256)", auto=True, low=2)
    vocab_size: int = setting(0, "vocabulary (auto: 65,536 on a GPU, else 32,768, and 4,096)", auto=True, low=1)
    dtypes: str = setting("", "dtypes to measure in turn (default: bfloat16 on a GPU, else float32,bfloat16)")
    attention: str = setting("", "attention kernel (default: cudnn on GPUs, else xla)", choices=("cudnn", "xla"))
    remat: str = setting("", "activations to recompute, as in training", choices=("none", "matmuls", "full"))
    shard: str = setting("", "what is sharded over several devices, as in training", choices=("optimizer", "full"))
    steps: int = setting(11, "steps to time in each process, after the warm-up", low=1)
    rounds: int = setting(3, "number of times that each measurement runs; the median is reported", low=1)
    peer: str = setting("", "PyTorch's steps to measure as well: hf, nanochat, or both joined by a comma")
    peer_python: str = setting("", "path of a Python with torch, and with transformers for hf (default: this one)")
    peer_dir: str = setting("", "for --peer=nanochat: checkouts of karpathy/nanochat, separated by commas")
    profile: str = setting("", "folder to write traces of a few steps to, for XProf and Perfetto")
    json: str = setting("", "file to append the results to, as one line of JSON")


class Shape(NamedTuple):
    """What is trained on in one step: rows of random tokens, and the model."""

    rows: int  # per device
    model_cfg: GPTConfig

    def __str__(self) -> str:
        return f"{self.rows} x {self.model_cfg.sequence_len:,}, vocabulary {self.model_cfg.vocab_size:,}"

    @property
    def folder(self) -> str:
        return f"{self.rows}x{self.model_cfg.sequence_len}v{self.model_cfg.vocab_size}"


class Kind(NamedTuple):
    """What one process measures."""

    shape: Shape
    dtype: str
    tool: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.tool}"


class Tool(NamedTuple):
    python: str
    script: Path
    job: dict  # its own part of the job
    version: str


def main(cfg: Settings) -> None:
    _check(cfg)
    device = measuring.device(JOB, cfg.device_type)
    flags, shapes = _shapes(cfg, device)
    default = "bfloat16" if device["platform"] == "gpu" else "float32,bfloat16"
    dtypes = (cfg.dtypes or flags.compute_dtype or default).split(",")
    own = {"job": "ours", "flags": {name: getattr(flags, name) for name in STEP_FLAGS}}
    tools = {"ours": Tool(sys.executable, JOB, own, f"jax {device['version']}")} | _peers(cfg, device["devices"])

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(cfg, device, tools, Path(folder))
        for i in range(cfg.rounds):
            for kind in [Kind(shape, dtype, tool) for shape in shapes for dtype in dtypes for tool in tools]:
                bench.measure(kind, i)
    rows = [_row(kind, runs, device) for kind, runs in bench.runs.items() if kind not in bench.failed]
    best = _compare(rows)

    about = measuring.about() | {name: device[name] for name in ("device", "platform", "devices")}
    about |= {"steps": cfg.steps, "rounds": cfg.rounds} | own["flags"]
    versions = {name: tool.version for name, tool in tools.items()}
    model_cfg = shapes[0].model_cfg
    print(
        f"{device['devices']} x {device['device']}; {about['cpu']}, {about['cores']} cores; Python {about['python']};"
    )
    print(f"{about['code']}; {', '.join(f'{tool}: {version}' for tool, version in versions.items())}")
    print(
        f"depth {model_cfg.n_layer}, width {model_cfg.n_embd}; rows per device x tokens; medians of {cfg.rounds} x "
        f"{cfg.steps} steps"
    )
    print("MFU as in the training log and, in brackets, with the causal average of attention\n")
    print(_table(rows))
    print("\nWhere the time of a step goes (of PyTorch's, forward includes the loss):\n")
    print(_parts_table(rows))
    for line in best:
        print(
            f"\n{line['shape']}: ours in {line['ours_dtype']} is {line['ours_is']:.2f}x {line['tool']} in "
            f"{line['dtype']} (the fastest dtype of each)"
        )
    measuring.report({"bench": "train", **about, "versions": versions, "results": rows, "best": best}, cfg.json)


def _check(cfg: Settings) -> None:
    """Raises UserError if the settings are invalid."""
    if cfg.dtypes and not set(cfg.dtypes.split(",")) <= set(DTYPES):
        raise UserError(f"--dtypes={cfg.dtypes}: must be {' or '.join(DTYPES)}, or both joined by a comma")
    peers = cfg.peer.split(",") if cfg.peer else []
    if not set(peers) <= set(PEERS):
        raise UserError(f"--peer={cfg.peer}: must be {' or '.join(PEERS)}, or both joined by a comma")
    if cfg.peer_python and not peers:
        raise UserError(f"--peer_python={cfg.peer_python} needs --peer={' or --peer='.join(PEERS)}")
    if cfg.peer_dir and "nanochat" not in peers:
        raise UserError(f"--peer_dir={cfg.peer_dir} needs --peer=nanochat")
    if "nanochat" in peers and not cfg.peer_dir:
        raise UserError(
            "--peer=nanochat needs --peer_dir: 'git clone https://github.com/karpathy/nanochat' makes such a folder"
        )
    if cfg.profile and config.user_path(cfg.profile).exists() and not config.user_path(cfg.profile).is_dir():
        raise UserError(f"--profile={cfg.profile}: is a file, give a folder")
    measuring.check_json(cfg.json)


def _shapes(cfg: Settings, device: dict) -> tuple[config.Base, list[Shape]]:
    """Returns the settings of training and the shapes to measure. Raises UserError if a shape is not valid.

    Flags override the preset, and the preset overrides the defaults of the platform.
    """
    preset = [f"--config={cfg.preset_path}"] if cfg.preset_path else []
    platform = "gpu" if device["platform"] == "gpu" else "cpu"
    base = commandline.parse(config.Base, preset)
    names = {field.name for field in dataclasses.fields(config.Base)} & {f.name for f in dataclasses.fields(cfg)}
    given = {name: getattr(cfg, name) for name in names if getattr(cfg, name)} | {"device_type": cfg.device_type}
    if not preset:
        given = {"depth": DEPTH[platform]} | given
    flags = dataclasses.replace(base, **given)
    if preset:
        vocab_size = cfg.vocab_size or commandline.parse(config.TokTrain, preset).vocab_size
        in_a_step = max(1, flags.total_batch_size // (flags.max_seq_len * device["devices"]))
        sizes = [(flags.device_batch_size or min(ROWS, in_a_step), flags.max_seq_len, vocab_size)]
    else:
        sizes = SHAPES[platform]
        if any(getattr(cfg, name) for name in SIZE):
            sizes = [tuple(getattr(cfg, name) or size for name, size in zip(SIZE, sizes[0], strict=True))]
    return flags, [
        Shape(rows, dataclasses.replace(flags, max_seq_len=length).gpt_config(vocab_size))
        for rows, length, vocab_size in sizes
    ]


def _peers(cfg: Settings, devices: int) -> dict[str, Tool]:
    """Returns the peers by name. Raises UserError if one cannot be measured."""
    if not cfg.peer:
        return {}
    if devices > 1:
        raise UserError(
            f"--peer={cfg.peer}: measured on one device, and JAX sees {devices}: set CUDA_VISIBLE_DEVICES=0"
        )
    python, tools = cfg.peer_python or sys.executable, {}
    found = measuring.probe(python, PEER_JOB)
    for peer in cfg.peer.split(","):
        needed = ("torch", "transformers") if peer == "hf" else ("torch",)
        for package in needed:
            if reason := found["missing"].get(package):
                raise UserError(
                    f"--peer={peer}: {python} has no {package} that works ({reason}): '{INSTALL}' installs it, then "
                    "use --peer_python=peers/bin/python"
                )
        version = ", ".join(f"{package} {found[package]}" for package in reversed(needed))
        if peer == "hf":
            tools["hf"] = Tool(python, PEER_JOB, {"job": "hf"}, version)
            continue
        for folder in cfg.peer_dir.split(","):
            name = f"nanochat {_recipe(folder)}"
            if name in tools:
                raise UserError(f"--peer_dir={cfg.peer_dir}: two folders with the {_recipe(folder)} recipe, give one")
            job = {"job": "nanochat", "folder": str(config.user_path(folder).absolute())}
            tools[name] = Tool(python, PEER_JOB, job, version)
    return tools


def _recipe(folder: str) -> str:
    """Returns "classic" or "modern": which recipe a checkout of the original nanochat has.

    Raises UserError if the folder is not a checkout of nanochat.
    """
    source = config.user_path(folder) / "nanochat"
    if (source / "gpt.py").is_file():
        if (source / "optim.py").is_file():
            return "modern"
        if (source / "muon.py").is_file() and (source / "adamw.py").is_file():
            return "classic"
    raise UserError(
        f"--peer_dir={folder}: no checkout of karpathy/nanochat (no nanochat/gpt.py with its optimizers): "
        "'git clone https://github.com/karpathy/nanochat' makes one"
    )


# -----------------------------------------------------------------------------
# Measuring


class Bench:
    """Runs the jobs and holds the results so far."""

    def __init__(self, cfg: Settings, device: dict, tools: dict[str, Tool], folder: Path) -> None:
        self.cfg, self.device, self.tools, self.folder = cfg, device, tools, folder
        self.runs: dict[Kind, list[dict]] = {}
        self.failed: set[Kind] = set()

    def measure(self, kind: Kind, turn: int) -> None:
        """Makes one measurement in a new process. If a peer fails, it is left out from then on.

        Raises UserError if our own step fails.
        """
        if kind in self.failed:
            return
        tool, start = self.tools[kind.tool], time.monotonic()
        job = tool.job | {
            "shape": dataclasses.asdict(kind.shape.model_cfg), "rows": kind.shape.rows, "dtype": kind.dtype,
            "device_type": self.cfg.device_type, "platform": self.device["platform"], "steps": self.cfg.steps,
            "repeats": max(3, self.cfg.steps // 2), "cache": str(self._cache(kind)), "profile": "",
        }  # fmt: skip
        if self.cfg.profile and turn == self.cfg.rounds - 1:
            place = config.user_path(self.cfg.profile).absolute() / kind.shape.folder / kind.dtype
            place.mkdir(parents=True, exist_ok=True)
            job["profile"] = str(place)
        try:
            run = measuring.run(tool.python, tool.script, job, ours=kind.tool == "ours")
        except measuring.JobFailed as error:
            if kind.tool == "ours":
                hint = f"if memory ran out, lower --device_batch_size (now {kind.shape.rows})"
                raise UserError(f"{kind} failed ({error}): {hint}") from error
            self.failed.add(kind)
            print(f"{kind}: left out, it failed ({error})", file=sys.stderr)
            return
        if "refused" in run:
            raise UserError(f"{kind}: {run['refused']}")
        self.runs.setdefault(kind, []).append(run)
        took = f"{time.monotonic() - start:.1f} s"
        print(f"round {turn + 1} of {self.cfg.rounds}: {kind}, {took}", file=sys.stderr, flush=True)

    def _cache(self, kind: Kind) -> Path:
        """Returns the folder of a combination's compilation cache, which is empty at first."""
        path = self.folder / kind.tool.replace(" ", "_") / kind.shape.folder / kind.dtype
        path.mkdir(parents=True, exist_ok=True)
        return path


def causal_flops_per_token(model_cfg: GPTConfig) -> float:
    """FLOPs per token for a forward and a backward pass, counting only the keys that a query sees, averaged over a row.

    `GPTConfig.flops_per_token`, which the training log uses, counts attention as if every query saw a whole window.
    """
    t, seen = model_cfg.sequence_len, 0.0
    for window in model_cfg.windows:
        most = min(window + 1, t) if window else t  # a query sees itself and `window` earlier tokens
        seen += (most * (most + 1) / 2 + (t - most) * most) / t
    attention = 12 * model_cfg.n_embd * sum(window or t for window in model_cfg.windows)
    return model_cfg.flops_per_token - attention + 12 * model_cfg.n_embd * seen


def _row(kind: Kind, runs: list[dict], device: dict) -> dict:
    """Returns a row of the tables. All times are in seconds."""
    shape, model_cfg = kind.shape, kind.shape.model_cfg
    tokens = shape.rows * model_cfg.sequence_len * device["devices"]
    steps = [seconds for run in runs for seconds in run["steps"]]
    step = statistics.median(statistics.median(run["steps"]) for run in runs)
    speed, peak = tokens / step, device["peak"]
    flops = {"": model_cfg.flops_per_token, "_causal": causal_flops_per_token(model_cfg)}
    parts = _parts(step, runs)
    warm = [run["first"] for run in runs[1:]]
    compiled = [run["compile"] for run in runs if "compile" in run]
    return {
        "shape": str(shape), "rows": shape.rows, "max_seq_len": model_cfg.sequence_len,
        "vocab_size": model_cfg.vocab_size, "depth": model_cfg.n_layer, "width": model_cfg.n_embd,
        "tool": kind.tool, "dtype": kind.dtype, "attention": runs[0]["attention"],
        "step_s": round(step, 6), "fastest_s": round(min(steps), 6), "slowest_s": round(max(steps), 6),
        "tokens_per_s": round(speed, 2),
        **{f"tflops{which}": round(speed * count / 1e12, 4) for which, count in flops.items()},
        **{f"mfu{which}": round(speed * count / peak, 4) if peak else None for which, count in flops.items()},
        "parts_s": {name: None if seconds is None else round(seconds, 6) for name, seconds in parts.items()},
        "shares": {name: None if seconds is None else round(seconds / step, 4) for name, seconds in parts.items()},
        "first_step_cold_s": round(runs[0]["first"], 3),
        "first_step_warm_s": round(statistics.median(warm), 3) if warm else None,
        "compile_cold_s": round(compiled[0], 3) if compiled else None,
        "compile_warm_s": round(statistics.median(compiled[1:]), 3) if compiled[1:] else None,
        "peak_mb": round(statistics.median(run["peak"] for run in runs) / 1e6, 1),
        "loss": runs[-1]["loss"],
        "runs": [[round(seconds, 6) for seconds in run["steps"]] for run in runs],
    }  # fmt: skip


def _parts(step: float, runs: list[dict]) -> dict[str, float | None]:
    """Splits the median seconds of a step into PARTS, whose sum is `step`.

    Most parts are differences between nested programs (see `_programs` in train_job.py): backward is what the program
    with all gradients takes longer than that with the loss; optimizer is what the whole step takes longer than that,
    without communication; host is what a step takes longer in a loop like that of training, which sends each batch and
    reads each loss, than alone. A difference may be slightly negative, because times vary.
    """
    times = {
        name: statistics.median(run["programs"][name] for run in runs)
        for name in ("forward", "loss", "gradients", "step")
        if name in runs[0]["programs"]
    }
    communication = statistics.median(run["communication"] for run in runs)
    split = "forward" in times  # PyTorch's forward pass is not timed without the loss
    return {
        "forward": times["forward" if split else "loss"],
        "loss": times["loss"] - times["forward"] if split else None,
        "backward": times["gradients"] - times["loss"],
        "optimizer": times["step"] - times["gradients"] - communication,
        "communication": communication,
        "host": step - times["step"],
    }


def _compare(rows: list[dict]) -> list[dict]:
    """Adds `ours_is` to the rows of peers: how many times faster ours is in the same dtype.

    Returns the comparisons of the fastest dtypes, one for each shape and peer.
    """
    for row in rows:
        ours = [r for r in rows if (r["shape"], r["dtype"], r["tool"]) == (row["shape"], row["dtype"], "ours")]
        row["ours_is"] = None if row["tool"] == "ours" else round(ours[0]["tokens_per_s"] / row["tokens_per_s"], 3)
    fastest = {}
    for row in sorted(rows, key=lambda row: row["tokens_per_s"]):
        fastest[row["shape"], row["tool"]] = row
    return [
        {
            "shape": shape, "tool": tool, "dtype": row["dtype"], "ours_dtype": fastest[shape, "ours"]["dtype"],
            "ours_is": round(fastest[shape, "ours"]["tokens_per_s"] / row["tokens_per_s"], 3),
        }
        for (shape, tool), row in sorted(fastest.items()) if tool != "ours"
    ]  # fmt: skip


# -----------------------------------------------------------------------------
# Showing


def _table(rows: list[dict]) -> str:
    head = "tokens/s, slowest to fastest, MFU, peak MB, first step: cold, warm, ours vs. peer"
    cells = [["shape", "dtype", "", *head.split(", ")]]
    for row in rows:
        tokens = row["tokens_per_s"] * row["step_s"]
        spread = f"{tokens / row['slowest_s']:,.0f} to {tokens / row['fastest_s']:,.0f}"
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%} ({row['mfu_causal']:.1%})"
        warm = "n/a" if row["first_step_warm_s"] is None else f"{row['first_step_warm_s']:.1f} s"
        ratio = "" if row["ours_is"] is None else f"{row['ours_is']:.2f}x"
        figures = [f"{row['tokens_per_s']:,.0f}", spread, mfu, f"{row['peak_mb']:,.0f}"]
        cells.append(
            [row["shape"], row["dtype"], row["tool"], *figures, f"{row['first_step_cold_s']:.1f} s", warm, ratio]
        )
    return measuring.table(cells, (True, True, True, *[False] * 7))


def _parts_table(rows: list[dict]) -> str:
    cells = [["shape", "dtype", "", "step", *PARTS]]
    for row in rows:
        parts = []
        for name in PARTS:
            seconds, share = row["parts_s"][name], row["shares"][name]
            parts.append("" if seconds is None else f"{seconds * 1e3:,.1f} ms {share:.0%}")
        cells.append([row["shape"], row["dtype"], row["tool"], f"{row['step_s'] * 1e3:,.1f} ms", *parts])
    return measuring.table(cells, (True, True, True, *[False] * 7))
