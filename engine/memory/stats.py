"""What the block manager has done since the start, in blocks: swaps, hits, and what came of foresight."""

from collections import Counter
from dataclasses import dataclass, field

from tidegate.engine.memory.block import State
from tidegate.engine.memory.copies import Reason

MIN_PREEMPTED = 4
"""Full blocks that a preempted sequence must have to be counted: fewer say nothing of foresight."""

THRASH_STEPS = 64
"""A block that comes back within so many steps of having left should not have left."""


@dataclass(slots=True)
class MemoryStats:
    copied_out: Counter[Reason] = field(default_factory=Counter)
    """Blocks written to the host tier."""
    copied_in: Counter[Reason] = field(default_factory=Counter)
    """Blocks read back from it."""
    seconds_out: float = 0.0
    """What these copies took."""
    seconds_in: float = 0.0
    failed_copies: int = 0
    preempted_full: int = 0
    """Full blocks of preempted sequences, and how many of them the host held already."""
    preempted_clean: int = 0
    host_hits_resumed: int = 0
    """Tokens that a sequence or a lease came back to in the host tier (class S)."""
    host_hits_prefix: int = 0
    """Tokens of known prefixes that a sequence began with in the host tier (class P)."""
    thrash: int = 0
    """Blocks loaded again within ``THRASH_STEPS`` of having been evicted."""
    states: Counter[State] = field(default_factory=Counter)
    """How many blocks there are of each state at present; ``gone`` ones are not counted."""

    def moved(self, before: State, after: State) -> None:
        """A block went from one state to another."""
        if before is not after:
            if before is not State.GONE:
                self.states[before] -= 1
            if after is not State.GONE:
                self.states[after] += 1
