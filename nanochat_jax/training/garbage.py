"""Holds off Python's garbage collector while a training loop runs.

The collector may start at any allocation. It looks at all objects of the process, which takes up to half a second once
JAX and its compiled programs are loaded. In a run with several processes, the others wait for the process that is
collecting.
"""

import gc
from types import TracebackType

COLLECT_EVERY = 1000  # steps between collections; until the next one, unused reference cycles stay in memory


class HeldOffGarbage:
    """Within this context, after the first step, garbage is collected only by `between_steps`."""

    def __init__(self, every: int = COLLECT_EVERY):
        self.every = every
        self._steps = 0
        self._was_enabled = gc.isenabled()

    def __enter__(self) -> "HeldOffGarbage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def between_steps(self) -> None:
        """Call this once in every iteration of the loop.

        After the first step, collects garbage and turns the collector off. Later collections skip the objects that
        exist at this point, because these objects live as long as the run. From then on, collects garbage once per
        `self.every` steps.
        """
        if self._steps == 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps and self._steps % self.every == 0:
            gc.collect()
        self._steps += 1
