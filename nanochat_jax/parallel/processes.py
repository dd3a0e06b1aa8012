"""The processes of a run on several hosts: how they find each other, agree, and end together."""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from nanochat_jax.config import UserError

T = TypeVar("T")
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost; given by a thread of JAX's own
PATIENCE = 10  # seconds that a process with an error waits for the others to end as well
GRACE = 3  # seconds in which one that hears of it may end with an error of its own
ENDED = "nanochat_jax/ended/"  # where it tells them, among the keys that JAX's processes share


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes of a run on several hosts, if there are any.

    They find each other through `coordinator` (host:port of process 0), or through what Slurm or Kubernetes tell their
    tasks. Call it before anything else asks JAX for its devices.
    """
    import jax

    if jax.distributed.is_initialized():
        return
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
        where = {}  # JAX reads the addresses off Slurm's environment
    elif "JOB_COMPLETION_INDEX" in os.environ:
        where = {}  # ... or asks Kubernetes for them, by a package that it does not bring along
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed job of Kubernetes, whose others are found by the package kubernetes: "
                "pip install '.[k8s]', or give --coordinator, or --num_processes=1 if there are no others"
            )
    else:
        return
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        hint = "" if where else ": try --coordinator=host:port --num_processes=N --process_id=I"
        raise UserError(f"could not join the other processes: {str(error).splitlines()[0]}{hint}") from None


def broadcast_from_0(decide: Callable[[], T]) -> T:
    """What `decide` returns on process 0 (anything JSON can hold), told to all. An error it raises there ends all of
    them, or the others would wait for ever: a UserError as such, any other as what it is on process 0 alone."""
    import jax

    if jax.process_count() == 1:
        return decide()
    answer, failed = {}, None
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except Exception as error:
            answer, failed = {"error": str(error), "mendable": isinstance(error, UserError)}, error
    answer = json.loads(_broadcast_text(json.dumps(answer).encode()))
    if failed is not None:
        raise failed
    if "error" in answer:
        raise (UserError if answer["mendable"] else RuntimeError)(f"process 0: {answer['error']}")
    return answer["value"]


def _broadcast_text(text: bytes) -> bytes:
    """The text of process 0, on all: its length first, since the others must have as much room."""
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    mine = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8))


def all_gather(number: int) -> list[int]:
    """The number of each process, told to all, which must ask at the same point."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.int32(number)).tolist()


def all_min(number: int) -> int:
    """The least of the processes' numbers, which must ask at the same point."""
    import jax

    return number if jax.process_count() == 1 else min(all_gather(number))


def disconnect() -> None:
    """Takes leave of the other processes, once all of them do. What still waits for one of them gets an error."""
    import jax

    jax.distributed.shutdown()


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Within it an error of one process alone ends the others too, with a line that says whose it was: without, it
    would wait five minutes for them to exit, and they for its part of the next step. One that is killed is missed after
    HEARTBEAT seconds; what JAX then tells the others is a page long."""
    import jax

    if jax.process_count() == 1:
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_listen, args=(ended,), daemon=True).start()
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        ended.set()
        _tell(error)
        _disconnect_or_exit()
        raise
    finally:
        ended.set()


def _shared():
    """The keys and values that the processes share; None after `leave`. Orbax takes them from there as well: JAX has no
    public way to them."""
    from jax._src import distributed

    return distributed.global_state.client


def _tell(error: BaseException) -> None:
    import jax

    said = str(error).strip().splitlines()[:1]
    reason = ": ".join(said if isinstance(error, UserError) else [type(error).__name__, *said])
    with contextlib.suppress(Exception):  # who has taken leave has nobody to tell
        _shared().key_value_set(f"{ENDED}{jax.process_index()}", f"process {jax.process_index()} has ended: {reason}")


def _listen(ended: threading.Event) -> None:
    """Ends this process soon after another one has told of its error: it may be waiting for its part of a step."""
    while not ended.wait(1) and (shared := _shared()):
        try:
            told = shared.key_value_dir_get(ENDED)
        except Exception:  # taken leave just now, or process 0 is lost: JAX says so
            return
        if told and not ended.wait(GRACE):
            print(f"error: {told[0][1]}", file=sys.stderr)
            _disconnect_or_exit()
            _exit_now()


def _disconnect_or_exit() -> None:
    """Takes leave of the other processes if they do so too within a few seconds, as with an error they all have. Else
    this process will exit without: its connections close, and what waits at their other ends gets an error."""

    def try_to_leave() -> None:
        with contextlib.suppress(Exception):
            disconnect()

    leaving = threading.Thread(target=try_to_leave, daemon=True)
    leaving.start()
    leaving.join(PATIENCE)
    if leaving.is_alive():
        atexit.register(_exit_now)  # goes before JAX's own handler


def _exit_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)
