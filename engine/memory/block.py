"""One KV block: where its content lies, who holds it, and what may become of it.

A **block** is ``block_size`` positions of a sequence across all layers of one group (``groups.py``). It has
up to two **slots**, one in each tier, and each slot knows how many of its positions are valid. Everything one
says about a block, dirty or clean, loading or host-only, is derived from its slots, never stored:

=============  ==========================  ================================
seen as        device slot                 host slot
=============  ==========================  ================================
reserved       valid to 0                  none
dirty          valid to n                  none, or valid to less than n
writing back   valid to n, pinned          being filled
clean          valid to n                  valid to n
host only      none                        valid to n
loading        being filled                valid to n, pinned
gone           none                        none
=============  ==========================  ================================

``TRANSITIONS`` says what may happen to a block; tests hold every change against it.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from tidegate.engine.memory.copies import Reason
from tidegate.engine.memory.groups import KVGroup


class State(StrEnum):
    RESERVED = "reserved"
    DIRTY = "dirty"
    WRITING_BACK = "writing_back"
    CLEAN = "clean"
    HOST_ONLY = "host_only"
    LOADING = "loading"
    GONE = "gone"


class Event(StrEnum):
    RESERVE = "reserve"
    """A table takes a fresh device slot for positions to come."""
    COMMIT = "commit"
    """A collected step made more positions valid."""
    CUT = "cut"
    """A table goes on from the middle of the block: what lies behind counts no longer."""
    WRITE_BACK = "write_back"
    COPIED_OUT = "copied_out"
    COPY_OUT_FAILED = "copy_out_failed"
    LOAD = "load"
    COPIED_IN = "copied_in"
    COPY_IN_FAILED = "copy_in_failed"
    EVICT = "evict"
    """The device slot goes to somebody else."""
    DROP_HOST = "drop_host"
    """The host slot goes to somebody else."""
    DISCARD = "discard"
    """Nobody holds the block and it is no known prefix: both slots go."""


TRANSITIONS: dict[tuple[State, Event], frozenset[State]] = {
    (State.GONE, Event.RESERVE): frozenset({State.RESERVED}),
    (State.RESERVED, Event.COMMIT): frozenset({State.DIRTY}),
    (State.RESERVED, Event.DISCARD): frozenset({State.GONE}),
    (State.DIRTY, Event.COMMIT): frozenset({State.DIRTY}),
    (State.DIRTY, Event.CUT): frozenset({State.DIRTY, State.CLEAN}),
    (State.DIRTY, Event.WRITE_BACK): frozenset({State.WRITING_BACK}),
    (State.DIRTY, Event.EVICT): frozenset({State.GONE}),
    (State.DIRTY, Event.DROP_HOST): frozenset({State.DIRTY}),
    (State.DIRTY, Event.DISCARD): frozenset({State.GONE}),
    (State.WRITING_BACK, Event.COMMIT): frozenset({State.WRITING_BACK}),
    (State.WRITING_BACK, Event.CUT): frozenset({State.WRITING_BACK}),
    # An append during the copy leaves the host behind again.
    (State.WRITING_BACK, Event.COPIED_OUT): frozenset({State.CLEAN, State.DIRTY}),
    (State.WRITING_BACK, Event.COPY_OUT_FAILED): frozenset({State.DIRTY}),
    (State.CLEAN, Event.COMMIT): frozenset({State.DIRTY}),
    (State.CLEAN, Event.CUT): frozenset({State.CLEAN}),
    (State.CLEAN, Event.EVICT): frozenset({State.HOST_ONLY}),
    (State.CLEAN, Event.DROP_HOST): frozenset({State.DIRTY}),
    (State.CLEAN, Event.DISCARD): frozenset({State.GONE}),
    (State.HOST_ONLY, Event.LOAD): frozenset({State.LOADING}),
    (State.HOST_ONLY, Event.DROP_HOST): frozenset({State.GONE}),
    (State.HOST_ONLY, Event.DISCARD): frozenset({State.GONE}),
    (State.LOADING, Event.COPIED_IN): frozenset({State.CLEAN}),
    (State.LOADING, Event.COPY_IN_FAILED): frozenset({State.GONE}),
}


@dataclass(slots=True)
class Slot:
    """A place in one tier. ``valid_len`` positions, from the first, hold what they should."""

    index: int
    valid_len: int = 0


class Copy(NamedTuple):
    """A copy in flight. ``valid_len`` is what its source held when it was ordered."""

    ticket: int
    to_host: bool
    valid_len: int
    reason: Reason


@dataclass(slots=True, eq=False)
class Block:
    group: int = 0
    """The number of its KV group."""
    key: bytes | None = None
    """Set once the block is full and confirmed, and is the one block of its group known under this key."""
    device: Slot | None = None
    host: Slot | None = None
    holders: "dict[BlockTable, None]" = field(default_factory=dict)
    """A set that keeps its order, so that a run of one seed is the same run every time."""
    resident: int = 0
    """How many of the holders are resident."""
    writer: "BlockTable | None" = None
    """The resident holder whose steps may write behind the positions that all holders share."""
    copy: Copy | None = None
    fence: int = 0
    """The last step that may use the device slot on behalf of a table that has since let go of it."""
    failures: int = 0
    """Write-backs that failed in a row."""
    hits: int = 0
    """How often a sequence began with this block as a known prefix."""
    evicted_at: int | None = None
    """The last step that had been collected when the block left the device, not to be loaded since."""

    @property
    def state(self) -> State:
        if self.copy is not None:
            return State.WRITING_BACK if self.copy.to_host else State.LOADING
        if self.device is None:
            return State.GONE if self.host is None else State.HOST_ONLY
        if self.device.valid_len == 0:
            return State.RESERVED
        return State.CLEAN if self.is_clean else State.DIRTY

    @property
    def is_clean(self) -> bool:
        """The host holds all that the device holds."""
        device, host = self.device, self.host
        return device is not None and host is not None and host.valid_len >= device.valid_len


def _is_exclusive(block: Block) -> bool:
    return block.resident == 1


@dataclass(slots=True)
class GroupTable:
    """The block table of one sequence in one group: ``blocks[0]`` is the sequence's block number ``start``.

    The blocks before it have left the group's window.
    """

    kind: KVGroup
    blocks: list[Block] = field(default_factory=list)
    start: int = 0
    source: Block | None = None
    """The shared block that the tail is a copy of, held until the step that copies it is collected."""

    @property
    def end(self) -> int:
        return self.start + len(self.blocks)

    def at(self, place: int) -> Block:
        """The sequence's block of that number."""
        return self.blocks[place - self.start]

    @property
    def num_exclusive(self) -> int:
        """Of a resident table, how many blocks no other keeps on the device."""
        if self.kind.window is None:
            # What tables share comes first.
            return len(self.blocks) - bisect_left(self.blocks, True, key=_is_exclusive)
        return sum(map(_is_exclusive, self.blocks))

    @property
    def num_shared(self) -> int:
        """Of a resident table, how many of the sequence's first blocks others keep on the device, too.

        Those that nobody needs any more are among them, as far as others keep what is needed behind them.
        """
        own = next((i for i, block in enumerate(self.blocks) if _is_exclusive(block)), len(self.blocks))
        return self.start + own if own else 0


@dataclass(slots=True, eq=False)
class BlockTable:
    """A sequence's blocks: one table for each KV group, side by side.

    ``[0, num_tokens)`` is valid KV, in one tier or the other, of what a group keeps; blocks behind it are
    reserved. All groups' tables end with the same block.
    """

    tenant: str
    root: bytes
    """The tenant's root key (see ``prefix.py``)."""
    groups: tuple[GroupTable, ...]
    num_tokens: int = 0
    resident: bool = False
    loading: int = 0
    """Blocks of a resident table that are still on their way to the device."""
    fence: int = 0
    """The last step launched with this table."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix keys of the sequence's full blocks, as far as anybody asked for them."""
    copy_due: bool = False
    """No launched step carries the copies yet that fill tails from their sources."""

    @property
    def end(self) -> int:
        """How many blocks the sequence has come to, those included that a group has let go of."""
        return self.groups[0].end

    @property
    def blocks(self) -> list[Block]:
        """Those of all groups, group by group. Not to be changed."""
        if len(self.groups) == 1:
            return self.groups[0].blocks
        return [block for group in self.groups for block in group.blocks]

    @property
    def sources(self) -> list[Block]:
        return [group.source for group in self.groups if group.source is not None]

    @property
    def held(self) -> list[Block]:
        """All blocks that must not go."""
        return [*self.blocks, *self.sources]

    @property
    def num_exclusive(self) -> int:
        """Blocks of a resident table that no other keeps on the device."""
        count = 0
        for group in self.groups:
            count += group.num_exclusive
        return count

    @property
    def num_shared(self) -> int:
        """Of a resident table, how many of the sequence's first blocks others keep on the device, too."""
        return min(group.num_shared for group in self.groups)

    @property
    def is_ready(self) -> bool:
        """Whether a step may use the table."""
        return self.resident and self.loading == 0

    def full_blocks(self, block_size: int) -> list[Block]:
        """Those in which every position is valid, group by group."""
        full = self.num_tokens // block_size
        return [block for group in self.groups for block in group.blocks[: full - group.start]]

    def reach(self, num_tokens: int, block_size: int) -> int:
        """Of its first ``num_tokens`` positions, how many there are to go on from.

        All of them; or none, where a window reaches back from there to blocks that are gone.
        """
        for group in self.groups:
            if group.kind.needed_from(num_tokens, block_size) < group.start:
                return 0
        return num_tokens


Observer = Callable[[Block, Event, State, State], None]
