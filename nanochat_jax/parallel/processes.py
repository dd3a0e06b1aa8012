"""The processes of a run on several hosts: how they find each other, agree, and end together.

If one process fails, the others must end as well. Otherwise, they would wait for the failed process in their next
collective operation, by JAX's defaults for five minutes. `fail_together` shortens this wait. If code in a
`fail_together` block raises an error, the failed process writes its index and the error into the key-value store that
JAX keeps for all processes. The failed process then tries to disconnect, which succeeds only if the other processes
disconnect as well. After at most PATIENCE seconds, the failed process exits, disconnected or not.

Meanwhile, every process has a thread that reads the store once a second. When the thread finds another process's error,
it waits GRACE seconds: some errors occur in all processes, so its own process may be about to end by itself. If its own
process is still running after that, the thread prints which process failed and why, disconnects if it can, and ends its
own process with exit code 2.

A process that is killed cannot write an error. After HEARTBEAT seconds without a heartbeat from the killed process, JAX
ends the other processes with a message that is a page long.
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
HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as lost; a JAX thread sends the heartbeats
PATIENCE = 10  # seconds that a failed process waits for the other processes to disconnect
GRACE = 3  # seconds that a process gets to end by itself after another process has reported an error
ENDED = "nanochat_jax/ended/"  # prefix of the keys under which processes report their errors


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes of a run on several hosts, if there are any.

    The processes find each other through `coordinator` (host:port of process 0) or, without it, through the environment
    variables that Slurm or Kubernetes sets for each task. Call this function before any code asks JAX for its devices.
    Raises UserError if the arguments do not fit together or if joining fails.
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
        # JAX gets the addresses through the package kubernetes, which is not installed along with JAX.
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

    All processes must call this function together. If `decide` raises an error, every process raises an error, so that
    none waits forever. Process 0 raises the original error. The other processes raise a UserError if the original error
    is a UserError, and a RuntimeError otherwise.
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
    """Returns process 0's text on all processes.

    The length of the text is broadcast first, because the arrays that the processes pass to a broadcast must all have
    the same size.
    """
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8))


def all_gather(number: int) -> list[int]:
    """Returns the numbers of all processes, in the order of their indices. All processes must call this function
    together."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(number)).tolist()


def all_min(number: int) -> int:
    """Returns the minimum of the numbers of all processes. All processes must call this function together."""
    import jax

    return number if jax.process_count() == 1 else min(all_gather(number))


def disconnect() -> None:
    """Waits until all processes have called this function, then disconnects them from each other.

    A call to JAX that is still waiting for another process at that time raises an error.
    """
    import jax

    jax.distributed.shutdown()


@contextlib.contextmanager
def fail_together() -> Generator[None]:
    """If an error occurs in this block in one process, the other processes end as well.

    Each of the other processes prints which process failed and why. The module docstring explains how this works.
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
    """Returns the key-value store of JAX, which all processes share, or None after `disconnect`.

    JAX has no public API for the store. Orbax takes the store from the same private module.
    """
    from jax._src import distributed

    return distributed.global_state.client


def _report(error: BaseException) -> None:
    """Writes this process's error into the shared store, for the other processes to read."""
    import jax

    reason = first_line(error)
    if not isinstance(error, UserError) and reason != type(error).__name__:
        reason = f"{type(error).__name__}: {reason}"
    with contextlib.suppress(Exception):  # this process may have disconnected already
        index = jax.process_index()
        _key_value_store().key_value_set(f"{ENDED}{index}", f"process {index} has ended: {reason}")


def _watch(ended: threading.Event) -> None:
    """Waits until another process reports an error, then waits GRACE seconds more, and then ends this process.

    If `ended` is set before that, returns without ending this process. `fail_together` sets `ended` when its block
    ends.
    """
    while not ended.wait(1):
        store = _key_value_store()
        if not store:
            return
        try:
            reports = store.key_value_dir_get(ENDED)
        except Exception:  # either this process has just disconnected, or JAX reports that process 0 is lost
            return
        if reports and not ended.wait(GRACE):
            print(f"error: {reports[0][1]}", file=sys.stderr)
            _disconnect_or_exit()
            _exit_now()


def _disconnect_or_exit() -> None:
    """Tries for PATIENCE seconds to disconnect, which works only if all other processes disconnect as well.

    The other processes disconnect if they have the same error. If they do not disconnect in time, this process will
    exit without JAX's orderly shutdown. The connections of this process then simply close, and any process that waits
    for data from one of these connections gets an error.
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
