"""Reads the rows of tasks from a local folder or, if no folder is given, from the Hugging Face hub.

Local files hold JSON lines, plain or gzipped. From the hub, we read parquet exports, because their paths follow one
pattern in all data sets. Downloaded files are kept in the folder task_data in the base folder. A JSON file next to them
records their revision. Once a split is complete, it is never downloaded again.

All rows are shuffled by numpy's permutation with seed 42. The original nanochat calls datasets.shuffle(seed=42), which
gives the same order.
"""

import gzip
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from nanochat_jax.config import UserError, base_dir, first_line
from nanochat_jax.files import print_once, read_json, write_text
from nanochat_jax.tasks import messages
from nanochat_jax.tasks.messages import BadRow, EmptyMessage
from nanochat_jax.tasks.task import Task

REVISION = "refs/convert/parquet"  # the branch of a data set that holds its parquet export
TIMEOUT = 10  # seconds to wait for a response from the hub
# The files that tasks read from folders, without .jsonl or .jsonl.gz. A task may leave some of them out.
STEMS = {
    "train", "test", "train_socratic", "test_socratic", "validation", "dev", "auxiliary_train", "openbook_qa_train",
    "commonsense_qa_train", "HumanEval",
}  # fmt: skip
ATTEMPTS = 2  # maximum number of attempts to get a response from the hub
BAD_ROW = (BadRow, KeyError, TypeError, IndexError, AttributeError)  # errors that a malformed row can cause

Result = TypeVar("Result")


class Rows(Protocol):
    """A sequence of stored rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]:
        """Yields all rows in order. This is faster than asking for one row at a time."""
        ...

    def where(self, index: int) -> str:
        """Returns the place of a row, such as "train.jsonl:17"."""
        ...


class RowTask(Task):
    """A task that converts stored rows to conversations. Subclasses set `rows` and implement `conversation`.

    skips_empty: whether conversations with an empty message are skipped. Otherwise, they are refused.
    """

    rows: "Shuffled"
    skips_empty: bool = False

    @staticmethod
    def conversation(row: Any) -> dict:
        """Turns a row into a conversation. Raises BadRow, KeyError, TypeError or IndexError if the row is malformed."""
        raise NotImplementedError

    def read(self, row: Any) -> tuple[dict, bool]:
        """Returns the conversation in a row, and whether a last question without an answer was left out of it."""
        return self.conversation(row), False

    def check(self) -> None:
        """Converts every row that `suspects` yields, because an error found during training could waste hours.

        Raises UserError with the place of the first malformed row. If `skips_empty` is set, skips conversations with an
        empty message, and prints how many there are.
        """
        empty: dict[int, EmptyMessage] = {}
        shortened: list[int] = []
        for index, row in self.suspects():
            if index in self.rows.dropped:
                continue
            try:
                _, is_shortened = self.read(row)
                if is_shortened:
                    shortened.append(index)
            except EmptyMessage as error:
                if not self.skips_empty:
                    raise self._refusal(self.rows.stored.where(index), error) from None
                empty[index] = error
            except BAD_ROW as error:
                raise self._refusal(self.rows.stored.where(index), error) from None
        if shortened:
            where = self.rows.stored.where(shortened[0])
            print(f"{self.name}: {messages.describe_shortened(len(shortened), where)}")
        if not empty:
            return
        index, error = next(iter(empty.items()))
        example = f"{self.rows.stored.where(index)} ({error})"
        of = f"{len(empty):,} of {len(self.rows):,} conversations"
        print(f"{self.name}: skipped {of} because of an empty message, the first is {example}")
        self.rows.drop(empty)
        if not len(self.rows):
            raise UserError(f"{self.name}: every conversation has an empty message, the first is {example}")

    def suspects(self) -> Iterable[tuple[int, Any]]:
        """Yields (index, row) for each stored row that `check` must convert. A subclass may leave out some rows."""
        return enumerate(self.rows.stored)

    def _refusal(self, where: str, error: Exception) -> UserError:
        reason = str(error) if isinstance(error, BadRow) else f"does not have the fields of this task ({error!r})"
        return UserError(f"{self.name}: {where}: {reason}")

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> dict:
        try:
            return self.conversation(self.rows[index])
        except BAD_ROW as error:
            raise self._refusal(self.rows.where(index), error) from None


class JsonRows:
    """The rows of files with JSON lines. A row is decoded only when it is accessed."""

    def __init__(self, paths: Sequence[Path]):
        self.lines = [
            (line, path, number)
            for path in paths
            for number, line in enumerate(read_text(path).split("\n"), start=1)
            if line.strip()
        ]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        try:
            return json.loads(self.lines[index][0])
        except json.JSONDecodeError as error:
            raise UserError(f"{self.where(index)}: not JSON: {error}") from None

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def where(self, index: int) -> str:
        _, path, number = self.lines[index]
        return f"{path}:{number}"


class ParquetRows:
    """The rows of parquet files. A row is decoded only when it is accessed.

    As Python objects, half a million conversations would take 10 GB.
    """

    def __init__(self, paths: Sequence[Path], how_to_fix: str):
        """Reads the files. If one of them cannot be read, raises UserError. Its message names the file, and ends with
        `how_to_fix`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for path in paths:
            try:
                tables.append(pq.read_table(path))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path}: cannot be read ({first_line(error)}): {how_to_fix}") from None
        try:
            self.table = pa.concat_tables(tables)
        except pa.ArrowException as error:
            raise UserError(f"{', '.join(map(str, paths))}: do not fit together ({first_line(error)})") from None
        self.paths, self.starts = list(paths), np.cumsum([0] + [table.num_rows for table in tables])

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self.table.slice(index, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def where(self, index: int) -> str:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.paths[file]}, row {index - int(self.starts[file])}"


class Shuffled:
    """Stored rows in random order: numpy's permutation with `seed`."""

    def __init__(self, stored: Rows, seed: int = 42):
        self.stored = stored
        self.order = np.random.default_rng(seed).permutation(len(stored))
        self.dropped: set[int] = set()  # indices into `stored`

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.stored[int(self.order[index])]

    def where(self, index: int) -> str:
        """Returns the place of a row, such as "train.jsonl:17"."""
        return self.stored.where(int(self.order[index]))

    def drop(self, indices: Collection[int]) -> None:
        """Leaves out the stored rows with these indices. The order of the other rows stays the same."""
        self.dropped.update(indices)
        self.order = self.order[~np.isin(self.order, list(indices))]


def local(data_dir: str | Path, *stems: str) -> Shuffled:
    """Returns the shuffled rows of the files <stem>.jsonl or <stem>.jsonl.gz in `data_dir`.

    If some of them are missing, prints which ones are read. Also prints which other files in their folders no task
    reads.

    Raises UserError if all files are missing or empty.
    """
    paths = [path for stem in stems if (path := find(Path(data_dir) / f"{stem}.jsonl"))]
    if not paths:
        raise UserError(f"--task_data_dir={data_dir}: needs {' or '.join(stem + '.jsonl[.gz]' for stem in stems)}")
    if len(paths) < len(stems):
        print(
            f"reading only {', '.join(map(str, paths))}, since {data_dir} has not all of {', '.join(stems)}", flush=True
        )
    for folder in sorted({path.parent for path in paths}):
        if unread := sorted(path.name for path in folder.iterdir() if path.is_file() and _is_data(path)):
            print_once(f"not read in {folder}: {', '.join(unread)} (the task reads {_names_beside(stems, folder)})")
    return of_files(paths)


def _is_data(path: Path) -> bool:
    """Whether a file may hold data that no task reads. Hidden files and descriptions are no data."""
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return stem not in STEMS and not path.name.startswith(".") and path.suffix.lower() not in (".md", ".txt", "")


def _names_beside(stems: Sequence[str], folder: Path) -> str:
    """Lists the files among `stems` that lie in `folder`: "train.jsonl[.gz]"."""
    return ", ".join(f"{Path(stem).name}.jsonl[.gz]" for stem in stems if Path(stem).parent.name == folder.name)


def of_files(paths: Sequence[Path]) -> Shuffled:
    """Returns the shuffled rows of these files. Raises UserError if all of them are empty."""
    return Shuffled(_not_empty(JsonRows(paths), paths))


def hub(repo: str, subset: str, split: str) -> Shuffled:
    """Returns the shuffled rows of one split of a data set on the hub. The split is downloaded on first use.

    Raises UserError if the download fails.
    """
    folder = base_dir() / "task_data" / repo.replace("/", "--")
    marker = folder / f"{subset}-{split}.json"  # written last, so if it exists, the download is complete
    if not marker.is_file():
        _download(repo, subset, split, folder, marker)
    again = f"delete it and {marker}, and it is downloaded again"
    names = read_json(marker).get("files")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{marker} is damaged: delete it, and the data are downloaded again")
    paths = [folder / name for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]} is missing: delete {marker}, and it is downloaded again")
    return Shuffled(_not_empty(ParquetRows(paths, again), paths))


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
            f"cannot download {repo} from the Hugging Face hub ({reason}); give a folder with --task_data_dir, "
            "or use the generated tasks of --config=cpu"
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
    """Returns the text of a UTF-8 file, without a byte order mark. A file whose name ends in .gz is decompressed.

    Raises UserError if the file cannot be read.
    """
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
