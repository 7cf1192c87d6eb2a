"""The block manager under long random runs of its model: seeded, and checked after every rule."""

import os
import random
from collections.abc import Callable, Sequence

import pytest
from block_manager_model import BlockManagerModel, Violation, chooser, run_episode, run_random
from planted import (
    with_blocks_let_go_within_the_window,
    with_hits_that_lack_the_window,
    with_one_start_for_all_groups,
)

from tidegate.engine.memory import tails
from tidegate.engine.memory.block import TRANSITIONS, Block, BlockTable, GroupTable
from tidegate.engine.memory.pool import BlockPool
from tidegate.engine.memory.store import BlockStore
from tidegate.engine.memory.tiers import BlockManager

NUM_RULES = int(os.environ.get("BLOCK_MANAGER_RULES", "200000"))
"""The goal of a release is 10 million, without a violation: a quarter of an hour on an idle core."""


@pytest.mark.timeout(120 + NUM_RULES // 500)
def test_every_row_of_the_transition_table_happens_and_nothing_else_does() -> None:
    """No rule in a long run breaks an invariant, a slot's content or the table; and no row is idle."""
    totals = run_random(NUM_RULES)

    rows = {(before, event, after) for (before, event), afters in TRANSITIONS.items() for after in afters}
    idle = sorted(rows - set(totals.seen))
    assert not idle, f"rows that never happened: {idle}"
    assert totals.hits > 0
    assert totals.truncations > 0
    assert totals.copies_on_write > 0
    assert totals.left_behind > 0


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_while_copies_succeed_and_the_host_tier_has_room(seed: int) -> None:
    """Preempted sequences come back with all they had: losing blocks is for full tiers and failures."""
    rng = random.Random(seed)
    model = BlockManagerModel(chooser(rng), block_size=2, device_blocks=8, host_blocks=64, copies_fail=False)
    run_episode(model, rng, f"seed {seed}")
    assert model.manager.stats.copied_in.total() > 0
    assert model.truncations == 0


# Planted faults: a check that cannot fail proves nothing.


def without_fence(patch: pytest.MonkeyPatch) -> None:
    """A released table's slots are free while its step still runs."""
    launched = BlockManager.launched

    def unfenced(self: BlockManager, table: BlockTable, step_id: int) -> list[tuple[int, int]]:
        return launched(self, table, 0)

    patch.setattr(BlockManager, "launched", unfenced)


def without_pin(patch: pytest.MonkeyPatch) -> None:
    """A block that is being written back counts as evictable."""
    settle = BlockStore.settle

    def unpinned(self: BlockStore, block: Block) -> None:
        settle(self, block)
        if block.copy is not None and block.copy.to_host and self.shelves.draining.pop(block, block) is None:
            self.shelves.evictable[block] = None

    patch.setattr(BlockStore, "settle", unpinned)


def without_losing(patch: pytest.MonkeyPatch) -> None:
    """Those who wait for a load that fails are not told."""
    lose = BlockStore._lose

    def keep(self: BlockStore, block: Block) -> None:
        if block.device is not None:
            lose(self, block)

    patch.setattr(BlockStore, "_lose", keep)


def with_valid_len_of_a_full_block(patch: pytest.MonkeyPatch) -> None:
    """A commit counts the last block as full."""
    commit = BlockManager.commit

    def overstate(self: BlockManager, table: BlockTable, num_tokens: int, token_ids: Sequence[int]) -> None:
        commit(self, table, num_tokens, token_ids)
        for group in table.groups:
            last = group.at((num_tokens - 1) // self.block_size)
            if last.device is not None:
                last.device.valid_len = self.block_size

    patch.setattr(BlockManager, "commit", overstate)


def with_stale_valid_len_of_a_write_back(patch: pytest.MonkeyPatch) -> None:
    """A write-back that ends claims what the device holds by now, not what it copied."""
    end = BlockStore._end_write_back

    def claim(self: BlockStore, block: Block, copy: object, ok: bool) -> None:
        end(self, block, copy, ok)  # type: ignore[arg-type]
        if ok and block.host is not None and block.device is not None:
            block.host.valid_len = block.device.valid_len

    patch.setattr(BlockStore, "_end_write_back", claim)


def with_double_give(patch: pytest.MonkeyPatch) -> None:
    """A slot goes back to its pool and stays in its block as well."""

    def give_and_keep(self: BlockStore, block: Block) -> None:
        if block.host is not None:
            self.host.give(block.host.index)

    patch.setattr(BlockStore, "_give_host", give_and_keep)


def with_unguarded_double_give(patch: pytest.MonkeyPatch) -> None:
    """A slot that a table has let go of is given away twice, and the pool lets it pass."""
    give = BlockPool.give

    def give_twice(self: BlockPool, index: int) -> None:
        give(self, index)
        self._free.append(index)

    patch.setattr(BlockPool, "give", give_twice)


def with_hits_up_to_the_last_token(patch: pytest.MonkeyPatch) -> None:
    """A prompt that is known in full is a hit in full."""
    find = BlockManager.find_prefix
    patch.setattr(BlockManager, "find_prefix", lambda self, table, tokens: find(self, table, [*tokens, 0]))


def with_tenants_mixed(patch: pytest.MonkeyPatch) -> None:
    """Everybody's keys grow from one root."""
    new_table = BlockManager.new_table
    patch.setattr(BlockManager, "new_table", lambda self, tenant: new_table(self, "everybody"))


def with_repeated_reports_taken(patch: pytest.MonkeyPatch) -> None:
    """A second report of a ticket ends whatever copy its block has under way by then."""
    owners: dict[int, Block] = {}

    def poll(self: BlockStore) -> None:
        owners.update(self.copies)
        for ticket, ok, _ in self._transfer.poll():
            self.copies.pop(ticket, None)
            block = owners[ticket]
            if block.copy is not None:
                (self._end_write_back if block.copy.to_host else self._end_load)(block, block.copy, ok)
                self.settle(block)

    patch.setattr(BlockStore, "poll", poll)


def without_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    """Whoever comes first writes into the tail that others need."""
    patch.setattr(tails, "must_copy", lambda table, tail: False)


def with_a_copy_forgotten(patch: pytest.MonkeyPatch) -> None:
    """No step is told to fill the block that takes a shared tail's place."""
    launched = BlockManager.launched

    def mute(self: BlockManager, table: BlockTable, step_id: int) -> list[tuple[int, int]]:
        launched(self, table, step_id)
        return []

    patch.setattr(BlockManager, "launched", mute)


def with_a_source_let_go_at_once(patch: pytest.MonkeyPatch) -> None:
    """The shared block is nobody's while the step that copies it is still under way."""
    launched = BlockManager.launched

    def hurry(self: BlockManager, table: BlockTable, step_id: int) -> list[tuple[int, int]]:
        copies, table.fence = launched(self, table, step_id), 0
        for group in table.groups if copies else ():
            if group.source is not None:
                source, group.source = group.source, None
                self._store.let_go(source, table)
        table.fence = step_id
        return copies

    patch.setattr(BlockManager, "launched", hurry)


def with_a_failed_copy_kept(patch: pytest.MonkeyPatch) -> None:
    """A step failed, and the tail it was to fill counts all the same."""
    trim = BlockManager.trim

    def keep(self: BlockManager, table: BlockTable) -> None:
        for group in table.groups:
            if group.source is not None:
                source, group.source = group.source, None
                tail = group.at(table.num_tokens // self.block_size).device
                if tail is not None:
                    tail.valid_len = table.num_tokens % self.block_size
                self._store.let_go(source, table)
        trim(self, table)

    patch.setattr(BlockManager, "trim", keep)


def without_cutting(patch: pytest.MonkeyPatch) -> None:
    """What lies behind the point from which a table goes on counts as before."""
    patch.setattr(BlockStore, "cut", lambda self, block, valid_len: None)


def with_blocks_kept_behind_the_window(patch: pytest.MonkeyPatch) -> None:
    """One block table for all groups in effect: a window keeps what full attention keeps."""
    patch.setattr(BlockManager, "_leave_behind", lambda self, table, group: None)


def without_the_fence_of_a_window(patch: pytest.MonkeyPatch) -> None:
    """What leaves a window is free at once, though a step under way still sees it."""
    leave = BlockManager._leave_behind

    def hurry(self: BlockManager, table: BlockTable, group: GroupTable) -> None:
        fence, table.fence = table.fence, 0
        leave(self, table, group)
        table.fence = fence

    patch.setattr(BlockManager, "_leave_behind", hurry)


def with_branches_before_the_window(patch: pytest.MonkeyPatch) -> None:
    """A branch may begin anywhere, with whatever is left of what it sees."""
    patch.setattr(BlockTable, "reach", lambda self, num_tokens, size: num_tokens)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    without_fence,
    without_pin,
    without_losing,
    with_valid_len_of_a_full_block,
    with_stale_valid_len_of_a_write_back,
    with_double_give,
    with_unguarded_double_give,
    with_hits_up_to_the_last_token,
    with_tenants_mixed,
    with_repeated_reports_taken,
    without_copy_on_write,
    with_a_copy_forgotten,
    with_a_source_let_go_at_once,
    with_a_failed_copy_kept,
    without_cutting,
    with_blocks_let_go_within_the_window,
    with_one_start_for_all_groups,
    with_blocks_kept_behind_the_window,
    without_the_fence_of_a_window,
    with_hits_that_lack_the_window,
    with_branches_before_the_window,
]


@pytest.mark.parametrize("walk", [True, False], ids=["integrity", "content_alone"])
@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], walk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the manager's own walk, and by what the slots hold even without it."""
    plant(monkeypatch)
    with pytest.raises((Violation, RuntimeError)):
        run_random(100_000, walk=walk)
