"""Holds off Python's garbage collector while a training loop runs.

The collector looks at all objects of the process, which takes up to half a second with JAX and its compiled programs
loaded, and it starts at any allocation. In a run on several processes, all wait for the one that is collecting.
"""

import gc
from types import TracebackType

COLLECT_EVERY = 1000  # steps between collections; reference cycles that a step leaves behind live until then


class HeldOffGarbage:
    """Within this context, garbage is collected only by `between_steps`."""

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

        After the first step, takes all objects that exist by then out of later collections, since they live as long as
        the run. Then collects every `every` steps.
        """
        if self._steps == 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps and self._steps % self.every == 0:
            gc.collect()
        self._steps += 1
