"""Downloads shards of pretraining text from the Hugging Face hub. In: a source's name. Out: verified parquet files.

Shards are downloaded in parallel, and an interrupted download is resumed. The data of tasks is downloaded elsewhere, in
tasks/task_data.py.

    <base>/data/<source>/shard_00000.parquet          a complete and verified shard
    <base>/data/<source>/shard_00000.parquet.sha256   the shard's SHA-256, in the format of `sha256sum -c`
    <base>/data/<source>/shard_00000.parquet.*.part   a partial download; the * stands for the shard's version
    <base>/data/<source>/manifest.json                the largest number of training shards requested so far

The huggingface_hub library handles addresses, access tokens, mirrors and offline mode (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE). The transfer is our own code (transfer.py), for three reasons. Version 2.4 of the library discards the
partial file of an interrupted download. It compares sizes but not hashes. It takes 23 s to notice that a server does
not answer.

A shard must have the SHA-256 that the hub reports. A mirror may report none. In that case, a shard that is downloaded
again must have the same SHA-256 as the first time.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

from nanochat_jax import config
from nanochat_jax.config import UserError, first_line
from nanochat_jax.data.transfer import Job, accept, complete, fetch, hash_file, seconds_from
from nanochat_jax.files import exclusive, read_json, sha256, write_text
from nanochat_jax.progress import Progress, count_of

# source -> (its repository on the hub, the index of its last shard). The last shard is always the validation set, even
# if only some of the other shards are downloaded.
SOURCES = {
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
}
SHARD = re.compile(r"shard_\d{5}\.parquet")  # the names that `shard_name` returns


def shard_name(index: int) -> str:
    """7 -> "shard_00007.parquet"."""
    return f"shard_{index:05d}.parquet"


def folder_of(source: str) -> Path:
    """Returns the folder that holds the shards of a source."""
    return config.base_dir() / "data" / source


def has_begun(source: str) -> bool:
    """Returns whether a download of the source has begun, or whether shards were copied here by hand."""
    names = ("manifest.json", "shard_*.parquet", "shard_*.parquet.*.part")
    return any(path for name in names for path in folder_of(source).glob(name))


def state(source: str, num_files: int = -1) -> str:
    """Says how much of a source is here, such as "fineweb-edu, 240 training shards requested, 12 of them here".

    `num_files` is as in `shards_of`.
    """
    folder, last = folder_of(source), shard_name(SOURCES[source][1])
    here = [path.name for path in folder.glob("shard_*.parquet") if path.name != last]
    if num_files > 0:
        here = [name for name in here if name < shard_name(num_files)]
        return f"{source}, the first {num_files} training shards, {len(here)} of them here"
    requested = _requested(source)
    if requested is None:
        return f"{source}, {len(here)} training shards here"
    return f"{source}, {requested} training shards requested, {len(here)} of them here"


def shards_of(source: str, num_files: int = -1) -> tuple[list[Path], Path]:
    """Returns the paths of the training shards and the path of the validation shard.

    The training shards are the first `num_files` shards. With num_files=-1, they are the shards that `download` was
    asked for. Shards that are still downloading are included, so that the list is the same during and after the
    download.

    Raises UserError if `num_files` is out of range, if the validation shard is missing, or if there are no training
    shards.
    """
    folder, last = folder_of(source), shard_name(SOURCES[source][1])
    if num_files == 0 or not -1 <= num_files <= SOURCES[source][1]:
        raise UserError(f"--num_files={num_files}: expected 1 to {SOURCES[source][1]} shards of {source} (-1: all)")
    command = f"python -m nanochat_jax.dataset --data {source} -n 8"
    if not (folder / last).exists():
        raise UserError(f"{source}: no validation shard {folder / last}; run {command}")
    if num_files > 0:
        train = [folder / shard_name(i) for i in range(num_files)]
    elif (count := _requested(source)) is None:  # no manifest: the shards were copied here by hand
        train = [p for p in sorted(folder.glob("shard_*.parquet")) if p.name != last]
    else:
        train = [folder / shard_name(i) for i in range(count)]
    if not train:
        raise UserError(f"{source}: no training shards in {folder}; run {command}")
    return train, folder / last


def _requested(source: str) -> int | None:
    """Returns the number of training shards that the manifest records. Returns None if there is no manifest, because
    the shards were copied by hand. Raises UserError if the manifest is damaged."""
    path = folder_of(source) / "manifest.json"
    count = read_json(path).get("shards")
    if isinstance(count, int) and 1 <= count <= SOURCES[source][1]:
        return count
    if not path.exists():
        return None
    # The shards that are here do not tell how many were requested: others may still be downloading.
    raise UserError(
        f"{path} is damaged, so the number of requested shards is not known: run python -m nanochat_jax.dataset "
        f"--data {source} -n N with the same N as before"
    )


def download(source: str, num_files: int = -1, workers: int = 4, verify: bool = False, *, begin: bool = False) -> None:
    """Fetches the validation shard and the first `num_files` training shards (-1: all) into the data folder. Raises
    UserError if any shard is still missing at the end.

    Partial downloads are resumed. Existing shards are kept, but damaged shards are downloaded again. Only shards that
    have changed since their last check are checked for damage. With `verify`, all existing shards are checked.

    With `begin`, records that `num_files` training shards are wanted, but fetches only the first of them. Pretraining
    can then start, because it knows which shards to wait for. Another call must fetch the rest.
    """
    if source not in SOURCES:
        raise UserError(f"--data={source}: unknown source, expected {' or '.join(SOURCES)}")
    repo, last = SOURCES[source]
    if num_files > last or num_files == 0 or num_files < -1 or workers < 1:
        raise UserError(f"-n {num_files} -w {workers}: expected 1 to {last} shards (-1: all) and at least one worker")
    count = last if num_files == -1 else num_files
    names = [shard_name(i) for i in range(count)]
    folder = folder_of(source)
    # Two downloads into one folder would write the same partial files.
    with exclusive(folder, f"another download into {folder} is running: wait for it, or end it"):
        job = Job(repo, folder)
        existing = [name for name in [shard_name(last), *names] if (folder / name).exists()]
        with job.threads(workers) as pool, Progress("verifying, files", len(existing)) as progress:
            for _ in pool.map(lambda name: _verify(job, name, verify), existing):
                job.touch_lock()
                progress.advance()
        # Every run needs the validation shard, so it is fetched first. It is fetched alone, so that an unreachable hub
        # causes one failure instead of many.
        if failures := _fetch_all(job, [shard_name(last)], f"{source}, validation shard, MB", 1):
            raise UserError(f"{repo}: {failures[0]} (without the hub: --data=local, or --data_dir=FOLDER)")
        if problem := no_room(folder, source, names):
            raise UserError(problem)
        # The manifest records the largest number of training shards ever requested.
        try:
            requested = max(count, _requested(source) or 0)
        except UserError:
            print(f"{folder / 'manifest.json'} is damaged: writing it again, with {count} training shards", flush=True)
            requested = count
        write_text(folder / "manifest.json", json.dumps({"source": source, "repo": repo, "shards": requested}) + "\n")
        if begin:
            names = names[:1]
        if failures := _fetch_all(job, names, f"{source}, MB", workers):
            missing = sum(not (folder / name).exists() for name in names)
            message = f"{missing} of {len(names)} shards missing; first failure: {failures[0]}"
            raise UserError(f"{message}; run the command again to resume")


def no_room(folder: Path, source: str, names: Sequence[str], size: int = 0) -> str:
    """Says in one line that the disk of `folder` has too little space for the missing shards among `names`.

    Returns "" if the space suffices. `size` is the size of a shard in bytes (0: the size of the validation shard here).
    Shards have similar sizes, so this is an estimate; partial downloads count as present.
    """
    size = size or (folder / shard_name(SOURCES[source][1])).stat().st_size
    missing = [name for name in names if not (folder / name).exists()]
    parts = sum(path.stat().st_size for name in missing for path in folder.glob(f"{name}.*.part"))
    needed, free = len(missing) * size - parts, shutil.disk_usage(_existing(folder)).free
    if needed <= free:
        return ""
    return (
        f"{source}: {count_of(len(missing), 'shard')} of {size / 1e6:,.0f} MB need {needed / 1e9:,.1f} GB, but only "
        f"{free / 1e9:,.1f} GB are free in {folder}: free some space, choose another disk with NANOCHAT_BASE_DIR, or "
        "download fewer shards (-n)"
    )


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


# -----------------------------------------------------------------------------
# Waiting for a shard that another process is downloading


def wait_for_shard(path: Path, stop: threading.Event | None = None, patience: float = 120.0) -> None:
    """Waits until the shard at `path` exists, so that training can start during the download.

    Raises UserError if no file in the shard's folder changes for `patience` seconds, or if a missing file is not a
    shard of the hub, because nothing downloads such a file. Raises InterruptedError if `stop` is set.
    """
    stop = stop or threading.Event()
    if not path.exists():
        if not SHARD.fullmatch(path.name):
            raise UserError(f"{path}: this file is gone: put it back and run the same command again")
        print(f"waiting for {path} to arrive", file=sys.stderr, flush=True)
    while not path.exists():
        if time.time() - _last_change(path.parent) > patience:
            raise UserError(f"{path}: missing, and no download is running; run python -m nanochat_jax.dataset again")
        if stop.wait(0.5):
            raise InterruptedError(f"stopped waiting for {path}")


def _last_change(folder: Path) -> float:
    """Returns the Unix time of the last change to any file in the folder. A running download regularly touches its lock
    file, even while no data arrives."""
    times = [0.0]
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # a temporary file may just have been renamed
                times.append(entry.stat().st_mtime)
    return max(times)


# -----------------------------------------------------------------------------
# A download


def _fetch_all(job: Job, names: list[str], label: str, workers: int) -> list[str]:
    """Fetches the missing shards among `names` in parallel. Returns one line per failed shard.

    Gives up after 2 * `workers` failures.
    """
    missing = [name for name in names if not (job.folder / name).exists()]
    job.received, job.expected = dict.fromkeys(missing, 0), {}
    failures = []
    with job.threads(workers) as pool, Progress(label, None) as progress:
        pending = {pool.submit(fetch, job, name, _transfer) for name in missing}
        while pending and len(failures) < 2 * workers:  # so many failures suggest a common cause
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            job.touch_lock()
            failures += [failure for future in done if (failure := future.result())]
            arrived = len(missing) - len(pending) - len(failures)
            sizes, received = list(job.expected.values()), sum(list(job.received.values()))
            # Shards have similar sizes, so each shard of unknown size is assumed to have the average size.
            progress.total = int(sum(sizes) / max(1, len(sizes)) * (len(missing) - len(failures)) / 1e6) or None
            speed = received / 1e6 / max(progress.seconds, 1e-9)
            progress.reach(int(received / 1e6), f"{arrived}/{len(missing)} files, {speed:.1f} MB/s")
    return failures


# -----------------------------------------------------------------------------
# One shard


def _transfer(job: Job, name: str) -> None:
    """Tries once to fetch a shard. Asks the hub for the shard's size and hash, downloads the missing bytes, and
    verifies the file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    # huggingface_hub reads HF_ENDPOINT only once, at import. Read it again here, in case it has changed.
    url = hf_hub_url(job.origin, name, repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT") or None)
    about = get_hf_file_metadata(url, timeout=seconds_from("HF_HUB_ETAG_TIMEOUT", 5.0))
    path = job.folder / name
    digest, recorded = _as_sha256(about.etag), _recorded_hash(path)
    if digest and recorded and digest != recorded:
        print(f"{name}: the hub now has another version, SHA-256 {digest} instead of {recorded}", flush=True)
    version = hashlib.sha256((about.etag or "").encode()).hexdigest()[:16]
    part = path.with_name(f"{name}.{version}.part")
    for other in path.parent.glob(f"{name}.*.part"):
        if other != part and re.fullmatch(r"[0-9a-f]{16}", other.name[len(name) + 1 : -len(".part")]):
            other.unlink()
    complete(job, name, url, part, about.size, build_hf_headers())
    expected = digest or (f"{recorded} as first recorded ({hash_file(path).name})" if recorded else "")
    accept(part, path, expected, about.size, _problem)


def _verify(job: Job, name: str, always: bool) -> None:
    """Deletes a damaged shard, so that it is downloaded again.

    Unless `always` is set, skips a shard that has not changed since its hash was recorded.
    """
    path = job.folder / name
    recorded = _recorded_hash(path)
    if recorded and not always and path.stat().st_mtime <= hash_file(path).stat().st_mtime:
        return
    digest = sha256(path)
    problem = _problem(path)  # the only check for a file without a recorded hash, such as one copied by hand
    if recorded and digest != recorded:
        problem = f"SHA-256 {digest}, expected {recorded}"
    if problem:
        print(f"{path} is damaged ({problem}): fetching it again", flush=True)
        path.unlink()
    else:
        write_text(hash_file(path), f"{digest}  {name}\n")


def _problem(path: Path) -> str:
    """Returns "" if the file can be read as parquet, or else the reason in one line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        return f"not a readable parquet file: {first_line(error)}"
    return ""


def _recorded_hash(path: Path) -> str:
    """Returns the recorded SHA-256 (hex) of a shard, or "" if there is none."""
    try:
        return _as_sha256(hash_file(path).read_text(encoding="utf-8").split(" ")[0])
    except (OSError, UnicodeDecodeError):
        return ""


def _as_sha256(etag: str | None) -> str:
    """Returns the ETag if it is a SHA-256, or "" if it is not. The hub sends a SHA-256 for large files."""
    return etag if etag and re.fullmatch(r"[0-9a-f]{64}", etag) else ""
