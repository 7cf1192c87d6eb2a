"""The block manager: which KV blocks exist, in which tier, and what may become of each.

A **block** is ``block_size`` positions of a sequence across all layers. It has up to two **slots**, one
in each tier, and each slot knows how many of its positions are valid. Everything one says about a
block, dirty or clean, loading or host-only, is derived from its slots, never stored:

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

A **table** is the list of a sequence's blocks. While it is *resident* its blocks stay on the device and
steps may read and write them; while it is not, they are kept (class S: somebody will come back for
them) but their device slots are anybody's as soon as the host holds a copy. Blocks that no table holds
are kept as long as there is room (class P: a prefix that may be used again).

Tables may share a block, its last one too. They agree on as many of its positions as each of them
counts; behind those one of them, the block's *writer*, may go on. Any other that has to write there takes
a block of its own first, and a step copies into it what is shared (copy on write).

Three things keep a slot from being reused under somebody's hands. A *resident* count: tables that
steps may use. A *copy* in flight: one a block at most. A *fence*: the last step that was launched with
the slot in a table; slots go back to their pool only when that step has been collected.

No torch here: copies are somebody else's work (``transfer.py``), and so the whole state machine runs in
simulation. ``TRANSITIONS`` says what may happen to a block; tests hold every change against it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, KeysView, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

from tidegate.engine.memory.copies import CopyOp, Transfer
from tidegate.engine.memory.pool import BlockPool
from tidegate.engine.memory.prefix import BlockHasher, PrefixIndex

MAX_COPY_FAILURES = 3


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


@dataclass(slots=True, eq=False)
class Block:
    key: bytes | None = None
    """Set once the block is full and confirmed, and is the one block known under this prefix key."""
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


@dataclass(slots=True, eq=False)
class BlockTable:
    """A sequence's blocks, in order.

    ``[0, num_tokens)`` is valid KV, in one tier or the other; blocks behind it are reserved.
    """

    root: bytes = b""
    """The tenant's root key (see ``prefix.py``)."""
    blocks: list[Block] = field(default_factory=list)
    num_tokens: int = 0
    resident: bool = False
    loading: int = 0
    """Blocks of a resident table that are still on their way to the device."""
    fence: int = 0
    """The last step launched with this table."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix keys of the sequence's full blocks, as far as anybody asked for them."""
    source: Block | None = None
    """The shared block that the tail is a copy of, held until the step that copies it is collected."""
    copy_due: bool = False
    """No launched step carries that copy yet."""

    @property
    def is_ready(self) -> bool:
        """Whether a step may use the table."""
        return self.resident and self.loading == 0


Observer = Callable[[Block, Event, State, State], None]


class BlockManager:
    """Both tiers. Calls come from one thread; copies end asynchronously and are taken in by ``poll``."""

    def __init__(
        self,
        *,
        block_size: int,
        device_blocks: int,
        host_blocks: int,
        transfer: Transfer,
        hasher: BlockHasher | None,
        observer: Observer | None = None,
    ) -> None:
        """``hasher`` None: no prefix is ever shared. ``observer`` is told of every transition."""
        self.block_size = block_size
        self.device = BlockPool(device_blocks)
        self.host = BlockPool(host_blocks)
        self.hasher = hasher
        self.copied_out = 0
        """Blocks written to the host tier, and read back from it, since the start."""
        self.copied_in = 0
        self._transfer = transfer
        self._observer = observer
        self._index: PrefixIndex[Block] = PrefixIndex()
        self._copies: dict[int, Block] = {}
        self._outbox: list[CopyOp] = []
        self._next_ticket = 1
        self._collected = 0
        self._truncated: dict[BlockTable, None] = {}
        self._parked: OrderedDict[BlockTable, None] = OrderedDict()
        # Blocks by what may be taken from them, least recently used first. Kept by ``_settle`` alone.
        self._evictable: OrderedDict[Block, None] = OrderedDict()
        self._evictable_parked: OrderedDict[Block, None] = OrderedDict()
        self._draining: OrderedDict[Block, None] = OrderedDict()
        self._host_prefixes: OrderedDict[Block, None] = OrderedDict()
        self._host_mirrors: OrderedDict[Block, None] = OrderedDict()

    # What there is room for

    @property
    def num_available(self) -> int:
        """Device slots to be had at once: free ones, and those of blocks that nobody needs there."""
        return self.device.num_free + self.num_reclaimable

    @property
    def num_reclaimable(self) -> int:
        return len(self._evictable) + len(self._evictable_parked)

    @property
    def num_draining(self) -> int:
        """Device slots that come free by themselves, when a copy ends or a step is collected."""
        return len(self._draining)

    @property
    def num_host_available(self) -> int:
        """Host slots to be had without dropping anything that a sequence will come back for."""
        return self.host.num_free + self.num_host_reclaimable

    @property
    def num_host_reclaimable(self) -> int:
        return len(self._host_prefixes) + len(self._host_mirrors)

    @property
    def copies_in_flight(self) -> int:
        return len(self._copies)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def has_room(self, blocks: Sequence[Block], extra: int) -> bool:
        """Whether these blocks fit on the device together, and ``extra`` fresh ones beside them."""
        missing = sum(block.device is None for block in blocks)
        counted_twice = sum(block in self._evictable or block in self._evictable_parked for block in blocks)
        return missing + extra <= self.num_available - counted_twice

    # The life of a table

    def new_table(self, tenant: str) -> BlockTable:
        return BlockTable(root=self.hasher.root(tenant) if self.hasher is not None else b"")

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[Block]:
        """Known blocks that hold a prefix of ``token_ids``; nothing changes.

        Never all of the tokens: the last one must be computed to give logits, and computing it inside
        a shared block would write to what others read.
        """
        if self.hasher is None:
            return []
        limit = (len(token_ids) - 1) // self.block_size
        self.hasher.extend(table.keys, table.root, token_ids, limit)
        return self._index.longest(table.keys[:limit])

    def adopt(self, table: BlockTable, blocks: Sequence[Block]) -> None:
        """Start an empty table with blocks that ``find_prefix`` found, and make it resident.

        The caller has asked ``has_room``. Host-only blocks start to load.
        """
        for block in blocks:
            block.holders[table] = None
            block.hits += 1
        table.blocks.extend(blocks)
        table.num_tokens = len(blocks) * self.block_size
        self.resume(table)

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Fresh blocks that the table takes to hold ``[0, num_tokens)``, a copy of a shared tail included."""
        writes = num_tokens > table.num_tokens
        growth = self.blocks_for(num_tokens) - len(table.blocks)
        return max(0, growth) + (writes and self._must_copy_tail(table))

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Let steps of a resident table write ``[table.num_tokens, num_tokens)``; False without room.

        A tail that others need as it is gets replaced by a block of the table's own, which the next step
        must fill first: ``launched`` says from which slot.
        """
        if self.num_missing(table, num_tokens) > self.num_available:
            return False
        if num_tokens > table.num_tokens and table.num_tokens % self.block_size:
            self._own_tail(table)
        while len(table.blocks) < self.blocks_for(num_tokens):
            table.blocks.append(self._fresh_block(table))
        return True

    def _fresh_block(self, table: BlockTable) -> Block:
        block = Block(holders={table: None}, resident=1, writer=table)
        with _Transition(self, block, Event.RESERVE):
            block.device = Slot(self._take_device())
        return block

    def _must_copy_tail(self, table: BlockTable) -> bool:
        """Whether others need what the table would overwrite in its last block."""
        place, shared = divmod(table.num_tokens, self.block_size)
        if not shared or table.source is not None:
            return False
        tail = table.blocks[place]
        if tail.writer is not None:
            return tail.writer is not table
        return any(holder.num_tokens > table.num_tokens for holder in tail.holders)

    def _own_tail(self, table: BlockTable) -> None:
        """Make the table the writer of its partial tail, or of a block of its own in place of it."""
        place, valid = divmod(table.num_tokens, self.block_size)
        tail = table.blocks[place]
        if self._must_copy_tail(table):
            # The source stays held, and resident, until the step that copies it has ended well.
            table.source, table.copy_due = tail, True
            table.blocks[place] = self._fresh_block(table)
        elif tail.writer is not table and table.source is None:
            tail.writer = table
            self._cut(tail, valid)

    def _cut(self, block: Block, valid_len: int) -> None:
        """Only ``valid_len`` positions of the block count from here on: steps overwrite what lies behind."""
        with _Transition(self, block, Event.CUT):
            self._forget(block)
            for slot in (block.device, block.host):
                if slot is not None:
                    slot.valid_len = min(slot.valid_len, valid_len)
            if block.copy is not None:
                # It may read what those steps write.
                block.copy = block.copy._replace(valid_len=min(block.copy.valid_len, valid_len))

    def commit(self, table: BlockTable, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Positions up to ``num_tokens`` are computed and their tokens confirmed."""
        size = self.block_size
        first, done = table.num_tokens // size, num_tokens // size
        for i in range(first, self.blocks_for(num_tokens)):
            block = table.blocks[i]
            if block.device is None:
                raise RuntimeError("a step was committed to a block that is not on the device")
            with _Transition(self, block, Event.COMMIT):
                block.device.valid_len = min(size, num_tokens - i * size)
        table.num_tokens = num_tokens
        if table.source is not None:
            source, table.source = table.source, None
            self._let_go(source, table)
        if self.hasher is not None and done > first:
            self.hasher.extend(table.keys, table.root, token_ids, done)
            for i in range(first, done):
                if self._index.add(table.keys[i], table.blocks[i]):
                    table.blocks[i].key = table.keys[i]

    def park(self, table: BlockTable) -> None:
        """Only its client can want this table back, and may never do so: where the host tier is full, the
        tables parked longest ago give up their tails to those that will run by themselves.
        """
        self._parked[table] = None

    def unpark(self, table: BlockTable) -> None:
        """Its client wants it back."""
        self._parked.pop(table, None)

    def suspend(self, table: BlockTable) -> None:
        """Let go of the device: dirty blocks are written back, and each slot is free once it is clean.

        Where the host tier has no room the table loses its tail (see ``take_truncated``). What a step in
        flight computes for this table is lost; its blocks wait for that step.
        """
        self.trim(table)
        table.resident = False
        table.loading = 0
        blocks = list(table.blocks)
        for block in blocks:
            self._retire_writer(block, table)
            block.resident -= 1
            block.fence = max(block.fence, table.fence)
            # Their own copies must not be dropped to make room for one another's.
            self._unlist(block)
        for block in blocks:
            self._settle(block)

    def resume(self, table: BlockTable) -> None:
        """Make a table resident again; blocks that left the device start to load.

        The caller has asked ``has_room``. ``is_ready`` turns true when all have arrived.
        """
        table.resident = True
        self.unpark(table)
        # From the tail, so that of the copies that the host still holds the head's are dropped last.
        for block in reversed(table.blocks):
            block.resident += 1
            self._settle(block)
        for block in table.blocks:
            if block.device is None:
                self._load(block)
            if block.copy is not None and not block.copy.to_host:
                table.loading += 1

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """A new table, not resident, that shares the first ``num_tokens`` positions in the tier they lie in.

        At most as many as are valid; ``num_tokens`` of the child says how many it got. The last block may
        be shared in part: whichever of its holders has to write where another needs what is there copies
        it first (see ``reserve``). The parent may be running, loading, suspended or parked, and goes on as
        if nothing had happened; it may be released before the child ever runs.
        """
        num_tokens = min(num_tokens, table.num_tokens)
        shared = table.blocks[: self.blocks_for(num_tokens)]
        if table.source is not None and num_tokens > table.num_tokens // self.block_size * self.block_size:
            # The parent's own tail is still to be filled.
            shared[-1] = table.source
        child = BlockTable(table.root, shared, num_tokens, keys=table.keys[: num_tokens // self.block_size])
        for block in child.blocks:
            block.holders[child] = None
        return child

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Cut a table to ``num_tokens`` positions, or leave it where it has no more.

        For a stop string found behind what the engine has computed, or a branch at an offset. The last
        block stays valid to there for this table, whoever else holds it further; the next to write behind
        it does so as after a ``fork``. What steps in flight compute for this table is lost, so the caller
        drops their results, and sets up its row anew.
        """
        self.trim(table)
        # Also of positions that are not computed yet: their tokens may turn out otherwise.
        del table.keys[num_tokens // self.block_size :]
        if num_tokens >= table.num_tokens:
            return
        keep = self.blocks_for(num_tokens)
        gone = table.blocks[keep:]
        del table.blocks[keep:]
        table.num_tokens = num_tokens
        for block in gone:
            self._detach(block, table)
        if num_tokens % self.block_size:
            self._retire_writer(table.blocks[-1], table)
        # Only now that the table is consistent again: settling a block may cost a parked table its tail.
        for block in reversed(gone):
            self._settle(block)

    def release(self, table: BlockTable) -> None:
        """The sequence is over, or will compute everything again. Known prefixes stay while there is room."""
        blocks = table.blocks if table.source is None else [*table.blocks, table.source]
        table.blocks, table.num_tokens, table.source, table.copy_due = [], 0, None, False
        # From the tail, so that the head of a prefix, of more use to others, is evicted last.
        for block in reversed(blocks):
            self._let_go(block, table)
        table.resident = False
        table.loading = 0
        self.unpark(table)
        self._truncated.pop(table, None)

    def distrust(self, table: BlockTable) -> None:
        """Nobody else may begin with these blocks: what was computed from them was not finite."""
        for block in table.blocks:
            self._forget(block)

    def trim(self, table: BlockTable) -> None:
        """Give back what was reserved behind the valid positions, as after a failed step.

        Also a tail of its own that no step has filled: the table shares its source again.
        """
        if table.source is not None:
            place = table.num_tokens // self.block_size
            unfilled, table.blocks[place] = table.blocks[place], table.source
            table.source, table.copy_due = None, False
            self._let_go(unfilled, table)
        keep = self.blocks_for(table.num_tokens)
        for block in table.blocks[keep:]:
            self._let_go(block, table)
        del table.blocks[keep:]

    def is_written(self, table: BlockTable) -> bool:
        """Whether giving the table's device slots away would lose nothing."""
        return all(block.device is None or block.is_clean or block.resident > 0 for block in table.blocks)

    def take_truncated(self) -> KeysView[BlockTable]:
        """Tables that lost their tail since the last call; ``num_tokens`` says what is left of each."""
        truncated, self._truncated = self._truncated, {}
        return truncated.keys()

    # Steps and copies

    def launched(self, table: BlockTable, step_id: int) -> list[tuple[int, int]]:
        """A step that may read and write this table's device slots is on its way.

        Returns the (source, target) device slots that it has to copy before it computes.
        """
        table.fence = step_id
        if not table.copy_due or table.source is None:
            return []
        table.copy_due = False
        source, target = table.source.device, table.blocks[table.num_tokens // self.block_size].device
        if source is None or target is None:
            raise RuntimeError("a shared block is to be copied on a device that does not hold it")
        return [(source.index, target.index)]

    def collected(self, step_id: int) -> None:
        """That step and all before it have ended, well or not."""
        self._collected = step_id
        for block in [b for b in self._draining if b.copy is None and b.fence <= step_id]:
            self._settle(block)

    def flush(self) -> None:
        """Hand the copies ordered since the last call to the copy engine, as one batch."""
        if self._outbox:
            self._transfer.submit(self._outbox)
            self._outbox = []

    def poll(self) -> None:
        """Take in the copies that have ended."""
        for ticket, ok in self._transfer.poll():
            # A ticket that nobody knows has been reported before; its slots may be somebody else's now.
            block = self._copies.pop(ticket, None)
            if block is None or block.copy is None:
                continue
            if block.copy.to_host:
                self._end_write_back(block, block.copy, ok)
            else:
                self._end_load(block, block.copy, ok)
            self._settle(block)

    def _write_back(self, block: Block, source: Slot) -> None:
        index = block.host.index if block.host is not None else self._take_host(block)
        if index is None:
            self._lose(block)
            return
        with _Transition(self, block, Event.WRITE_BACK):
            block.host = Slot(index)
            self._order(block, to_host=True, valid_len=source.valid_len)
        self._settle(block)

    def write_ahead(self, blocks: Iterable[Block], most: int) -> int:
        """Copy up to ``most`` of these dirty blocks to the host before anybody has to wait for it.

        Takes only host slots that are free, or hold the one copy of a prefix used longer ago: to drop a
        copy of what stands next in line itself would go round in circles. How many copies were ordered.
        """
        ordered = 0
        for block in blocks:
            oldest = next(iter(self._host_prefixes), None)
            if ordered == most or not (self.host.num_free or (oldest and oldest.device is None)):
                break
            source, idle = block.device, block.copy is None and block.failures < MAX_COPY_FAILURES
            if source is not None and source.valid_len and idle and not block.is_clean:
                self._write_back(block, source)
                ordered += 1
        return ordered

    def demote_prefixes(self, most: int) -> int:
        """Write ahead those of the next prefixes to be evicted that have been of use before."""
        next_to_go = list(islice(self._evictable, most))
        return self.write_ahead((block for block in next_to_go if block.hits), most)

    def _end_write_back(self, block: Block, copy: Copy, ok: bool) -> None:
        with _Transition(self, block, Event.COPIED_OUT if ok else Event.COPY_OUT_FAILED):
            block.copy = None
            if ok and block.host is not None:
                block.host.valid_len = copy.valid_len
                block.failures = 0
                self.copied_out += 1
            else:
                block.failures += 1
                self._give_host(block)

    def _load(self, block: Block) -> None:
        if block.host is None:
            raise RuntimeError("a block with no content in either tier cannot be loaded")
        with _Transition(self, block, Event.LOAD):
            block.device = Slot(self._take_device())
            self._order(block, to_host=False, valid_len=block.host.valid_len)
        self._settle(block)

    def _end_load(self, block: Block, copy: Copy, ok: bool) -> None:
        with _Transition(self, block, Event.COPIED_IN if ok else Event.COPY_IN_FAILED):
            block.copy = None
            if ok and block.device is not None:
                block.device.valid_len = copy.valid_len
                self.copied_in += 1
            else:
                # Nobody else can have used the slot: fences concern steps, and none may run before this.
                self._give_device(block)
                self._give_host(block)
        for holder in block.holders:
            if holder.resident:
                holder.loading -= 1
        if not ok:
            self._forget(block)
            self._lose(block)

    def _order(self, block: Block, *, to_host: bool, valid_len: int) -> None:
        if block.device is None or block.host is None:
            raise RuntimeError("a copy needs a slot in each tier")
        block.copy = Copy(self._next_ticket, to_host, valid_len)
        self._copies[self._next_ticket] = block
        self._outbox.append(CopyOp(self._next_ticket, to_host, block.device.index, block.host.index))
        self._next_ticket += 1

    # Slots

    def _take_device(self) -> int:
        if self.device.num_free == 0:
            # A prefix that nobody holds goes before the blocks of a sequence that is sure to come back.
            queue = self._evictable or self._evictable_parked
            self._evict(next(iter(queue)))
        return self.device.take()

    def _take_host(self, block: Block) -> int | None:
        """A host slot for the block; unless it is itself parked, also at the cost of those that are."""
        may_displace = any(holder not in self._parked for holder in block.holders)
        while self.host.num_free == 0:
            # Prefixes first; then copies of blocks that are on the device as well.
            queue = self._host_prefixes or self._host_mirrors
            if queue:
                self._drop_host(next(iter(queue)))
            elif may_displace and self._parked:
                self._drop_tail(next(iter(self._parked)))
            else:
                return None
        return self.host.take()

    def _drop_host(self, block: Block) -> None:
        with _Transition(self, block, Event.DROP_HOST):
            self._give_host(block)
        if block.device is None:
            self._forget(block)
        self._settle(block)

    def _drop_tail(self, table: BlockTable) -> None:
        """A parked table gives up its last block; what lies before it stays of use."""
        if not table.blocks:
            self.unpark(table)
            return
        block = table.blocks.pop()
        table.num_tokens = min(table.num_tokens, len(table.blocks) * self.block_size)
        self._truncated[table] = None
        del block.holders[table]
        # Nothing changes for others who hold it: the table was not resident.
        if not block.holders:
            self._settle(block)

    def _evict(self, block: Block) -> None:
        with _Transition(self, block, Event.EVICT):
            if not block.is_clean:
                self._give_host(block)
            self._give_device(block)
        if block.host is None:
            self._forget(block)
        self._settle(block)

    def _give_device(self, block: Block) -> None:
        if block.device is not None:
            self.device.give(block.device.index)
            block.device = None

    def _give_host(self, block: Block) -> None:
        if block.host is not None:
            self.host.give(block.host.index)
            block.host = None

    # Holding and losing

    def _let_go(self, block: Block, table: BlockTable) -> None:
        """The table no longer holds the block; the caller takes it out of ``table.blocks``."""
        self._detach(block, table)
        self._settle(block)

    def _detach(self, block: Block, table: BlockTable) -> None:
        """Take a holder from a block; the caller settles it."""
        self._unlist(block)
        self._retire_writer(block, table)
        block.holders.pop(table, None)
        if table.resident:
            block.resident -= 1
            block.fence = max(block.fence, table.fence)
            if block.copy is not None and not block.copy.to_host:
                table.loading -= 1

    @staticmethod
    def _retire_writer(block: Block, table: BlockTable) -> None:
        if block.writer is table:
            block.writer = None

    def _lose(self, block: Block) -> None:
        """The block's content is lost to all who hold it: each keeps what lies before it."""
        lost: list[Block] = []
        for table in list(block.holders):
            keep = table.blocks.index(block)
            for gone in table.blocks[keep:]:
                self._detach(gone, table)
                lost.append(gone)
            del table.blocks[keep:]
            table.num_tokens = min(table.num_tokens, keep * self.block_size)
            self._truncated[table] = None
        # Only now that every table is consistent again: settling one block may lose another.
        for gone in reversed(lost):
            self._settle(gone)

    def _forget(self, block: Block) -> None:
        if block.key is not None:
            self._index.remove(block.key)
            block.key = None

    def _unlist(self, block: Block) -> None:
        """Nothing may be taken from a block between a change of its holders and ``_settle``."""
        for queue in (self._evictable, self._evictable_parked, self._host_prefixes, self._host_mirrors):
            queue.pop(block, None)

    def _settle(self, block: Block) -> None:
        """Decide what a block's slots are good for now, from its slots and holders alone.

        Called after every change of a block; the only place that puts it on a list: *draining* (its device
        slot comes free by itself), *evictable* and *evictable parked* (it may be taken: nobody's, or one
        of a sequence that will load it again), *host prefixes* and *host mirrors* (its host slot may be
        taken: nobody's, or a copy of what a running sequence has on the device).
        """
        self._unlist(block)
        fenced = block.fence > self._collected
        if block.resident == 0 and block.device is not None and (block.copy is not None or fenced):
            self._draining[block] = None
            return
        self._draining.pop(block, None)
        if block.copy is not None:
            return
        if block.resident:
            if block.host is not None:
                self._host_mirrors[block] = None
        elif not block.holders and block.key is None:
            if block.device is not None or block.host is not None:
                with _Transition(self, block, Event.DISCARD):
                    self._give_device(block)
                    self._give_host(block)
        elif not block.holders:
            if block.device is not None:
                self._evictable[block] = None
            if block.host is not None:
                self._host_prefixes[block] = None
        elif block.device is not None and not block.is_clean:
            if block.failures < MAX_COPY_FAILURES:
                self._write_back(block, block.device)
            else:
                # It may live on as a known prefix, whose next holder deserves a try of its own.
                block.failures = 0
                self._lose(block)
        elif block.device is not None:
            self._evictable_parked[block] = None

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Walk everything and compare; raises ``RuntimeError`` that says what is off.

        ``tables`` are all tables that are not released.
        """
        blocks: set[Block] = {*self._index.values(), *self._copies.values(), *self._draining}
        holders: dict[Block, set[BlockTable]] = {}
        for table in tables:
            held = table.blocks if table.source is None else [*table.blocks, table.source]
            blocks.update(held)
            for block in held:
                holders.setdefault(block, set()).add(table)
            for i, block in enumerate(table.blocks):
                self._check_held(table, i, block)
            loading = sum(b.copy is not None and not b.copy.to_host for b in table.blocks)
            _require(table.loading == (loading if table.resident else 0), "a table's loads are miscounted")
            _require(not (table.resident and table in self._parked), "a resident table counts as parked")
        for block in blocks:
            _require(block.holders.keys() == holders.get(block, set()), "a block's holders are miscounted")
            _require(block.resident == sum(t.resident for t in block.holders), "a resident count is off")
            self._check_writer(block)
            self._check_lists(block)
        self.device.check_integrity(b.device.index for b in blocks if b.device is not None)
        self.host.check_integrity(b.host.index for b in blocks if b.host is not None)

    def _check_held(self, table: BlockTable, i: int, block: Block) -> None:
        needed = max(0, min(self.block_size, table.num_tokens - i * self.block_size))
        if table.source is not None and i == table.num_tokens // self.block_size:
            _require(table.resident and block.writer is table, "a copied tail is not its table's own")
            _require(len(block.holders) == 1, "a tail that is not filled yet is shared")
            block = table.source
        held = max((slot.valid_len for slot in (block.device, block.host) if slot is not None), default=-1)
        _require(held >= needed, "a table counts on positions that no slot holds")
        if table.resident:
            _require(block.device is not None, "a resident table's block is not on the device")
            if table.is_ready and block.device is not None:
                _require(block.device.valid_len >= needed, "a ready table's block is not valid on the device")

    def _check_writer(self, block: Block) -> None:
        writer = block.writer
        if writer is not None:
            _require(writer in block.holders and writer.resident, "a block's writer does not run")
            _require(block in writer.blocks, "a block is written by a table that copies it")
            end = (writer.blocks.index(block) + 1) * self.block_size
            most = max(holder.num_tokens for holder in block.holders)
            _require(writer.num_tokens >= min(end, most), "a block's writer overwrites what another needs")

    def _check_lists(self, block: Block) -> None:
        idle = block.resident == 0 and block.copy is None and block.fence <= self._collected
        takeable = block in self._evictable or block in self._evictable_parked
        _require(not takeable or (idle and block.device is not None), "a block in use counts as evictable")
        _require(block not in self._evictable_parked or block.is_clean, "a parked block has no copy")
        _require(not (takeable and block in self._draining), "a block stands on two lists")
        if block.device is not None and block.resident == 0:
            _require(takeable or block in self._draining, "a device slot is lost to everybody")
        if block.key is not None:
            _require(self._index.get(block.key) is block, "a block carries a key that is not its own")
            _require(
                any(s is not None and s.valid_len == self.block_size for s in (block.device, block.host))
                or block.copy is not None,
                "a known prefix block is not full",
            )


class _Transition:
    """Tells the manager's observer what one change made of a block."""

    __slots__ = ("_before", "_block", "_event", "_observer")

    def __init__(self, manager: BlockManager, block: Block, event: Event) -> None:
        self._observer = manager._observer
        self._block = block
        self._event = event

    def __enter__(self) -> None:
        if self._observer is not None:
            self._before = self._block.state

    def __exit__(self, *_: object) -> None:
        if self._observer is not None:
            self._observer(self._block, self._event, self._before, self._block.state)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise RuntimeError(text)
