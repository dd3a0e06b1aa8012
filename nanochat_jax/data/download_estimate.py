"""Estimates a download from the Hugging Face hub before it starts. In: a source's name. Out: one line of text."""

import os
import time

from nanochat_jax.config import first_line
from nanochat_jax.data import hub
from nanochat_jax.progress import clock, count_of


def estimate(source: str, num_files: int, workers: int, seconds: float = 2.0) -> str:
    """Says how long the missing shards will take, after reading from the hub for up to `seconds`. Keeps nothing.

    Reads over one connection. A download uses `workers` connections, and together they may be faster or no faster,
    so the text gives both times.
    """
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    repo, last = hub.SOURCES[source]
    folder = hub.folder_of(source)
    names = [hub.shard_name(last), *(hub.shard_name(i) for i in range(last if num_files == -1 else num_files))]
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return f"none: all {len(names)} shards of {source} are here"
    url = hf_hub_url(repo, missing[0], repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT") or None)
    received = 0
    try:
        with get_session().stream("GET", url, headers=build_hf_headers(), timeout=5, follow_redirects=True) as response:
            hf_raise_for_status(response)
            size, start = int(response.headers["Content-Length"]), time.monotonic()
            for block in response.iter_bytes():
                received += len(block)
                if time.monotonic() - start > seconds:
                    break
        speed = received / max(time.monotonic() - start, 1e-9)
        if not speed:
            raise ConnectionError("the hub sent nothing")
    except Exception as error:  # raised by huggingface_hub, its HTTP client or our code
        return f"{count_of(len(missing), 'shard')} of {source} missing; how long is unknown: {first_line(error)}"
    total = len(missing) * size
    least, most = total / speed / workers, total / speed
    text = (
        f"{count_of(len(missing), 'shard')} of {source}, {total / 1e9:,.1f} GB: {clock(least)} to {clock(most)} "
        f"({speed / 1e6:.0f} MB/s over one connection, and the download uses {workers})"
    )
    problem = hub.no_room(folder, source, missing, size)
    return f"{text}; TOO LITTLE DISK: {problem}" if problem else text
