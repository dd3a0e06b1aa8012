"""Lets the processes of a run on several hosts find each other, exchange values, and end together.

If one process fails, the other processes must end as well. Otherwise, their next collective operation would wait for
the failed process, by default for five minutes. `fail_together` shortens this wait. If code in a `fail_together` block
raises an error, the failed process writes its index and the error into JAX's key-value store. All processes share this
store. The failed process then tries to disconnect from the other processes. This succeeds only if the other processes
disconnect as well. The failed process exits after at most PATIENCE seconds, even if it is still connected.

In every process, a thread reads the store once a second. If it finds another process's error, it waits GRACE seconds.
During this wait, the thread's own process may end by itself, because some errors occur in all processes. If the process
is still running after the wait, the thread prints which process failed and why. It then disconnects if it can, and ends
the process with exit code 2.

A killed process cannot write an error. Instead, if JAX gets no heartbeat from a process for HEARTBEAT seconds, JAX ends
the other processes with a page-long message.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np

from nanochat_jax.config import UserError, first_line

T = TypeVar("T")
HEARTBEAT = 30  # a process counts as lost after this many seconds without a heartbeat, which a thread of JAX sends
PATIENCE = 10  # a failed process waits at most this many seconds for the other processes to disconnect
GRACE = 3  # a process has this many seconds to end by itself after another process reports an error
ENDED = "nanochat_jax/ended/"  # error reports are stored under keys with this prefix


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes of a run on several hosts, if there are any.

    The processes find each other through `coordinator`, the host:port of process 0. If `coordinator` is empty, the
    processes use environment variables that Slurm or Kubernetes has set. Call this function before any code asks JAX
    for devices. Raises UserError if the arguments are inconsistent or if joining fails.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    where: dict[str, Any] = {}
    if coordinator:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator={coordinator}: must be host:port of process 0, like 10.0.0.1:1234")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator={coordinator} needs --num_processes=N and --process_id=0 to N-1, got "
                f"{num_processes} and {process_id}"
            )
        where = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    elif num_processes > 1:
        raise UserError("--num_processes needs --coordinator=host:port, the address of process 0")
    elif num_processes == 1:
        return
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        pass  # JAX reads the addresses from Slurm's environment variables
    elif "JOB_COMPLETION_INDEX" in os.environ:
        # JAX finds the addresses with the package kubernetes, but installing JAX does not install this package.
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this pod belongs to an indexed Kubernetes job, and finding its other pods needs the package "
                "kubernetes: pip install '.[k8s]', or give --coordinator, or --num_processes=1 if there are no others"
            )
    else:
        return
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        hint = "" if where else ": try --coordinator=host:port --num_processes=N --process_id=I"
        raise UserError(f"could not join the other processes: {first_line(error)}{hint}") from None


def broadcast_from_0(decide: Callable[[], T]) -> T:
    """Calls `decide` on process 0 and returns its result on all processes. The result must be JSON-serializable.

    Every process must call this function. If `decide` raises an error, all processes raise an error, so that no process
    waits forever. Process 0 raises the original error. The other processes raise a UserError if the original error is a
    UserError, and a RuntimeError otherwise.
    """
    import jax

    if jax.process_count() == 1:
        return decide()
    answer: dict[str, Any] = {}
    failure = None
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except Exception as error:
            answer, failure = {"error": str(error), "user_error": isinstance(error, UserError)}, error
    answer = json.loads(_broadcast_text(json.dumps(answer).encode()))
    if failure is not None:
        raise failure
    if "error" in answer:
        kind = UserError if answer["user_error"] else RuntimeError
        raise kind(f"process 0: {answer['error']}")
    return answer["value"]


def _broadcast_text(text: bytes) -> bytes:
    """Returns the text of process 0 on all processes.

    The length is broadcast first, because a broadcast needs arrays of equal size from all processes.
    """
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8))


def all_gather(number: int) -> list[int]:
    """Returns the numbers that the processes pass, in the order of their indices.

    Every process must call this function.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(number)).tolist()


def all_min(number: int) -> int:
    """Returns the smallest number that any process passes. Every process must call this function."""
    import jax

    return number if jax.process_count() == 1 else min(all_gather(number))


def all_max(number: int) -> int:
    """Returns the largest number that any process passes. Every process must call this function."""
    return -all_min(-number)


def disconnect() -> None:
    """Waits until all processes have called this function, then disconnects them from each other.

    JAX calls that are still waiting for another process then raise an error.
    """
    import jax

    jax.distributed.shutdown()


@contextlib.contextmanager
def fail_together() -> Generator[None]:
    """Ends all processes if the `with` block raises an error in one of them.

    The other processes print which process failed and why. The module docstring explains how this works.
    """
    import jax

    if jax.process_count() == 1:
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ended,), daemon=True).start()
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        ended.set()
        _report(error)
        _disconnect_or_exit()
        raise
    finally:
        ended.set()


def _key_value_store() -> Any:
    """Returns JAX's key-value store, or None after `disconnect`. All processes share the store.

    JAX has no public API for the store, so this function uses a private module of JAX, as Orbax does.
    """
    from jax._src import distributed

    return distributed.global_state.client


def _report(error: BaseException) -> None:
    """Writes this process's error into the key-value store, so that the other processes can read it."""
    import jax

    reason = first_line(error)
    if not isinstance(error, UserError) and reason != type(error).__name__:
        reason = f"{type(error).__name__}: {reason}"
    with contextlib.suppress(Exception):  # this process may have disconnected already
        index = jax.process_index()
        _key_value_store().key_value_set(f"{ENDED}{index}", f"process {index} has ended: {reason}")


def _watch(ended: threading.Event) -> None:
    """Ends this process GRACE seconds after another process reports an error.

    Returns without ending this process if `ended` is set first. `fail_together` sets `ended` when its block ends.
    """
    while not ended.wait(1):
        store = _key_value_store()
        if not store:
            return
        try:
            reports = store.key_value_dir_get(ENDED)
        except Exception:  # this process has just disconnected, or process 0 is lost
            return
        if reports and not ended.wait(GRACE):
            print(f"error: {reports[0][1]}", file=sys.stderr)
            _disconnect_or_exit()
            _exit_now()


def _disconnect_or_exit() -> None:
    """Tries for PATIENCE seconds to disconnect. If this fails, the process will exit without JAX's orderly shutdown.

    Disconnecting works only if all other processes disconnect as well, for example because the same error has occurred
    in them. An exit without shutdown closes the connections of this process. Other processes that wait for data on
    these connections then get an error.
    """

    def try_to_disconnect() -> None:
        with contextlib.suppress(Exception):
            disconnect()

    attempt = threading.Thread(target=try_to_disconnect, daemon=True)
    attempt.start()
    attempt.join(PATIENCE)
    if attempt.is_alive():
        atexit.register(_exit_now)  # runs before JAX's exit handler, which would wait for the other processes


def _exit_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)
