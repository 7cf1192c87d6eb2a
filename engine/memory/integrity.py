"""The walk over all tables, blocks and slots that tells whether the block manager's books are right.

Written for speed: simulations walk everything after every step.
"""

from collections import defaultdict
from collections.abc import Iterable

from tidegate.engine.memory.block import Block, BlockTable, GroupTable, State
from tidegate.engine.memory.store import BlockStore


def check_integrity(store: BlockStore, tables: Iterable[BlockTable]) -> None:
    """Walk everything and compare; raises ``RuntimeError`` that says what is off.

    ``tables`` are all tables that are not released.
    """
    holders: dict[Block, int] = defaultdict(int)
    residents: dict[Block, int] = defaultdict(int)
    for table in tables:
        for block in table.held:
            if table not in block.holders:
                raise RuntimeError("a block's holders are miscounted")
            holders[block] += 1
            residents[block] += table.resident
        _check_table(store, table)
    states: dict[State, int] = defaultdict(int)
    on_device, on_host = [], []
    for block in {*store.blocks(()), *holders}:
        if len(block.holders) != holders.get(block, 0):
            raise RuntimeError("a block's holders are miscounted")
        if block.resident != residents.get(block, 0):
            raise RuntimeError("a resident count is off")
        _check_writer(store, block)
        _check_shelves(store, block)
        _check_key(store, block)
        if block.device is not None:
            on_device.append(block.device.index)
        if block.host is not None:
            on_host.append(block.host.index)
        if block.device is not None or block.host is not None:
            states[block.state] += 1
    store.device.check_integrity(on_device)
    store.host.check_integrity(on_host)
    store.parked.check_integrity()
    if dict(+store.stats.states) != dict(states):
        raise RuntimeError("blocks are miscounted by state")


def _check_table(store: BlockStore, table: BlockTable) -> None:
    """Every position that it counts on is held, and where its steps want it."""
    loading = 0
    for group in table.groups:
        if group.end != table.end:
            raise RuntimeError("a table has groups of different lengths")
        loading += _check_group(store, table, group)
    if table.loading != (loading if table.resident else 0):
        raise RuntimeError("a table's loads are miscounted")
    if table.resident and table in store.parked:
        raise RuntimeError("a resident table counts as parked")


def _check_group(store: BlockStore, table: BlockTable, group: GroupTable) -> int:
    """How many of the group's blocks are on their way to the device."""
    size, resident, is_ready, loading = store.block_size, table.resident, table.is_ready, 0
    full, rest = divmod(table.num_tokens, size)
    if group.start > group.kind.needed_from(table.num_tokens, size):
        raise RuntimeError("a group lacks blocks that its next position sees")
    if group.start < group.kind.kept_from(table.num_tokens, size):
        raise RuntimeError("a group keeps blocks that its window has passed")
    for i, block in enumerate(group.blocks, group.start):
        if block.copy is not None and not block.copy.to_host:
            loading += 1
        if i == full and group.source is not None:
            if not resident or block.writer is not table:
                raise RuntimeError("a copied tail is not its table's own")
            if len(block.holders) != 1:
                raise RuntimeError("a tail that is not filled yet is shared")
            block = group.source
        needed = size if i < full else rest if i == full else 0
        device = -1 if block.device is None else block.device.valid_len
        if device < needed and (block.host is None or block.host.valid_len < needed):
            raise RuntimeError("a table counts on positions that no slot holds")
        if resident and device < 0:
            raise RuntimeError("a resident table's block is not on the device")
        if is_ready and device < needed:
            raise RuntimeError("a ready table's block is not valid on the device")
    return loading


def _check_writer(store: BlockStore, block: Block) -> None:
    writer = block.writer
    if writer is None:
        return
    if writer not in block.holders or not writer.resident:
        raise RuntimeError("a block's writer does not run")
    group = writer.groups[block.group]
    if block not in group.blocks:
        raise RuntimeError("a block is written by a table that copies it")
    end = (group.start + group.blocks.index(block) + 1) * store.block_size
    most = max(holder.num_tokens for holder in block.holders)
    if writer.num_tokens < min(end, most):
        raise RuntimeError("a block's writer overwrites what another needs")


def _check_shelves(store: BlockStore, block: Block) -> None:
    shelves = store.shelves
    takeable, draining = shelves.is_takeable(block), block in shelves.draining
    if takeable:
        idle = block.resident == 0 and block.copy is None and block.fence <= store.last_collected
        if not idle or block.device is None:
            raise RuntimeError("a block in use counts as evictable")
        if draining:
            raise RuntimeError("a block stands on two lists")
        if block in shelves.evictable_parked and not block.is_clean:
            raise RuntimeError("a parked block has no copy")
    elif block.device is not None and block.resident == 0 and not draining:
        raise RuntimeError("a device slot is lost to everybody")


def _check_key(store: BlockStore, block: Block) -> None:
    if block.key is None:
        return
    if store.index.get(block.group, block.key) is not block:
        raise RuntimeError("a block carries a key that is not its own")
    if block.copy is not None:
        return
    device, host, size = block.device, block.host, store.block_size
    if (device is None or device.valid_len != size) and (host is None or host.valid_len != size):
        raise RuntimeError("a known prefix block is not full")
