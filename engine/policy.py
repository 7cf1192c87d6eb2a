"""Whom to admit, whom to preempt, and how: pure functions over plain numbers.

Nothing here holds state or knows a sequence, so that each rule can be simulated, ablated and read on
its own. Scheduler and core supply the numbers.
"""

import math
from typing import NamedTuple

RECOMPUTE_BIAS = 0.25
"""How much dearer than recomputing a swap may look and still be chosen: recomputing slows all others."""

GROWTH_ROOM = 8
"""Tokens for which each running sequence is given room to grow before another one comes in. Without it up to
half as many preemptions again move up to 40% more bytes; much more would leave blocks idle."""

WRITE_AHEAD_MARK = 0.5
"""Share of the device tier in use from which likely victims are written to the host in advance, unless
there is room for all to grow."""

DEMOTE_MARK = 0.05
"""Share of the device tier that is free below which prefixes of proven use are written in advance."""

DEMOTED_A_STEP = 8
"""Blocks; a bound on what copying takes from the step beside it."""

IMMUNE_STEPS = 16
"""Steps during which a sequence that just came in, or came back, is the last of its priority to be preempted:
its blocks are not written yet, or were only just read."""


class Candidate(NamedTuple):
    """A sequence that holds device blocks, as victim choice sees it."""

    stalled: bool
    """It has no credit: nothing waits for its next token."""
    priority: int
    immune: bool
    num_exclusive: int
    """Blocks that come free with it: nobody else needs them on the device."""
    arrival: int
    """Counts up: the larger, the later it came."""


def victim_rank(candidate: Candidate) -> tuple[bool, int, bool, int, int]:
    """The lowest goes first: the stalled, then low priority, then those not just back, then the largest.

    To take much from one interrupts fewer than to take little from many, and what is shared frees nothing.
    Among equals the latest goes first.
    """
    return (
        not candidate.stalled,
        candidate.priority,
        candidate.immune,
        -candidate.num_exclusive,
        -candidate.arrival,
    )


def may_displace(taker: Candidate, victim: Candidate) -> bool:
    """Whether ``victim`` may lose its blocks so that ``taker``, which runs already, can go on.

    This makes progress certain: the oldest of the highest priority is never preempted for anybody, so it
    ends, and then the next one is the oldest.
    """
    return victim.stalled or (victim.priority, -victim.arrival) < (taker.priority, -taker.arrival)


def write_ahead_blocks(
    *, seconds: float, bytes_per_second: float, block_bytes: int, queued_blocks: int
) -> int:
    """How many blocks the link can write in so many seconds, behind those that are queued already."""
    return max(0, int(seconds * bytes_per_second / block_bytes) - queued_blocks)


def growth_reserve(num_running: int, block_size: int) -> int:
    """Blocks that the running sequences will want soon; room that a newcomer must leave to them.

    ``max_tokens`` is no prediction: reserving for it would halve the batch, and most never get there.
    """
    return math.ceil(num_running * GROWTH_ROOM / block_size)


class Costs(NamedTuple):
    """What bringing a preempted sequence back would take, in seconds, either way."""

    swap: float
    recompute: float

    @property
    def prefers_swap(self) -> bool:
        return self.swap < self.recompute * (1 + RECOMPUTE_BIAS)


def preemption_costs(
    *,
    bytes_out: int,
    bytes_in: int,
    queued_bytes: int,
    bytes_per_second: float,
    tokens: int,
    tokens_per_second: float,
) -> Costs:
    """Swap: what must be written now and read later, behind what is queued. Recompute: the tokens again."""
    return Costs(
        swap=(bytes_out + bytes_in + queued_bytes) / bytes_per_second,
        recompute=tokens / tokens_per_second,
    )
