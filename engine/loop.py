"""The engine's own loop: commands in, one output a step. The same in a process and in a thread."""

import time
from collections.abc import Callable
from typing import Protocol

from tidegate.engine.flight import FlightRecorder
from tidegate.engine.messages import Command, EngineInfo, StepOutput

BEAT_SECONDS = 1.0
"""The longest wait: also an engine that has nothing to do shows that it is alive."""


class Core(Protocol):
    """What the loop needs of an engine; only one thread calls it."""

    info: EngineInfo
    recorder: FlightRecorder
    """Told what runs, for whoever reads it; a process of its own puts shared memory here."""

    def handle(self, command: Command) -> None:
        """Note a command; it takes effect in the next step."""

    def step(self) -> StepOutput:
        """Do what there is to do and say what there is to say; both may be nothing."""

    def has_work(self) -> bool:
        """Whether there is something to run, to copy or to time out right now."""

    def next_deadline(self) -> float | None:
        """The monotonic time, in seconds, at which an idle engine has work again by itself."""

    def close(self) -> None:
        """Give back threads and memory."""


class Commands(Protocol):
    """Where the loop's commands come from."""

    def take(self, timeout: float) -> list[Command] | None:
        """All commands that wait, in order; waits up to ``timeout`` seconds for the first.

        None: the engine is to end.
        """


def run(core: Core, commands: Commands, say: Callable[[StepOutput], None]) -> None:
    """Step until ``commands`` ends. Everything that came since the last step goes into the next one."""
    while (batch := commands.take(_patience(core))) is not None:
        core.recorder.beat()
        for command in batch:
            core.handle(command)
        output = core.step()
        if output:
            say(output)


def _patience(core: Core) -> float:
    if core.has_work():
        return 0
    deadline = core.next_deadline()
    return BEAT_SECONDS if deadline is None else min(max(0, deadline - time.monotonic()), BEAT_SECONDS)
