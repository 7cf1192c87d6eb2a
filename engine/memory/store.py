"""All blocks and the slots of both tiers: who takes a slot from whom, and what a copy makes of a block.

Tables are here only as the holders of blocks: what happens to a sequence as a whole is in ``tiers.py``.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from tidegate.engine.memory.block import Block, BlockTable, Copy, Event, Observer, Slot, State
from tidegate.engine.memory.copies import CopyOp, Reason, Transfer
from tidegate.engine.memory.groups import KVGroup
from tidegate.engine.memory.parked import Parked
from tidegate.engine.memory.pool import BlockPool
from tidegate.engine.memory.prefix import PrefixIndex
from tidegate.engine.memory.shelves import Shelves
from tidegate.engine.memory.stats import THRASH_STEPS, MemoryStats

MAX_COPY_FAILURES = 3


class BlockStore:
    def __init__(
        self,
        *,
        kinds: Sequence[KVGroup],
        block_size: int,
        device_blocks: int,
        host_blocks: int,
        host_quota: int | None,
        transfer: Transfer,
        observer: Observer | None,
    ) -> None:
        self.block_size = block_size
        self.device = BlockPool(device_blocks)
        self.host = BlockPool(host_blocks)
        self.index: PrefixIndex[Block] = PrefixIndex(kinds, block_size)
        self.shelves = Shelves()
        self.parked = Parked(host_quota)
        self.copies: dict[int, Block] = {}
        """By ticket, the blocks under copy."""
        self.truncated: dict[BlockTable, None] = {}
        """Tables that lost their tail, until their owner asks."""
        self.last_collected = 0
        """The last step that has ended."""
        self.stats = MemoryStats()
        self._transfer = transfer
        self._observer = observer
        self._outbox: list[CopyOp] = []
        self._next_ticket = 1

    # What steps do to a block

    def fresh(self, table: BlockTable, group: int) -> Block:
        """A block with a device slot, held by a resident table that is to write to it."""
        block = Block(group, holders={table: None}, resident=1, writer=table)
        others = table.groups[group].blocks
        before = others[-1].device if others else None
        with _Transition(self, block, Event.RESERVE):
            block.device = Slot(self._take_device(None if before is None else before.index))
        return block

    def blocks(self, tables: Iterable[BlockTable]) -> set[Block]:
        """Every block with a slot, given all tables: theirs, known prefixes, and those on their way."""
        held = (block for table in tables for block in table.held)
        return {*held, *self.index.values(), *self.copies.values(), *self.shelves.draining}

    def commit(self, block: Block, valid_len: int) -> None:
        """A collected step made so many positions valid."""
        if block.device is None:
            raise RuntimeError("a step was committed to a block that is not on the device")
        if self._observer is None and block.host is None and block.device.valid_len:
            # Nearly always: one more position of a block that stays as dirty as it was.
            block.device.valid_len = valid_len
            return
        with _Transition(self, block, Event.COMMIT):
            block.device.valid_len = valid_len

    def cut(self, block: Block, valid_len: int) -> None:
        """Only so many positions of the block count from here on: steps overwrite what lies behind."""
        with _Transition(self, block, Event.CUT):
            self.forget(block)
            for slot in (block.device, block.host):
                if slot is not None:
                    slot.valid_len = min(slot.valid_len, valid_len)
            if block.copy is not None:
                # It may read what those steps write.
                block.copy = block.copy._replace(valid_len=min(block.copy.valid_len, valid_len))

    def collected(self, step_id: int) -> None:
        """That step and all before it have ended."""
        self.last_collected = step_id
        for block in [b for b in self.shelves.draining if b.copy is None and b.fence <= step_id]:
            self.settle(block)

    # Copies

    def flush(self) -> None:
        """Hand the copies ordered since the last call to the copy engine, as one batch."""
        if self._outbox:
            self._transfer.submit(self._outbox)
            self._outbox = []

    def poll(self) -> None:
        """Take in the copies that have ended."""
        for ticket, ok, seconds in self._transfer.poll():
            # A ticket that nobody knows has been reported before; its slots may be somebody else's now.
            block = self.copies.pop(ticket, None)
            if block is None or block.copy is None:
                continue
            if block.copy.to_host:
                self.stats.seconds_out += seconds
                self._end_write_back(block, block.copy, ok)
            else:
                self.stats.seconds_in += seconds
                self._end_load(block, block.copy, ok)
            self.settle(block)

    def write_ahead(self, blocks: Iterable[Block], most: int, reason: Reason) -> int:
        """Write back up to ``most`` of these dirty blocks; how many copies were ordered.

        Takes only host slots that are free, or hold the one copy of a prefix used longer ago: to drop a
        copy of what stands next in line itself would go round in circles.
        """
        ordered = 0
        for block in blocks:
            oldest = next(iter(self.shelves.host_prefixes), None)
            if ordered == most or not (self.host.num_free or (oldest and oldest.device is None)):
                break
            source, idle = block.device, block.copy is None and block.failures < MAX_COPY_FAILURES
            if source is not None and source.valid_len and idle and not block.is_clean:
                self._write_back(block, source, reason)
                ordered += 1
        return ordered

    def demote_prefixes(self, most: int) -> int:
        """Write ahead those of the next prefixes to be evicted that have been of use before."""
        next_to_go = list(islice(self.shelves.evictable, most))
        return self.write_ahead((block for block in next_to_go if block.hits), most, Reason.DEMOTE)

    def load(self, block: Block, reason: Reason) -> None:
        """Start to bring a block to the device that only the host has."""
        if block.host is None:
            raise RuntimeError("a block with no content in either tier cannot be loaded")
        with _Transition(self, block, Event.LOAD):
            block.device = Slot(self._take_device())
            self._order(block, to_host=False, valid_len=block.host.valid_len, reason=reason)
        if block.evicted_at is not None and self.last_collected - block.evicted_at <= THRASH_STEPS:
            self.stats.thrash += 1
        block.evicted_at = None
        self.settle(block)

    def _write_back(self, block: Block, source: Slot, reason: Reason) -> None:
        index = block.host.index if block.host is not None else self._take_host(block)
        if index is None:
            self._lose(block)
            return
        with _Transition(self, block, Event.WRITE_BACK):
            block.host = Slot(index)
            self._order(block, to_host=True, valid_len=source.valid_len, reason=reason)
        self.settle(block)

    def _order(self, block: Block, *, to_host: bool, valid_len: int, reason: Reason) -> None:
        if block.device is None or block.host is None:
            raise RuntimeError("a copy needs a slot in each tier")
        block.copy = Copy(self._next_ticket, to_host, valid_len, reason)
        self.copies[self._next_ticket] = block
        self._outbox.append(CopyOp(self._next_ticket, to_host, block.device.index, block.host.index))
        self._next_ticket += 1

    def _end_write_back(self, block: Block, copy: Copy, ok: bool) -> None:
        with _Transition(self, block, Event.COPIED_OUT if ok else Event.COPY_OUT_FAILED):
            block.copy = None
            if ok and block.host is not None:
                block.host.valid_len = copy.valid_len
                block.failures = 0
                self.stats.copied_out[copy.reason] += 1
            else:
                block.failures += 1
                self.stats.failed_copies += 1
                self._give_host(block)

    def _end_load(self, block: Block, copy: Copy, ok: bool) -> None:
        with _Transition(self, block, Event.COPIED_IN if ok else Event.COPY_IN_FAILED):
            block.copy = None
            if ok and block.device is not None:
                block.device.valid_len = copy.valid_len
                self.stats.copied_in[copy.reason] += 1
            else:
                # Nobody else can have used the slot: fences concern steps, and none may run before this.
                self.stats.failed_copies += 1
                self._give_device(block)
                self._give_host(block)
        for holder in block.holders:
            if holder.resident:
                holder.loading -= 1
        if not ok:
            self.forget(block)
            self._lose(block)

    # Slots

    def make_free(self, num_blocks: int) -> None:
        """Evict until so many device slots are free: taken together, they may lie together."""
        while self.device.num_free < num_blocks:
            self._evict(self.shelves.next_on_device())

    def _take_device(self, after: int | None = None) -> int:
        self.make_free(1)
        return self.device.take(after)

    def _take_host(self, block: Block) -> int | None:
        """A host slot for the block, at the cost of what comes after it; None where nothing does."""
        while self.host.num_free == 0:
            spare = self.shelves.next_on_host()
            if spare is not None:
                self._drop_host(spare)
            elif (table := self.parked.victim(block)) is not None:
                self._drop_tail(table)
            else:
                return None
        return self.host.take()

    def _drop_host(self, block: Block) -> None:
        with _Transition(self, block, Event.DROP_HOST):
            self._give_host(block)
        if block.device is None:
            self.forget(block)
        self.settle(block)

    def _drop_tail(self, table: BlockTable) -> None:
        """A parked table gives up its last blocks; what lies before them stays of use."""
        gone = self._shorten(table, table.end - 1)
        self.truncated[table] = None
        for block in gone:
            del block.holders[table]
        for block in gone:
            # Nothing changes for others who hold it: the table was not resident.
            if not block.holders:
                self.settle(block)

    def _shorten(self, table: BlockTable, length: int) -> list[Block]:
        """Take the blocks from number ``length`` on out of the table, or all where windows need what is gone;
        the caller detaches and settles them.
        """
        num_tokens = table.reach(min(table.num_tokens, length * self.block_size), self.block_size)
        gone = self.take_out(table, length if num_tokens else 0)
        table.num_tokens = num_tokens
        self.parked.lost(table, gone)
        return gone

    @staticmethod
    def take_out(table: BlockTable, length: int) -> list[Block]:
        """Leave the table the blocks before number ``length``; those behind it, which it held so far."""
        gone: list[Block] = []
        for group in table.groups:
            keep = max(0, length - group.start)
            gone += group.blocks[keep:]
            del group.blocks[keep:]
            if length == 0:
                group.start = 0
        return gone

    def _evict(self, block: Block) -> None:
        with _Transition(self, block, Event.EVICT):
            if not block.is_clean:
                self._give_host(block)
            self._give_device(block)
        block.evicted_at = self.last_collected
        if block.host is None:
            self.forget(block)
        self.settle(block)

    def _give_device(self, block: Block) -> None:
        if block.device is not None:
            self.device.give(block.device.index)
            block.device = None

    def _give_host(self, block: Block) -> None:
        if block.host is not None:
            self.host.give(block.host.index)
            block.host = None

    # Holding and losing

    def let_go(self, block: Block, table: BlockTable) -> None:
        """The table no longer holds the block; the caller takes it out of ``table.blocks``."""
        self.detach(block, table)
        self.settle(block)

    def detach(self, block: Block, table: BlockTable) -> None:
        """Take a holder from a block; the caller settles it."""
        self.shelves.take_off(block)
        self.retire_writer(block, table)
        block.holders.pop(table, None)
        if table.resident:
            block.resident -= 1
            block.fence = max(block.fence, table.fence)
            if block.copy is not None and not block.copy.to_host:
                table.loading -= 1

    @staticmethod
    def retire_writer(block: Block, table: BlockTable) -> None:
        """Steps of the table no longer write to the block."""
        if block.writer is table:
            block.writer = None

    def _lose(self, block: Block) -> None:
        """The block's content is lost to all who hold it: each keeps what lies before it."""
        lost: list[Block] = []
        for table in list(block.holders):
            group = table.groups[block.group]
            gone = self._shorten(table, group.start + group.blocks.index(block))
            for after in gone:
                self.detach(after, table)
            lost += gone
            self.truncated[table] = None
        # Only now that every table is consistent again: settling one block may lose another.
        for after in reversed(lost):
            self.settle(after)

    def forget(self, block: Block) -> None:
        """The block is no known prefix any more."""
        if block.key is not None:
            self.index.remove(block.group, block.key)
            block.key = None

    def forget_prefixes(self, *, device: bool, host: bool) -> tuple[int, int]:
        """Give up known prefixes that nobody holds, in these tiers; the slots that this frees in each."""
        before = self.device.num_free, self.host.num_free
        if device:
            for block in list(self.shelves.evictable):
                self._evict(block)
        if host:
            for block in list(self.shelves.host_prefixes):
                self._drop_host(block)
        return self.device.num_free - before[0], self.host.num_free - before[1]

    def settle(self, block: Block) -> None:
        """Decide what a block's slots are good for now, from its slots and holders alone.

        Called after every change of a block. It puts the block on the shelves where it belongs, and starts
        what a block needs that is of no more use, or cannot leave the device yet.
        """
        shelves = self.shelves
        shelves.take_off(block)
        fenced = block.fence > self.last_collected
        if block.resident == 0 and block.device is not None and (block.copy is not None or fenced):
            shelves.draining[block] = None
            return
        shelves.draining.pop(block, None)
        if block.copy is not None:
            return
        if block.resident:
            if block.host is not None:
                shelves.host_mirrors[block] = None
        elif not block.holders and block.key is None:
            if block.device is not None or block.host is not None:
                with _Transition(self, block, Event.DISCARD):
                    self._give_device(block)
                    self._give_host(block)
        elif not block.holders:
            if block.device is not None:
                shelves.evictable[block] = None
            if block.host is not None:
                shelves.host_prefixes[block] = None
        elif block.device is not None and not block.is_clean:
            if block.failures < MAX_COPY_FAILURES:
                parked = all(holder in self.parked for holder in block.holders)
                self._write_back(block, block.device, Reason.PARK if parked else Reason.PREEMPT)
            else:
                # It may live on as a known prefix, whose next holder deserves a try of its own.
                block.failures = 0
                self._lose(block)
        elif block.device is not None:
            shelves.evictable_parked[block] = None


class _Transition:
    """Counts what one change makes of a block, and tells the observer."""

    __slots__ = ("_before", "_block", "_event", "_store")

    def __init__(self, store: BlockStore, block: Block, event: Event) -> None:
        self._store = store
        self._block = block
        self._event = event

    def __enter__(self) -> None:
        self._before: State = self._block.state

    def __exit__(self, *_: object) -> None:
        after, observer = self._block.state, self._store._observer
        self._store.stats.moved(self._before, after)
        if observer is not None:
            observer(self._block, self._event, self._before, after)
