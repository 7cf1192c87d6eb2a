"""Faults of windows, planted so that the model of the block manager and the engine simulation catch them."""

import pytest

from tidegate.engine.memory.block import Block, BlockTable, GroupTable
from tidegate.engine.memory.groups import KVGroup
from tidegate.engine.memory.prefix import Prefix, PrefixIndex
from tidegate.engine.memory.tiers import BlockManager


def with_blocks_let_go_within_the_window(patch: pytest.MonkeyPatch) -> None:
    """A block goes as soon as the window has passed its first position."""
    needed_from = KVGroup.needed_from
    patch.setattr(KVGroup, "kept_from", lambda self, tokens, size: needed_from(self, tokens + size - 1, size))


def with_hits_that_lack_the_window(patch: pytest.MonkeyPatch) -> None:
    """What full attention knows is a hit; of what the windows see, whatever is known."""

    def hasty(self: PrefixIndex[Block], keys: list[bytes]) -> Prefix[Block]:
        length = next((i for i, key in enumerate(keys) if key not in self._groups[0]), len(keys))
        groups: list[list[Block]] = []
        for known in self._groups:
            gap = next((i for i in reversed(range(length)) if keys[i] not in known), -1)
            groups.append([known[key] for key in keys[gap + 1 : length]])
        return Prefix(length, tuple(groups))

    patch.setattr(PrefixIndex, "longest", hasty)


def with_one_start_for_all_groups(patch: pytest.MonkeyPatch) -> None:
    """What a window has passed is taken from the full attention's table as well."""
    leave = BlockManager._leave_behind

    def take_along(self: BlockManager, table: BlockTable, group: GroupTable) -> None:
        leave(self, table, group)
        for other in table.groups:
            gone = other.blocks[: max(0, group.start - other.start)]
            del other.blocks[: len(gone)]
            other.start += len(gone)
            for block in gone:
                self._store.let_go(block, table)

    patch.setattr(BlockManager, "_leave_behind", take_along)
