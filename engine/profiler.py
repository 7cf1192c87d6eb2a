"""When a trace of the engine's steps begins and ends; whose trace it is, is the device's matter."""

from collections.abc import Callable
from typing import Protocol


class Trace(Protocol):
    """Records from when it was made."""

    def stop(self) -> str:
        """The path of the file that it wrote."""


class Profiler:
    """``make`` starts a trace; None: there is nothing to record, and an empty path says so."""

    def __init__(self, make: Callable[[], Trace] | None) -> None:
        self._make = make
        self._trace: Trace | None = None
        self._steps_left = 0

    def start(self, steps: int) -> None:
        """Record the next steps; those of an earlier call that are still to come among them."""
        self._steps_left = max(self._steps_left, steps)
        if self._trace is None and self._make is not None:
            self._trace = self._make()

    def stepped(self) -> str | None:
        """A step is done; the trace's path behind the last one."""
        if self._steps_left == 0:
            return None
        self._steps_left -= 1
        if self._steps_left:
            return None
        trace, self._trace = self._trace, None
        return "" if trace is None else trace.stop()
