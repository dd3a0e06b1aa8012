"""The CORE bundle: a list of tasks, with the items and the random baseline of each task.

Used by scripts.base_eval, and by training every --core_metric_every steps.

    core.yaml             for each task: label, file, kind, number of few-shot examples, delimiter
    eval_meta_data.csv    the random baseline of each task, in percent
    eval_data/            the items, as .jsonl or .jsonl.gz

If --core_dir is given, the bundle is read from that folder. Otherwise, the bundle is downloaded once, to eval_bundle in
the base folder.
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.config import UserError, base_dir, first_line, user_path
from nanochat_jax.tasks.task_data import find, read_text

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
ATTEMPTS = 3  # a download is tried at most this many times
TIMEOUT = 15  # an attempt fails if no data arrives for this many seconds
KINDS = ("multiple_choice", "schema", "language_modeling")


@dataclass(frozen=True)
class CoreTask:
    """One task of CORE. `baseline` is the accuracy of random guessing, from 0 to 1."""

    label: str
    kind: str
    path: Path
    num_fewshot: int
    delimiter: str
    baseline: float

    def items(self) -> list[dict]:
        """Returns all items, in the order of the file. Raises UserError with the line number if a line is invalid."""
        items = []
        for number, line in enumerate(read_text(self.path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                _check_item(item, self.kind)
            except KeyError as error:
                raise self._not_an_item(number, f"no {error}") from None
            except (ValueError, TypeError) as error:
                raise self._not_an_item(number, str(error)) from None
            items.append(item)
        if not items:
            raise UserError(f"{self.path}: empty")
        return items

    def _not_an_item(self, number: int, why: str) -> UserError:
        return UserError(f"{self.path}, line {number}: not an item of kind {self.kind} ({why})")


def _check_item(item: dict, kind: str) -> None:
    """Raises KeyError, ValueError or TypeError if a field is missing or invalid.

    A label below 0 is refused. Python would take it for a position counted from the end, and no answer would be right.
    """
    if not isinstance(item, dict):
        raise TypeError(f"expected an object, got {item!r:.40}")
    if kind == "language_modeling":
        texts = {name: item[name] for name in ("context", "continuation")}
    else:
        many, one = ("choices", "query") if kind == "multiple_choice" else ("context_options", "continuation")
        options, gold, texts = item[many], item["gold"], {one: item[one]}
        if not isinstance(options, list) or not options:
            raise TypeError(f"{many} is {options!r:.40}, expected a list of texts")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
            hidden = ", which hides the right answer" if gold == -1 else ""
            raise ValueError(f"gold is {gold!r:.40}{hidden}, expected 0 to {len(options) - 1}")
        texts |= {f"{many}[{i}]": text for i, text in enumerate(options)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} is {text!r:.40}, expected text")
    if kind == "language_modeling" and not item["continuation"].strip():
        raise ValueError("continuation is empty, so nothing could be scored")


def find_bundle(core_dir: str | Path = "") -> Path:
    """Returns the bundle's folder, and downloads the bundle if necessary. Raises UserError if a file is missing."""
    if core_dir:
        folder = user_path(core_dir)
        if not (folder / "core.yaml").is_file():
            raise UserError(f"--core_dir={core_dir}: no core.yaml in it; expected the unpacked {URL}")
    else:
        folder = base_dir() / "eval_bundle"
        if not folder.is_dir():
            _download(folder)
    read_tasks(folder)
    return folder


def read_tasks(folder: Path) -> list[CoreTask]:
    """Returns the tasks of the bundle in `folder`, in the order of core.yaml. Raises UserError if a file is missing."""
    import yaml

    baselines = _baselines(folder / "eval_meta_data.csv")
    try:
        entries = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        tasks = [_task(folder, entry, baselines) for entry in entries]
    except OSError as error:
        raise UserError(f"{folder}: incomplete CORE bundle ({error}); expected the unpacked {URL}") from None
    except (yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder / 'core.yaml'}: not the task list of CORE ({error!r})") from None
    if not tasks:
        raise UserError(f"{folder / 'core.yaml'}: no tasks")
    return tasks


def _task(folder: Path, entry: dict, baselines: dict[str, float]) -> CoreTask:
    label, kind = entry["label"], entry["icl_task_type"]
    if kind not in KINDS:
        raise UserError(f"{folder / 'core.yaml'}: {label} is of kind {kind!r}, expected one of {', '.join(KINDS)}")
    if label not in baselines:
        raise UserError(f"{folder / 'eval_meta_data.csv'}: no random baseline for {label}")
    plain = folder / "eval_data" / entry["dataset_uri"]
    path = find(plain)
    if path is None:
        raise FileNotFoundError(f"no {plain.relative_to(folder)}[.gz]")
    delimiter = entry.get("continuation_delimiter", " ")
    return CoreTask(label, kind, path, int(entry["num_fewshot"][0]), delimiter, baselines[label])


def _baselines(path: Path) -> dict[str, float]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: expected the unpacked {URL}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a table with columns 'Eval Task' and 'Random baseline' ({error!r})") from None


# -----------------------------------------------------------------------------
# Download


def _download(folder: Path) -> None:
    """Downloads and unpacks the bundle. `folder` is created only when the bundle is complete."""
    part = folder.with_name(f"eval_bundle.{os.getpid()}.part")
    unpacked = folder.with_name(f"eval_bundle.{os.getpid()}.unpacked")
    pin = folder.with_name("eval_bundle.sha256")
    try:
        digest = _fetch(part, folder)
        # The hash of the first valid download is stored. Later downloads must have the same hash.
        pinned = pin.read_text(encoding="utf-8").strip() if pin.exists() else digest
        if pinned != digest:
            raise UserError(f"{URL} has changed: SHA-256 was {pinned}, is now {digest}; delete {pin} to accept it")
        with zipfile.ZipFile(part) as archive:
            archive.extractall(unpacked)
        inside = next(unpacked.rglob("core.yaml"), None)
        if inside is None:
            raise UserError(f"{URL}: no core.yaml in the archive")
        pin.write_text(digest + "\n", encoding="utf-8")
        with contextlib.suppress(OSError):  # another process may have created `folder` first
            os.replace(inside.parent, folder)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{URL}: cannot be unpacked to {folder} ({error})") from None
    finally:
        part.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)


def _fetch(part: Path, folder: Path) -> str:
    """Downloads the archive to `part` and returns the archive's SHA-256."""
    from urllib.request import urlopen

    from nanochat_jax.progress import Progress

    for attempt in range(1, ATTEMPTS + 1):
        digest = hashlib.sha256()
        try:
            with urlopen(URL, timeout=TIMEOUT) as response, open(part, "wb") as file:
                size = int(response.headers.get("Content-Length") or 0)
                with Progress("CORE bundle, MB", size >> 20) as progress:
                    while block := response.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        progress.advance()
            if size and part.stat().st_size != size:
                raise OSError(f"got {part.stat().st_size:,} of {size:,} bytes")
            return digest.hexdigest()
        except OSError as error:  # urllib's errors are subclasses of OSError
            reason = first_line(error)
        if attempt < ATTEMPTS:
            time.sleep(attempt)
    raise UserError(f"no CORE bundle: cannot download {URL} ({reason}); unzip it to {folder}, or use --core_dir")
