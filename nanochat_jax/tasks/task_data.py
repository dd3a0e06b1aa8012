"""Reads the rows of tasks from a local folder or, if no folder is given, from the Hugging Face hub.

Local files hold JSON lines, plain or gzipped. From the hub, we read parquet exports, because their paths follow one
pattern in all data sets. Downloaded files are kept in the folder task_data in the base folder. A JSON file next to them
records their revision. Once a split is complete, it is never downloaded again.

All rows are shuffled by numpy's permutation with seed 42. This is the order of datasets.shuffle(seed=42) in the
specification.
"""

import gzip
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from nanochat_jax.config import UserError, base_dir, first_line
from nanochat_jax.files import write_text
from nanochat_jax.tasks.task import Task

REVISION = "refs/convert/parquet"  # the branch of a data set that holds its parquet export
TIMEOUT = 10  # seconds to wait for a response from the hub
ATTEMPTS = 2  # maximum number of attempts to get a response from the hub

Result = TypeVar("Result")


class Rows(Protocol):
    """A sequence of stored rows. An index that is too large must raise IndexError, so that a `for` loop ends."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class RowTask(Task):
    """A task that converts stored rows to conversations. Subclasses set `rows` and implement `conversation`."""

    rows: Rows

    @staticmethod
    def conversation(row: Any) -> dict:
        """Turns a row into a conversation.

        Raises UserError, KeyError, TypeError or IndexError if the row lacks a field.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> dict:
        try:
            return self.conversation(self.rows[index])
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.name}: row {index} does not have the fields of this task ({error!r})") from None


class JsonRows:
    """The rows of files with JSON lines. A row is decoded only when it is accessed."""

    def __init__(self, paths: Sequence[Path]):
        self.lines = [line for path in paths for line in read_text(path).split("\n") if line.strip()]
        self.origin = ", ".join(str(path) for path in paths)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        try:
            return json.loads(self.lines[index])
        except json.JSONDecodeError as error:
            raise UserError(f"{self.origin}: non-empty line {index + 1} is not JSON: {error}") from None


class ParquetRows:
    """The rows of parquet files. A row is decoded only when it is accessed.

    As Python objects, half a million conversations would take 10 GB.
    """

    def __init__(self, paths: Sequence[Path]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self.table = pa.concat_tables([pq.read_table(path) for path in paths])
        except (pa.ArrowInvalid, OSError) as error:
            names = ", ".join(map(str, paths))
            raise UserError(f"{names}: cannot be read; delete it to download it again ({first_line(error)})") from None

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self.table.slice(index, 1).to_pylist()[0]


class Shuffled:
    """Rows in random order: numpy's permutation with `seed`."""

    def __init__(self, rows: Rows, seed: int = 42):
        self.rows = rows
        self.order = np.random.default_rng(seed).permutation(len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[int(self.order[index])]


def local(data_dir: str | Path, *stems: str) -> Shuffled:
    """Returns the shuffled rows of the files <stem>.jsonl or <stem>.jsonl.gz in `data_dir`. Missing files are skipped.

    Raises UserError if all files are missing or empty.
    """
    paths = [path for stem in stems if (path := find(Path(data_dir) / f"{stem}.jsonl"))]
    if not paths:
        raise UserError(f"--task_data_dir={data_dir}: needs {' or '.join(stem + '.jsonl[.gz]' for stem in stems)}")
    return Shuffled(_not_empty(JsonRows(paths), paths))


def hub(repo: str, subset: str, split: str) -> Shuffled:
    """Returns the shuffled rows of one split of a data set on the hub. The split is downloaded on first use.

    Raises UserError if the download fails.
    """
    folder = base_dir() / "task_data" / repo.replace("/", "--")
    marker = folder / f"{subset}-{split}.json"  # written last, so if it exists, the download is complete
    if not marker.is_file():
        _download(repo, subset, split, folder, marker)
    paths = [folder / name for name in json.loads(marker.read_text(encoding="utf-8"))["files"]]
    return Shuffled(_not_empty(ParquetRows(paths), paths))


def _download(repo: str, subset: str, split: str, folder: Path, marker: Path) -> None:
    import huggingface_hub

    try:
        info = _retry(lambda: huggingface_hub.HfApi().dataset_info(repo, revision=REVISION, timeout=TIMEOUT))
        names = sorted(s.rfilename for s in info.siblings or () if s.rfilename.startswith(f"{subset}/{split}/"))
        if names:
            print(f"downloading {repo} ({subset}, {split}) to {folder}", flush=True)
        for name in names:
            huggingface_hub.hf_hub_download(
                repo, name, repo_type="dataset", revision=info.sha, local_dir=folder, etag_timeout=TIMEOUT
            )
    except Exception as error:  # the hub's errors have no narrower common class
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"cannot download {repo} from the Hugging Face hub ({reason}); give a folder with --task_data_dir"
        ) from None
    if not names:
        raise UserError(f"{repo} on the Hugging Face hub has no {subset}/{split}; give a folder with --task_data_dir")
    write_text(marker, json.dumps({"repo": repo, "revision": info.sha, "files": names}) + "\n")


def _retry(request: Callable[[], Result]) -> Result:
    """Returns the result of `request`. Makes up to ATTEMPTS requests if the hub does not respond."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for wait in range(1, ATTEMPTS):
        try:
            return request()
        except (HfHubHTTPError, OfflineModeIsEnabled):  # the hub refused, or offline mode is set: do not try again
            raise
        except Exception:  # no connection to the hub, or no response in time
            time.sleep(wait)
    return request()


def _not_empty(rows: Rows, paths: Sequence[Path]) -> Rows:
    if not len(rows):
        raise UserError(f"{', '.join(map(str, paths))}: empty")
    return rows


def find(path: Path) -> Path | None:
    """Returns `path` or, if only the gzipped file exists, `path`.gz. Returns None if neither exists."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file. A file whose name ends in .gz is decompressed.

    Raises UserError if the file cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
