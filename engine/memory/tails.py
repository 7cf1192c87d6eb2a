"""Copy on write: partial last blocks that tables share, and who of them may write behind what is there.

A table has such a *tail* in each KV group, and the groups need not agree: in one of them all others may have
let go of the block already.
"""

from tidegate.engine.memory.block import Block, BlockTable
from tidegate.engine.memory.store import BlockStore


def owns_tail(table: BlockTable, block_size: int) -> bool:
    """Whether steps may write behind the table's positions as it stands."""
    place, valid = divmod(table.num_tokens, block_size)
    return not valid or all(group.at(place).writer is table for group in table.groups)


def num_to_copy(table: BlockTable, block_size: int) -> int:
    """How many of the table's tails it has to copy before it goes on."""
    place, valid = divmod(table.num_tokens, block_size)
    return sum(must_copy(table, group.at(place)) for group in table.groups) if valid else 0


def must_copy(table: BlockTable, tail: Block) -> bool:
    """Whether others need what the table would overwrite in its last block."""
    if tail.writer is table:
        return False
    return tail.writer is not None or any(h.num_tokens > table.num_tokens for h in tail.holders)


def own_tail(store: BlockStore, table: BlockTable) -> None:
    """Make the table the writer of its tails, or of blocks of its own in place of them.

    The caller has made room. A source stays held, and resident, until the step that copies it has ended well.
    """
    place, valid = divmod(table.num_tokens, store.block_size)
    if not valid:
        return
    for number, group in enumerate(table.groups):
        tail = group.at(place)
        if must_copy(table, tail):
            group.source, table.copy_due = tail, True
            group.blocks[place - group.start] = store.fresh(table, number)
        elif tail.writer is not table:
            tail.writer = table
            store.cut(tail, valid)


def take_copies(table: BlockTable, block_size: int) -> list[tuple[int, int]]:
    """The (source, target) device slots that the step which is launched now has to copy first."""
    if not table.copy_due:
        return []
    table.copy_due = False
    copies: list[tuple[int, int]] = []
    for group in table.groups:
        if group.source is not None:
            source, target = group.source.device, group.at(table.num_tokens // block_size).device
            if source is None or target is None:
                raise RuntimeError("a shared block is to be copied on a device that does not hold it")
            copies.append((source.index, target.index))
    return copies


def give_back_unfilled(store: BlockStore, table: BlockTable) -> None:
    """Share the sources again in place of tails that no step has filled."""
    place, table.copy_due = table.num_tokens // store.block_size, False
    for group in table.groups:
        if group.source is not None:
            unfilled, group.blocks[place - group.start] = group.at(place), group.source
            group.source = None
            store.let_go(unfilled, table)
