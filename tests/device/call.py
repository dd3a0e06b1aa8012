"""What the scripts of this folder share: running commands, and keeping what was found.

Each script runs on a machine with one GPU for at most ten minutes. It writes what it found to $OUT/NAME.json (default:
the current folder), also if a command fails. With --dry, it runs small sizes on the CPU, so that no time on a rented
machine is wasted on a typo:

    python tests/device/facts.py --dry
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))


class Call:
    """One run of a script. `found` holds the findings; every change is written to the file at once."""

    def __init__(self, name: str, about: str | None):
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--dry", action="store_true", help="small sizes on the CPU")
        self.dry: bool = parser.parse_args().dry
        self.out = Path(os.environ.get("OUT") or ".").resolve()
        self.path = self.out / f"{name}.json"
        self.found: dict[str, Any] = {"dry": self.dry, "commands": []}
        self.base = Path(tempfile.mkdtemp(prefix="nanochat-device-"))
        self.env = os.environ | {"NANOCHAT_BASE_DIR": str(self.base), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if self.dry:
            self.env |= {"JAX_PLATFORMS": "cpu"}
        self.failed = False

    def note(self, **found: Any) -> None:
        """Adds findings."""
        self.found |= found
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def python(self, *arguments: str, seconds: float = 300, may_fail: bool = False) -> str:
        """Runs `python ARGUMENTS...` in the repository, prints its output, and returns it."""
        print(f"\n$ python {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        with subprocess.Popen(
            [sys.executable, *arguments], cwd=REPOSITORY, env=self.env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        print(output[-4000:], flush=True)
        took = round(time.monotonic() - start, 1)
        self.found["commands"].append(
            {"command": list(arguments), "status": process.returncode, "seconds": took, "end": output[-2000:]}
        )
        self.failed = self.failed or (process.returncode != 0 and not may_fail)
        self.note()
        return output

    def tokenizer(self) -> None:
        """Trains a tokenizer on the documentation of the installed Python. Nothing is downloaded."""
        size = ["--vocab_size=512", "--max_chars=300000"] if self.dry else ["--vocab_size=65536"]
        self.python("-m", "scripts.tok_train", "--data=local", *size)

    def shape(self) -> list[str]:
        """The flags of a base run: d20 with 65,536 tokens a step, or a tiny model."""
        if self.dry:
            return [
                "--depth=2",
                "--max_seq_len=128",
                "--total_batch_size=512",
                "--eval_tokens=512",
                "--max_epochs=1000",
            ]
        return ["--depth=20", "--total_batch_size=65536", "--eval_tokens=65536", "--max_epochs=1000"]

    def base_run(self, tag: str, *flags: str, seconds: float = 300) -> list[dict]:
        """Trains a base run without evaluations of CORE, and returns the records of its log."""
        command = ["-m", "scripts.train", "--stage=base", f"--model_tag={tag}", *self.shape()]
        self.python(*command, "--core_metric_every=-1", "--sample_every=-1", *flags, seconds=seconds)
        return self.log("base", tag)

    def log(self, stage: str, tag: str) -> list[dict]:
        """The records of a run. Where it was resumed, those of the first try are left out."""
        from nanochat_jax import run_log

        return run_log.read(self.base / f"{stage}_checkpoints" / tag)

    def end(self) -> None:
        """Exits with 0 if all commands succeeded, else with 1."""
        self.note(ok=not self.failed)
        print(f"\nfound: {self.path}", flush=True)
        sys.exit(int(self.failed))


def train_records(records: Sequence[dict]) -> list[dict]:
    """The records of the training steps: step, loss, milliseconds, MFU and the like."""
    return [record for record in records if record["kind"] == "train"]
