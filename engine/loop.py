"""The engine's own loop: commands in, one output a step. The same in a process and in a thread."""

import time
from collections.abc import Callable
from typing import Protocol

from tidegate.engine.messages import Command, EngineInfo, StepOutput

MAX_PATIENCE = 3600.0
"""Seconds of one wait: a deadline may lie further away than a poll can wait, which is 24 days."""


class Core(Protocol):
    """What the loop needs of an engine; only one thread calls it."""

    info: EngineInfo

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

    def take(self, timeout: float | None) -> list[Command] | None:
        """All commands that wait, in order; waits up to ``timeout`` seconds (None: for ever) for the first.

        None: the engine is to end.
        """


def run(core: Core, commands: Commands, say: Callable[[StepOutput], None]) -> None:
    """Step until ``commands`` ends. Everything that came since the last step goes into the next one."""
    while (batch := commands.take(_patience(core))) is not None:
        for command in batch:
            core.handle(command)
        output = core.step()
        if output:
            say(output)


def _patience(core: Core) -> float | None:
    if core.has_work():
        return 0
    deadline = core.next_deadline()
    return None if deadline is None else min(max(0, deadline - time.monotonic()), MAX_PATIENCE)
