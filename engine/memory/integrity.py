"""The walk over all tables, blocks and slots that tells whether the block manager's books are right."""

from collections import Counter
from collections.abc import Iterable

from tidegate.engine.memory.block import Block, BlockTable
from tidegate.engine.memory.store import BlockStore


def check_integrity(store: BlockStore, tables: Iterable[BlockTable]) -> None:
    """Walk everything and compare; raises ``RuntimeError`` that says what is off.

    ``tables`` are all tables that are not released.
    """
    tables = list(tables)
    blocks = store.blocks(tables)
    holders: dict[Block, set[BlockTable]] = {}
    for table in tables:
        for block in table.held:
            holders.setdefault(block, set()).add(table)
        for i, block in enumerate(table.blocks):
            _check_held(store, table, i, block)
        loading = sum(b.copy is not None and not b.copy.to_host for b in table.blocks)
        _require(table.loading == (loading if table.resident else 0), "a table's loads are miscounted")
        _require(not (table.resident and table in store.parked), "a resident table counts as parked")
    for block in blocks:
        _require(block.holders.keys() == holders.get(block, set()), "a block's holders are miscounted")
        _require(block.resident == sum(t.resident for t in block.holders), "a resident count is off")
        _check_writer(store, block)
        _check_shelves(store, block)
        _check_key(store, block)
    store.device.check_integrity(b.device.index for b in blocks if b.device is not None)
    store.host.check_integrity(b.host.index for b in blocks if b.host is not None)
    store.parked.check_integrity()
    found = Counter(block.state for block in blocks if block.device or block.host)
    _require(+store.stats.states == found, "blocks are miscounted by state")


def _check_held(store: BlockStore, table: BlockTable, i: int, block: Block) -> None:
    size = store.block_size
    needed = max(0, min(size, table.num_tokens - i * size))
    if table.source is not None and i == table.num_tokens // size:
        _require(table.resident and block.writer is table, "a copied tail is not its table's own")
        _require(len(block.holders) == 1, "a tail that is not filled yet is shared")
        block = table.source
    held = max((slot.valid_len for slot in (block.device, block.host) if slot is not None), default=-1)
    _require(held >= needed, "a table counts on positions that no slot holds")
    if table.resident:
        _require(block.device is not None, "a resident table's block is not on the device")
        if table.is_ready and block.device is not None:
            _require(block.device.valid_len >= needed, "a ready table's block is not valid on the device")


def _check_writer(store: BlockStore, block: Block) -> None:
    writer = block.writer
    if writer is not None:
        _require(writer in block.holders and writer.resident, "a block's writer does not run")
        _require(block in writer.blocks, "a block is written by a table that copies it")
        end = (writer.blocks.index(block) + 1) * store.block_size
        most = max(holder.num_tokens for holder in block.holders)
        _require(writer.num_tokens >= min(end, most), "a block's writer overwrites what another needs")


def _check_shelves(store: BlockStore, block: Block) -> None:
    shelves = store.shelves
    idle = block.resident == 0 and block.copy is None and block.fence <= store.last_collected
    takeable = shelves.is_takeable(block)
    _require(not takeable or (idle and block.device is not None), "a block in use counts as evictable")
    _require(block not in shelves.evictable_parked or block.is_clean, "a parked block has no copy")
    _require(not (takeable and block in shelves.draining), "a block stands on two lists")
    if block.device is not None and block.resident == 0:
        _require(takeable or block in shelves.draining, "a device slot is lost to everybody")


def _check_key(store: BlockStore, block: Block) -> None:
    if block.key is not None:
        _require(store.index.get(block.key) is block, "a block carries a key that is not its own")
        full = any(s is not None and s.valid_len == store.block_size for s in (block.device, block.host))
        _require(full or block.copy is not None, "a known prefix block is not full")


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise RuntimeError(text)
