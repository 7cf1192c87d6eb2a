"""What the block manager asks of a copy engine: blocks from slot to slot, each with a ticket.

The manager says which slot goes where; a copy engine (``transfer.py``; a fake one in simulation) does
it in its own time and reports each ticket once. It decides nothing: a slot under copy is pinned by the
manager, so nobody else writes to it or gives it away meanwhile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol


class Reason(StrEnum):
    """What a copy is for."""

    PREEMPT = "preempt"
    PARK = "park"
    AHEAD = "ahead"
    """Of what is likely to have to leave the device soon."""
    DEMOTE = "demote"
    """Of a prefix that has been of use, before its device slot goes to somebody else."""
    RESUME = "resume"
    PREFIX = "prefix"
    """Of a prefix that a new sequence begins with."""


@dataclass(frozen=True, slots=True)
class CopyOp:
    """One whole block from a slot of one tier to a slot of the other."""

    ticket: int
    to_host: bool
    device_index: int
    host_index: int


class Completion(NamedTuple):
    ticket: int
    ok: bool
    seconds: float = 0.0
    """This block's share of the time that its copy took."""


class Transfer(Protocol):
    """One copy engine. Calls come from the engine's thread alone and none of them waits, but ``wait``."""

    @property
    def bytes_per_second(self) -> float:
        """What it achieved lately; the figure that policy weighs against recomputation."""

    def submit(self, ops: Sequence[CopyOp]) -> None: ...

    def poll(self) -> list[Completion]:
        """Copies that ended since the last call, in any order, each exactly once."""

    def wait(self, timeout: float) -> None:
        """Return when something may be polled, or after ``timeout`` seconds."""

    def close(self) -> None: ...


class Run(NamedTuple):
    """Blocks that lie side by side in both tiers: one copy."""

    to_host: bool
    device_start: int
    host_start: int
    tickets: list[int]


def merge_runs(ops: Sequence[CopyOp]) -> Iterator[Run]:
    """The same copies in as few pieces as possible."""
    run: Run | None = None
    for op in sorted(ops, key=lambda op: (op.to_host, op.device_index)):
        if run is not None:
            length = len(run.tickets)
            follows = (run.device_start + length, run.host_start + length) == (op.device_index, op.host_index)
            if follows and op.to_host == run.to_host:
                run.tickets.append(op.ticket)
                continue
            yield run
        run = Run(op.to_host, op.device_index, op.host_index, [op.ticket])
    if run is not None:
        yield run
