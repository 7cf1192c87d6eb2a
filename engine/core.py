"""The engine's heartbeat: plan a step, launch it, collect the oldest one.

The whole engine is on this page; each word of it has a room of its own. Where ``depth`` is 2 a step is
planned while the one before it still computes, so a plan never knows the tokens of the step before.
"""

import time
from collections import deque

from tidegate.engine.flight import FlightRecorder
from tidegate.engine.memory.copies import Transfer
from tidegate.engine.messages import (
    Command,
    EngineInfo,
    Finish,
    Flush,
    Inspect,
    Limit,
    Pause,
    Profile,
    Release,
    Stats,
    StepOutput,
    Submit,
    Update,
)
from tidegate.engine.profiler import Profiler
from tidegate.engine.scheduler import ScheduledStep, Scheduler
from tidegate.engine.step import DeviceLost, Runner, StepHandle

COPY_WAIT = 0.005
"""Seconds to wait for copies, or for constraints, when nothing else can go on; commands are looked at in
between."""
STATS_INTERVAL = 0.25
"""Seconds between two reports of the totals while there is work."""


class EngineCore:
    """One engine. Calls come from one thread; ``step`` never waits longer than for one step."""

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: Runner,
        transfer: Transfer,
        depth: int,
        profiler: Profiler | None = None,
    ) -> None:
        self.info = info
        self.recorder = FlightRecorder()
        self.scheduler = scheduler
        self._runner = runner
        self._transfer = transfer
        self._depth = depth
        self._profiler = profiler or Profiler(None)
        self._is_paused = False
        self._in_flight: deque[tuple[ScheduledStep, StepHandle]] = deque()
        self._stats_due = 0.0
        self._was_idle = True
        """Behind the last step."""

    def handle(self, command: Command) -> None:
        """Apply a command; what it changes shows in the next step."""
        match command:
            case Submit():
                self.scheduler.submit(command)
            case Limit():
                self.scheduler.limit(command)
            case Finish():
                self.scheduler.finish(command)
            case Update():
                self.scheduler.update(command)
            case Release():
                self.scheduler.release(command)
            case Inspect():
                self.scheduler.inspect(command)
            case Pause():
                self._is_paused = command.is_on
            case Flush():
                self.scheduler.flush(command)
            case Profile():
                self._profiler.start(command.steps)

    def step(self) -> StepOutput:
        """One beat: what it returns may be empty."""
        planned = None if self._is_paused else self.scheduler.plan()
        if planned is not None:
            self.recorder.launched(planned.plan.step_id, planned.places)
            self._in_flight.append((planned, self._runner.launch(planned.plan)))
        if len(self._in_flight) >= self._depth or (planned is None and self._in_flight):
            self._collect()
        elif planned is None and not self._is_paused:
            self._wait_or_shed()
        return self._say()

    def _collect(self) -> None:
        planned, handle = self._in_flight[0]
        try:
            # Interrupted here (Ctrl-C in a notebook), the step stays in flight: its blocks wait for it.
            result = handle.result()
        except DeviceLost:
            # Nothing will run here again: the process ends, and another engine takes its place.
            raise
        except Exception as error:  # noqa: BLE001  whatever it was: retried, then told to its requests
            self._in_flight.popleft()
            self.scheduler.fail(planned, error)
        else:
            self._in_flight.popleft()
            self.scheduler.apply(planned, result)
        self.recorder.landed(planned.plan.step_id)
        if (path := self._profiler.stepped()) is not None:
            self.scheduler.profiled(path)

    def _wait_or_shed(self) -> None:
        if self.scheduler.is_copying:
            self._transfer.wait(COPY_WAIT)
        elif self.scheduler.is_making_constraints:
            self.scheduler.wait_for_constraints(COPY_WAIT)
        elif self.scheduler.is_stuck:
            self.scheduler.shed()

    def _say(self) -> StepOutput:
        out = self.scheduler.take_output()
        now, is_idle = time.monotonic(), not self.has_work()
        # Also where the work ends without a word, as with a copy: the last report must stay true.
        if (out and now >= self._stats_due) or (is_idle and (out or not self._was_idle)):
            self._stats_due = now + STATS_INTERVAL
            out.stats = self.stats()
        self._was_idle = is_idle
        return out

    def has_work(self) -> bool:
        """Whether ``step`` would do something now, without a command or a timer."""
        return bool(self._in_flight) or (self.scheduler.has_work and not self._is_paused)

    def next_deadline(self) -> float | None:
        """The monotonic time of the next timer: a deadline, or the end of a grace."""
        return None if self._is_paused else self.scheduler.next_timer()

    def stats(self) -> Stats:
        return self.scheduler.snapshot()

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` where anything does not add up."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        """Give back the threads; requests that still run are dropped without a word."""
        self._runner.close()
        self._transfer.close()
        self.scheduler.close()
