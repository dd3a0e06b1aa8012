"""Compiles an engine's programs in a background thread, while the engine goes on with its answers.

XLA compiles without holding Python's global lock, so it hardly slows down the running answers.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from nanochat_jax.config import first_line
from nanochat_jax.engine.ahead import Program
from nanochat_jax.engine.engine import Engine

log = logging.getLogger("nanochat_jax.serve")

POLL_SECONDS = 0.5  # how often the thread checks whether the engine has become idle


class Compiler:
    """Compiles the programs that requests wait for. While the engine is idle, compiles further programs.

    The iterator `warmup` compiles the first of these further programs, a few at each step. After the iterator has
    ended, the Compiler compiles the programs that the engine had to replace with slower ones. `is_idle` returns whether
    the engine is idle.
    """

    def __init__(self, engine: Engine, warmup: Iterator[int] | None, is_idle: Callable[[], bool]):
        self.warming = warmup is not None  # whether `warmup` has programs left to compile
        self._warmup = warmup or iter(())
        self._engine, self._is_idle = engine, is_idle
        self._jobs: queue.SimpleQueue[tuple[Sequence[Program], Callable[[bool], object]] | None] = queue.SimpleQueue()
        self._failed: set[Program] = set()
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Makes the thread end after its current work and after the programs that requests already wait for."""
        self._jobs.put(None)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def compile(self, programs: Sequence[Program], then: Callable[[bool], object]) -> None:
        """Compiles `programs` as soon as possible. Then calls then(True) if all were compiled, else then(False)."""
        self._jobs.put((programs, then))

    # -----------------------------------------------------------------------------
    # Methods that run in the thread

    def _run(self) -> None:
        while True:
            useful = self._is_idle() and (self.warming or self._replaced())
            try:
                job = self._jobs.get(timeout=0 if useful else POLL_SECONDS)
            except queue.Empty:
                if useful:
                    self._warm_up()
                continue
            if job is None:
                return
            programs, then = job
            then(all([self._compile(program) for program in programs]))

    def _replaced(self) -> list[Program]:
        return [program for program in self._engine.replaced if program not in self._failed]

    def _compile(self, program: Program) -> bool:
        """Compiles a program, and returns whether this succeeded.

        If compiling fails, for example for lack of memory, the server continues. Only the requests that need the
        program fail, and only if no compiled program can replace it.
        """
        try:
            self._engine.compile(program)
        except Exception as error:
            self._failed.add(program)
            log.warning("%s was not compiled: %s", program.name, first_line(error))
            return False
        return True

    def _warm_up(self) -> None:
        """Compiles the next few programs that no request waits for."""
        if not self.warming:
            self._compile(self._replaced()[0])
            return
        try:
            self.warming = next(self._warmup, None) is not None
        except Exception as error:
            self.warming = False
            log.warning("warm-up stopped: %s", first_line(error))
