"""The block manager: what sequences have in the two tiers, and what may become of it.

A **table** lists a sequence's blocks, for each KV group apart (see ``block.py``, ``groups.py``). While it is
*resident* its blocks stay on the device and steps may read and write them; while it is not, they are kept
(class S: somebody will come back for them) but their device slots are anybody's as soon as the host holds a
copy. Blocks that no table holds are kept as long as there is room (class P: a prefix that may be used again).

Tables may share a block, its last one too. They agree on as many of its positions as each of them
counts; behind those one of them, the block's *writer*, may go on. Any other that has to write there takes
a block of its own first, and a step copies into it what is shared (copy on write, ``tails.py``).

A group with a window lets go of blocks that no later position of the sequence sees anything of, but for the
last of them (``KEPT_BLOCKS``). They leave the table as all blocks do, through its fence, and may live on as
known prefixes. A table has nothing to go back to behind them: cut further back, it has nothing left.

Three things keep a slot from being reused under somebody's hands. A *resident* count: tables that
steps may use. A *copy* in flight: one a block at most. A *fence*: the last step that was launched with
the slot in a table; slots go back to their pool only when that step has been collected.

Where a tier is full it is the least missed that goes: on the device known prefixes before sequences that
left it; in the host tier prefixes, then copies of what is on the device, then parked tables
(``parked.py``). A sequence that is to run again by itself is the last to lose anything.

No torch here: copies are somebody else's work (``transfer.py``), and so the whole state machine runs in
simulation.
"""

from collections.abc import Callable, Iterable, KeysView, Sequence

from tidegate.engine.memory import tails
from tidegate.engine.memory.block import Block, BlockTable, GroupTable, Observer, State
from tidegate.engine.memory.copies import Reason, Transfer
from tidegate.engine.memory.groups import FULL_ATTENTION, KVGroup, most_blocks
from tidegate.engine.memory.integrity import check_integrity
from tidegate.engine.memory.prefix import BlockHasher, Prefix
from tidegate.engine.memory.stats import MIN_PREEMPTED
from tidegate.engine.memory.store import BlockStore


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
        groups: Sequence[KVGroup] = FULL_ATTENTION,
        most_uncommitted: int = 0,
        host_ready: Callable[[], int] | None = None,
        host_quota: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        """``hasher`` None: no prefix is ever shared. ``most_uncommitted``: positions that a sequence takes in
        all steps in flight, which groups with a window need room for. ``host_ready`` tells how many of the
        host's blocks can be used by now, from the first; None: all of them. ``host_quota``: blocks that each
        tenant may have parked before it is the first to lose some. ``observer`` is told of every transition.
        """
        self.block_size = block_size
        self.hasher = hasher
        self.groups = tuple(groups)
        self._most_uncommitted = most_uncommitted
        self._has_windows = any(group.window is not None for group in groups)
        self._store = BlockStore(
            kinds=self.groups,
            block_size=block_size,
            device_blocks=device_blocks,
            host_blocks=host_blocks if host_ready is None else min(host_blocks, host_ready()),
            host_quota=host_quota,
            transfer=transfer,
            observer=observer,
        )
        self.device = self._store.device
        self.host = self._store.host
        self.stats = self._store.stats
        self._host_blocks = host_blocks
        self._host_ready = host_ready

    # What there is room for

    @property
    def num_available(self) -> int:
        """Device slots to be had at once: free ones, and those of blocks that nobody needs there."""
        return self.device.num_free + self.num_reclaimable

    @property
    def num_reclaimable(self) -> int:
        return self._store.shelves.num_on_device

    @property
    def num_draining(self) -> int:
        """Device slots that come free by themselves, when a copy ends or a step is collected."""
        return len(self._store.shelves.draining)

    @property
    def num_host_available(self) -> int:
        """Host slots to be had without dropping anything that a sequence will come back for."""
        return self.host.num_free + self.num_host_reclaimable

    def has_host_room(self, num_blocks: int) -> bool:
        """Whether the host tier takes so many blocks of a sequence that goes on by itself.

        What only parked tables hold makes way for it: leases above all, which may never be wanted again.
        """
        missing = num_blocks - self.num_host_available
        return missing <= 0 or self._store.parked.can_free(missing)

    @property
    def num_host_reclaimable(self) -> int:
        return self._store.shelves.num_on_host

    @property
    def num_copies(self) -> tuple[int, int]:
        """Copies in flight to the host, and from it."""
        copies = [block.copy for block in self._store.copies.values() if block.copy is not None]
        out = sum(copy.to_host for copy in copies)
        return out, len(copies) - out

    @property
    def copies_in_flight(self) -> int:
        return len(self._store.copies)

    def num_parked(self, tenant: str) -> int:
        """Blocks of the tenant's parked tables, shared ones once."""
        return self._store.parked.num_blocks(tenant)

    def blocks(self, tables: Iterable[BlockTable]) -> set[Block]:
        """All blocks with a slot, given all tables that are not released."""
        return self._store.blocks(tables)

    def blocks_for(self, num_tokens: int) -> int:
        """In each group, those that have left its window included."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, num_tokens: int) -> int:
        """What a sequence that grows to ``num_tokens`` holds in all groups, at the most."""
        return most_blocks(self.groups, num_tokens, self._most_uncommitted, self.block_size)

    def has_room(self, blocks: Sequence[Block], extra: int) -> bool:
        """Whether these blocks fit on the device together, and ``extra`` fresh ones beside them."""
        missing = sum(block.device is None for block in blocks)
        counted_twice = sum(self._store.shelves.is_takeable(block) for block in blocks)
        return missing + extra <= self.num_available - counted_twice

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Fresh blocks that the table takes to hold ``[0, num_tokens)``, copies of shared tails included."""
        growth = max(0, self.blocks_for(num_tokens) - table.end) * len(self.groups)
        return growth + (tails.num_to_copy(table, self.block_size) if num_tokens > table.num_tokens else 0)

    def num_to_come(self, table: BlockTable, start: Prefix[Block], num_tokens: int) -> int:
        """Fresh blocks that the table is to take, one step after the other, until it has ``num_tokens``.

        As ``num_missing``, but a group with a window lets go of blocks on the way. ``start``: what the table
        holds, or will begin with.
        """
        size, missing = self.block_size, 0
        for kind, held in zip(self.groups, start.groups, strict=True):
            most = kind.most_blocks(num_tokens, self._most_uncommitted, size)
            missing += max(0, min(self.blocks_for(num_tokens) - start.length, most - len(held)))
        return missing + (tails.num_to_copy(table, self.block_size) if num_tokens > table.num_tokens else 0)

    # The life of a table

    def new_table(self, tenant: str) -> BlockTable:
        root = self.hasher.root(tenant) if self.hasher is not None else b""
        return BlockTable(tenant, root, tuple(GroupTable(kind) for kind in self.groups))

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> Prefix[Block]:
        """Known blocks that a table with a prefix of ``token_ids`` would hold; nothing changes.

        Never all of the tokens: the last one must be computed to give logits, and computing it inside
        a shared block would write to what others read.
        """
        if self.hasher is None:
            return self._store.index.longest(())
        limit = (len(token_ids) - 1) // self.block_size
        self.hasher.extend(table.keys, table.root, token_ids, limit)
        return self._store.index.longest(table.keys[:limit])

    def start_of(self, table: BlockTable, token_ids: Sequence[int]) -> Prefix[Block]:
        """What a table goes on from that is not resident: its own blocks, or without any a known prefix."""
        if table.end:
            return Prefix(table.end, tuple(group.blocks for group in table.groups))
        return self.find_prefix(table, token_ids)

    def adopt(self, table: BlockTable, known: Prefix[Block]) -> None:
        """Start an empty table with what ``find_prefix`` found, and make it resident.

        The caller has asked ``has_room``. Host-only blocks start to load.
        """
        for group, blocks in zip(table.groups, known.groups, strict=True):
            group.start = known.length - len(blocks)
            group.blocks.extend(blocks)
            for block in blocks:
                block.holders[table] = None
                block.hits += 1
        table.num_tokens = known.length * self.block_size
        self.stats.host_hits_prefix += self._make_resident(table, Reason.PREFIX)

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Let steps of a resident table write ``[table.num_tokens, num_tokens)``; False without room.

        A tail that others need as it is gets replaced by a block of the table's own, which the next step
        must fill first: ``launched`` says from which slot.
        """
        if num_tokens <= table.end * self.block_size and tails.owns_tail(table, self.block_size):
            # Nearly always: one more position in blocks that the table has written to before.
            return True
        missing = self.num_missing(table, num_tokens)
        if missing > self.num_available:
            return False
        self._store.make_free(missing)
        if num_tokens > table.num_tokens:
            tails.own_tail(self._store, table)
        end = self.blocks_for(num_tokens)
        for number, group in enumerate(table.groups):
            while group.end < end:
                group.blocks.append(self._store.fresh(table, number))
        return True

    def commit(self, table: BlockTable, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Positions up to ``num_tokens`` are computed and their tokens confirmed."""
        size, store = self.block_size, self._store
        first, done = table.num_tokens // size, num_tokens // size
        tail = num_tokens - done * size
        table.num_tokens = num_tokens
        for group in table.groups:
            for i in range(first, done):
                store.commit(group.at(i), size)
            if tail:
                store.commit(group.blocks[done - group.start], tail)
            if group.source is not None:
                source, group.source = group.source, None
                store.let_go(source, table)
        if done > first and self.hasher is not None:
            self.hasher.extend(table.keys, table.root, token_ids, done)
            for number, group in enumerate(table.groups):
                for i in range(first, done):
                    if store.index.add(number, table.keys[i], group.at(i)):
                        group.at(i).key = table.keys[i]
        if self._has_windows:
            for group in table.groups:
                self._leave_behind(table, group)

    def _leave_behind(self, table: BlockTable, group: GroupTable) -> None:
        """Let go of [start, kept_from): no position from here on sees anything of these blocks.

        Nor do steps under way, which begin here or later. They were launched with the table all the same, and
        the fence holds the slots until they have ended, as with all that a table lets go of.
        """
        keep = group.kind.kept_from(table.num_tokens, self.block_size) - group.start
        if keep > 0:
            gone = group.blocks[:keep]
            del group.blocks[:keep]
            group.start += keep
            for block in gone:
                self._store.detach(block, table)
            for block in gone:
                self._store.settle(block)

    def park(self, table: BlockTable) -> None:
        """Only its client can want this table back, and may never do so: where the host tier is full it
        makes way for those that will run by themselves, in the order of ``parked.py``.

        For a sequence without credit and for one that has ended under a lease. ``suspend`` it beside: its
        blocks drain to the host then, and whatever is written may leave the device. What steps in flight
        compute for it is lost.
        """
        self.trim(table)
        self._store.parked.add(table)

    def unpark(self, table: BlockTable) -> None:
        """Its client wants it back."""
        self._store.parked.remove(table)

    def suspend(self, table: BlockTable) -> None:
        """Let go of the device: dirty blocks are written back, and each slot is free once it is clean.

        Where the host tier has no room the table loses its tail (see ``take_truncated``). What a step in
        flight computes for this table is lost; its blocks wait for that step.
        """
        self.trim(table)
        table.resident = False
        table.loading = 0
        blocks, store = list(table.blocks), self._store
        full = table.full_blocks(self.block_size)
        if table not in store.parked and len(full) >= MIN_PREEMPTED:
            self.stats.preempted_full += len(full)
            self.stats.preempted_clean += sum(block.is_clean for block in full)
        for block in blocks:
            store.retire_writer(block, table)
            block.resident -= 1
            block.fence = max(block.fence, table.fence)
            # Their own copies must not be dropped to make room for one another's.
            store.shelves.take_off(block)
        for block in blocks:
            store.settle(block)

    def resume(self, table: BlockTable) -> None:
        """Make a table resident again; blocks that left the device start to load.

        The caller has asked ``has_room``. ``is_ready`` turns true when all have arrived.
        """
        self.unpark(table)
        self.stats.host_hits_resumed += self._make_resident(table, Reason.RESUME)

    def _make_resident(self, table: BlockTable, reason: Reason) -> int:
        """How many of the table's positions have to come from the host."""
        store = self._store
        table.resident = True
        # From the tail, so that of the copies that the host still holds the head's are dropped last.
        for block in reversed(table.blocks):
            block.resident += 1
            store.settle(block)
        store.make_free(sum(block.device is None for block in table.blocks))
        from_host: set[int] = set()
        for group in table.groups:
            for i, block in enumerate(group.blocks, group.start):
                if block.device is None:
                    store.load(block, reason)
                if block.state is State.LOADING:
                    table.loading += 1
                    from_host.add(i)
        return sum(min(self.block_size, table.num_tokens - i * self.block_size) for i in from_host)

    def fork(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """A new table, not resident, that shares the first ``num_tokens`` positions in the tier they lie in.

        At most as many as are valid, and none where a window reaches back from there to blocks that the
        parent has let go of; ``num_tokens`` of the child says how many it got. The last block may be shared
        in part: whichever of its holders has to write where another needs what is there copies it first (see
        ``reserve``). The parent may be running, loading, suspended or parked, and goes on as if nothing had
        happened; it may be released before the child ever runs.
        """
        num_tokens = self.reach(table, num_tokens)
        end, place = self.blocks_for(num_tokens), table.num_tokens // self.block_size
        groups: list[GroupTable] = []
        for group in table.groups:
            start = max(group.start, group.kind.kept_from(num_tokens, self.block_size)) if num_tokens else 0
            blocks = group.blocks[start - group.start : end - group.start] if num_tokens else []
            if group.source is not None and end > place:
                # The parent's own tail is still to be filled.
                blocks[-1] = group.source
            groups.append(GroupTable(group.kind, blocks, start))
        keys = table.keys[: num_tokens // self.block_size]
        child = BlockTable(table.tenant, table.root, tuple(groups), num_tokens, keys=keys)
        for block in child.blocks:
            block.holders[child] = None
        return child

    def reach(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the table's first ``num_tokens`` positions a ``fork`` or ``truncate`` leaves."""
        return table.reach(min(num_tokens, table.num_tokens), self.block_size)

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
        store, table.num_tokens = self._store, self.reach(table, num_tokens)
        place, valid = divmod(table.num_tokens, self.block_size)
        gone = store.take_out(table, self.blocks_for(table.num_tokens))
        store.parked.lost(table, gone)
        for block in gone:
            store.detach(block, table)
        if valid:
            for group in table.groups:
                store.retire_writer(group.at(place), table)
        # Only now that the table is consistent again: settling a block may cost a parked table its tail.
        for block in reversed(gone):
            store.settle(block)

    def release(self, table: BlockTable) -> None:
        """The sequence is over, or will compute everything again. Known prefixes stay while there is room."""
        self.unpark(table)
        blocks = table.held
        self._store.take_out(table, 0)
        table.num_tokens, table.copy_due = 0, False
        for group in table.groups:
            group.source = None
        # From the tail, so that the head of a prefix, of more use to others, is evicted last.
        for block in reversed(blocks):
            self._store.let_go(block, table)
        table.resident = False
        table.loading = 0
        self._store.truncated.pop(table, None)

    def distrust(self, table: BlockTable) -> None:
        """Nobody else may begin with these blocks: what was computed from them was not finite."""
        for block in table.blocks:
            self._store.forget(block)
        for number, group in enumerate(table.groups):
            for key in table.keys[: group.start]:
                behind = self._store.index.get(number, key)
                if behind is not None:
                    self._store.forget(behind)
                    self._store.settle(behind)

    def trim(self, table: BlockTable) -> None:
        """Give back what was reserved behind the valid positions, as after a failed step.

        Also tails of its own that no step has filled: the table shares their sources again.
        """
        tails.give_back_unfilled(self._store, table)
        end = self.blocks_for(table.num_tokens)
        for group in table.groups:
            keep = end - group.start
            for block in group.blocks[keep:]:
                self._store.let_go(block, table)
            del group.blocks[keep:]

    def is_written(self, table: BlockTable) -> bool:
        """Whether giving the table's device slots away would lose nothing."""
        return all(block.device is None or block.is_clean or block.resident > 0 for block in table.blocks)

    def take_truncated(self) -> KeysView[BlockTable]:
        """Tables that lost their tail since the last call; ``num_tokens`` says what is left of each.

        Their owners, of running sequences and of leases alike, have to compute the rest again.
        """
        truncated, self._store.truncated = self._store.truncated, {}
        return truncated.keys()

    # Steps and copies

    def launched(self, table: BlockTable, step_id: int) -> list[tuple[int, int]]:
        """A step that may read and write this table's device slots is on its way.

        Returns the (source, target) device slots that it has to copy before it computes.
        """
        table.fence = step_id
        return tails.take_copies(table, self.block_size)

    def collected(self, step_id: int) -> None:
        """That step and all before it have ended, well or not."""
        self._store.collected(step_id)

    def flush(self) -> None:
        """Hand the copies ordered since the last call to the copy engine, as one batch."""
        self._store.flush()

    def poll(self) -> None:
        """Take in the copies that have ended, and the part of the host tier that has become ready."""
        if self._host_ready is not None and self.host.num_blocks < self._host_blocks:
            self.host.grow(min(self._host_blocks, self._host_ready()))
        self._store.poll()

    def write_ahead(self, blocks: Iterable[Block], most: int) -> int:
        """Copy up to ``most`` of these dirty blocks to the host before anybody has to wait for it.

        Only where that drops nothing of more use there. How many copies were ordered.
        """
        return self._store.write_ahead(blocks, most, Reason.AHEAD)

    def demote_prefixes(self, most: int) -> int:
        """Write ahead those of the next prefixes to be evicted that have been of use before."""
        return self._store.demote_prefixes(most)

    def forget_prefixes(self, *, device: bool, host: bool) -> tuple[int, int]:
        """Give up what nobody holds, in these tiers; how many slots that frees in each."""
        return self._store.forget_prefixes(device=device, host=host)

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Walk everything and compare; raises ``RuntimeError`` that says what is off.

        ``tables`` are all tables that are not released.
        """
        check_integrity(self._store, tables)
