"""The block manager, case by case. The searches for what nobody thought of are in the other files."""

from collections.abc import Sequence

import pytest
from memory_rig import Rig, states

from tidegate.engine.memory.block import BlockTable, State
from tidegate.engine.memory.copies import Reason
from tidegate.engine.memory.store import MAX_COPY_FAILURES

# Prefixes


def test_a_hit_is_full_blocks_and_never_the_last_token() -> None:
    rig = Rig(8, 0)
    rig.run([1, 2, 3, 4, 5])
    other = rig.manager.new_table("t")
    assert rig.manager.find_prefix(other, [1, 2, 3, 4, 6]).length == 2
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4]).length == 1
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3]).length == 1
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2]).blocks == []
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [9, 2, 3, 4, 5]).blocks == []


def test_another_tenant_hits_nothing() -> None:
    rig = Rig(8, 0)
    rig.run([1, 2, 3, 4, 5])
    assert rig.manager.find_prefix(rig.manager.new_table("u"), [1, 2, 3, 4, 5]).blocks == []


def test_without_a_hasher_nothing_is_shared_or_kept() -> None:
    rig = Rig(4, 0, caches=False)
    rig.release(rig.run([1, 2, 3, 4, 5]))
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4, 5]).blocks == []
    assert rig.manager.device.num_free == 4
    rig.check()


def test_uncommitted_positions_are_no_prefix() -> None:
    """What a step in flight writes may never be confirmed."""
    rig = Rig(8, 0)
    table = rig.admit([1, 2, 3, 4, 5])
    rig.manager.reserve(table, 5)
    rig.launch(table)
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4, 5]).blocks == []


def test_shared_blocks_take_room_once_and_stay_until_the_last_holder_goes() -> None:
    rig = Rig(4, 0)
    first = rig.run([1, 2, 3, 4, 5])
    second = rig.run([1, 2, 3, 4, 6])
    assert rig.manager.device.num_free == 0
    assert first.blocks[:2] == second.blocks[:2]
    rig.release(first)
    assert rig.manager.num_available == 1
    rig.release(second)
    assert rig.manager.num_available == 4
    rig.check()


def test_of_kept_prefixes_the_tail_goes_first_and_the_head_serves_on() -> None:
    rig = Rig(4, 0)
    rig.release(rig.run([1, 2, 3, 4, 5]))
    assert rig.manager.device.num_free == 2
    rig.run([7, 7, 7, 7, 7])
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4, 5]).length == 1
    rig.check()


def test_a_kept_prefix_is_not_counted_as_room_beside_itself() -> None:
    """Its slots cannot be both adopted and taken."""
    rig = Rig(4, 0)
    rig.release(rig.run([1, 2, 3, 4, 5]))
    found = rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4, 5]).blocks
    assert rig.manager.has_room(found, 2)
    assert not rig.manager.has_room(found, 3)
    assert rig.manager.has_room([], 4)


# Preemption


def test_suspended_blocks_keep_their_slots_until_the_host_has_them() -> None:
    rig = Rig(4, 4)
    table = rig.run([1, 2, 3])
    rig.manager.suspend(table)
    assert states(table) == [State.WRITING_BACK, State.WRITING_BACK]
    assert (rig.manager.num_available, rig.manager.num_draining) == (2, 2)
    assert not rig.manager.is_written(table)
    rig.copy_all()
    assert states(table) == [State.CLEAN, State.CLEAN]
    assert (rig.manager.num_available, rig.manager.num_draining) == (4, 0)
    assert rig.manager.is_written(table)
    rig.check()


def test_what_was_reserved_only_goes_at_once() -> None:
    rig = Rig(4, 4)
    table = rig.run([1, 2, 3])
    rig.manager.reserve(table, 8)
    rig.manager.suspend(table)
    assert rig.manager.device.num_free == 2
    assert len(table.blocks) == 2


def test_a_suspended_sequence_whose_slots_nobody_took_comes_back_without_a_copy() -> None:
    rig = Rig(4, 4)
    table = rig.run([1, 2, 3])
    rig.park(table)
    rig.manager.resume(table)
    assert table.is_ready
    assert rig.manager.stats.copied_in.total() == 0


def test_a_clean_sequence_is_preempted_without_a_copy() -> None:
    rig = Rig(4, 4)
    table = rig.run([1, 2, 3])
    rig.park(table)
    rig.manager.resume(table)
    rig.manager.suspend(table)
    assert rig.copy_all() == 0
    assert rig.manager.num_available == 4


def test_evicted_blocks_are_loaded_and_the_table_waits_for_all_of_them() -> None:
    rig = Rig(4, 8)
    table = rig.run([1, 2, 3])
    rig.park(table)
    other = rig.run([9] * 8)
    assert states(table) == [State.HOST_ONLY, State.HOST_ONLY]
    assert not rig.manager.has_room(table.blocks, 0)
    rig.park(other)
    rig.manager.resume(table)
    assert states(table) == [State.LOADING, State.LOADING]
    rig.manager.flush()
    first, second = rig.transfer.under_way
    rig.transfer.finish(second, ok=True)
    rig.manager.poll()
    assert not table.is_ready
    rig.transfer.finish(first, ok=True)
    rig.manager.poll()
    assert table.is_ready
    assert rig.manager.stats.copied_in.total() == 2
    rig.check()


def test_an_append_during_the_write_back_leaves_the_host_behind() -> None:
    """The copy counts for what it read; the next preemption writes the block again."""
    rig = Rig(4, 4)
    table = rig.run([1])
    rig.manager.suspend(table)
    rig.manager.flush()
    rig.manager.resume(table)
    rig.compute(table, [1, 2])
    rig.copy_all()
    (block,) = table.blocks
    assert block.host is not None
    assert (block.state, block.host.valid_len) == (State.DIRTY, 1)
    rig.park(table)
    assert (block.state, block.host.valid_len) == (State.CLEAN, 2)
    assert rig.manager.host.num_free == 3


def test_with_room_for_everything_nothing_is_ever_copied() -> None:
    rig = Rig(32, 32)
    for i in range(4):
        rig.run([i, 1, 2, 3, 4, 5])
    for table in list(rig.tables):
        rig.release(table)
    assert rig.copy_all() == 0
    assert rig.manager.host.num_free == 32


# Fences


def test_slots_of_a_released_table_wait_for_its_step() -> None:
    rig = Rig(2, 0)
    table = rig.admit([1, 2, 3])
    rig.manager.reserve(table, 3)
    step = rig.launch(table)
    rig.release(table)
    assert (rig.manager.num_available, rig.manager.num_draining) == (0, 2)
    rig.check()
    rig.manager.collected(step)
    assert (rig.manager.num_available, rig.manager.num_draining) == (2, 0)
    rig.check()


def test_only_the_last_step_of_a_table_frees_its_slots() -> None:
    """Two steps overlap: the end of the first says nothing about the second."""
    rig = Rig(2, 0)
    table = rig.admit([1, 2, 3])
    rig.manager.reserve(table, 3)
    first, second = rig.launch(table), rig.launch(table)
    rig.release(table)
    rig.manager.collected(first)
    assert rig.manager.num_available == 0
    rig.manager.collected(second)
    assert rig.manager.num_available == 2


def test_a_failed_step_gives_back_what_it_reserved_behind_its_fence() -> None:
    rig = Rig(4, 0)
    table = rig.run([1, 2])
    rig.manager.reserve(table, 4)
    failed, after = rig.launch(table), rig.launch(table)
    rig.manager.collected(failed)
    rig.manager.trim(table)
    assert len(table.blocks) == 1
    assert rig.manager.num_available == 2
    rig.manager.collected(after)
    assert rig.manager.num_available == 3
    rig.check()


def test_a_prefix_of_a_released_table_may_be_adopted_under_its_fence() -> None:
    """Reading what another step reads does no harm."""
    rig = Rig(4, 0)
    first = rig.run([1, 2, 3])
    step = rig.launch(first)
    rig.release(first)
    second = rig.admit([1, 2, 4])
    assert second.is_ready
    assert second.num_tokens == 2
    rig.manager.collected(step)
    rig.check()


# Trouble


def test_a_release_in_mid_copy_frees_the_slots_when_the_copy_has_ended() -> None:
    rig = Rig(2, 4)
    table = rig.run([1, 2, 3])
    rig.manager.suspend(table)
    rig.manager.flush()
    rig.release(table)
    assert (rig.manager.num_available, rig.manager.num_host_available) == (0, 2)
    rig.copy_all()
    assert (rig.manager.num_available, rig.manager.num_host_available) == (2, 4)
    rig.check()


def test_a_release_in_mid_load_frees_the_slots_when_the_copy_has_ended() -> None:
    rig = Rig(4, 8)
    table, other = rig.run([1, 2, 3]), None
    rig.park(table)
    other = rig.run([9] * 8)
    rig.release(other)
    rig.manager.resume(table)
    rig.manager.flush()
    rig.release(table)
    rig.check()
    rig.copy_all()
    assert rig.manager.num_available == 4
    assert rig.manager.num_host_available == 8
    rig.check()


def waiting_pair(rig: Rig) -> tuple[BlockTable, BlockTable]:
    """Two sequences with a common prefix that is on its way from the host."""
    first = rig.run([1, 2, 3, 4, 5])
    rig.park(first)
    blocker = rig.run([9] * 2 * rig.manager.device.num_blocks)
    rig.release(blocker)
    rig.manager.resume(first)
    second = rig.admit([1, 2, 3, 4, 6])
    assert (first.loading, second.loading) == (3, 2)
    return first, second


def test_one_load_serves_all_who_wait_for_it() -> None:
    rig = Rig(4, 8)
    first, second = waiting_pair(rig)
    assert rig.copy_all() == 3
    assert first.is_ready
    assert second.is_ready
    rig.check()


def test_a_failed_load_falls_back_for_all_who_wait_for_it() -> None:
    """Each keeps what lies before the block, and its other loads go on."""
    rig = Rig(4, 8)
    first, second = waiting_pair(rig)
    rig.manager.flush()
    tickets = list(rig.transfer.under_way)
    rig.transfer.finish(tickets[1], ok=False)
    rig.manager.poll()
    assert rig.manager.take_truncated() == {first, second}
    assert rig.manager.take_truncated() == set()
    assert (first.num_tokens, second.num_tokens) == (2, 2)
    assert (first.loading, second.loading) == (1, 1)
    rig.check()
    rig.copy_all()
    assert first.is_ready
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4, 5]).length == 1
    rig.check()


def test_a_report_that_comes_twice_counts_once() -> None:
    rig = Rig(4, 4)
    table = rig.run([1, 2])
    rig.park(table)
    rig.transfer.report_again(1, ok=False)
    rig.manager.poll()
    assert states(table) == [State.CLEAN]
    assert rig.manager.stats.copied_out.total() == 1
    rig.check()


def test_a_write_back_that_keeps_failing_costs_the_tail_and_nothing_else() -> None:
    rig = Rig(4, 4)
    table = rig.run([1, 2, 3])
    rig.manager.suspend(table)
    rig.manager.flush()
    head, tail = rig.transfer.under_way
    rig.transfer.finish(head, ok=True)
    rig.transfer.finish(tail, ok=False)
    rig.manager.poll()
    for _ in range(MAX_COPY_FAILURES - 1):
        assert rig.manager.take_truncated() == set()
        assert rig.copy_all(ok=False) == 1
    assert rig.manager.take_truncated() == {table}
    assert table.num_tokens == 2
    assert rig.manager.num_available == 4
    assert rig.manager.host.num_free == 3
    rig.check()


def test_a_prefix_that_could_not_be_written_is_tried_again_for_its_next_holder() -> None:
    """Failures are counted in a row; those of another life of the block are over."""
    rig = Rig(4, 4)
    table = rig.run([1, 2])
    rig.manager.suspend(table)
    for _ in range(MAX_COPY_FAILURES):
        rig.copy_all(ok=False)
    assert rig.manager.take_truncated() == {table}
    heir = rig.admit([1, 2, 3])
    assert heir.num_tokens == 2
    rig.park(heir)
    assert rig.manager.take_truncated() == set()
    assert states(heir) == [State.CLEAN]
    rig.check()


# Full tiers


def test_a_reservation_without_room_changes_nothing() -> None:
    rig = Rig(2, 0)
    table = rig.run([1, 2])
    assert not rig.manager.reserve(table, 7)
    assert len(table.blocks) == 1
    assert rig.manager.num_available == 1
    rig.check()


def test_kept_prefixes_are_evicted_before_parked_blocks() -> None:
    rig = Rig(3, 4)
    parked = rig.run([1, 2])
    rig.park(parked)
    rig.release(rig.run([7, 7]))
    rig.run([8, 8, 8])
    assert states(parked) == [State.CLEAN]
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [7, 7, 7]).blocks == []


def test_the_host_tier_drops_prefixes_and_mirrors_before_anything_parked() -> None:
    rig = Rig(8, 3)
    parked, prefix, mirror = rig.run([1, 1]), rig.run([2, 2]), rig.run([3, 3])
    for table in (parked, mirror, prefix):
        rig.park(table)
    rig.manager.resume(mirror)
    rig.release(prefix)
    assert rig.manager.num_host_available == 2

    rig.park(rig.run([4, 4]))
    assert mirror.blocks[0].host is not None
    rig.park(rig.run([5, 5]))
    assert mirror.blocks[0].host is None
    assert states(mirror) == [State.DIRTY]
    assert rig.manager.num_host_available == 0

    late = rig.run([6, 6])
    rig.manager.suspend(late)
    assert rig.manager.take_truncated() == {late}
    assert states(parked) == [State.CLEAN]
    rig.check()


def test_parked_sharers_lose_a_prefix_together_when_no_host_slot_is_left() -> None:
    rig = Rig(8, 0)
    first, second = rig.run([1, 2, 3, 4, 5]), rig.run([1, 2, 3, 4, 6])
    rig.manager.suspend(first)
    assert first.num_tokens == 4
    rig.check()
    rig.manager.suspend(second)
    assert rig.manager.take_truncated() == {first, second}
    assert first.blocks == second.blocks == []
    assert rig.manager.num_available == 8
    rig.check()


def test_a_suspended_table_never_drops_its_own_copies_to_make_room_for_itself() -> None:
    """It comes back after its tail's copy was dropped, and leaves again with the host tier full."""
    rig = Rig(8, 2)
    table = rig.run([1, 2, 3, 4])
    rig.park(table)
    rig.manager.resume(table)
    other = rig.run([9, 9])
    rig.park(other)
    assert [block.host is None for block in table.blocks] == [False, True]
    rig.manager.suspend(table)
    rig.check()
    assert rig.manager.take_truncated() == {table}


# Forks


def test_a_fork_shares_everything_up_to_a_position_and_the_tail_in_part() -> None:
    rig = Rig(8, 8)
    parent = rig.run([1, 2, 3, 4, 5])
    for num_tokens, shared in ((0, 0), (1, 1), (3, 2), (4, 2), (5, 3)):
        child = rig.manager.fork(parent, num_tokens)
        assert child.blocks == parent.blocks[:shared]
        assert child.num_tokens == num_tokens
        assert not child.resident
        rig.manager.release(child)
    assert rig.manager.fork(parent, 99).num_tokens == 5
    assert rig.manager.num_draining == 0


def test_a_fork_keeps_shared_blocks_when_its_parent_is_over() -> None:
    rig = Rig(4, 4, caches=False)
    parent = rig.run([1, 2, 3])
    child = rig.manager.fork(parent, 3)
    rig.tables.append(child)
    rig.release(parent)
    rig.copy_all()
    assert states(child) == [State.CLEAN, State.CLEAN]
    rig.run([9] * 8)
    assert states(child) == [State.HOST_ONLY, State.HOST_ONLY]
    rig.check()


def forked(rig: Rig, parent: BlockTable, num_tokens: int) -> BlockTable:
    """A child that runs."""
    child = rig.manager.fork(parent, num_tokens)
    rig.tables.append(child)
    rig.manager.resume(child)
    return child


def test_a_child_that_writes_into_a_shared_tail_copies_it_first() -> None:
    """The parent goes on writing where it is; the child's step fills a block of its own."""
    rig = Rig(8, 8)
    parent = rig.run([1, 2, 3])
    tail = parent.blocks[1]
    child = forked(rig, parent, 3)
    assert rig.manager.num_missing(child, 4) == 1
    assert rig.manager.reserve(child, 4)
    assert rig.manager.reserve(parent, 4)
    assert parent.blocks[1] is tail
    own = child.blocks[1]
    assert own is not tail
    assert tail.device is not None
    assert own.device is not None
    assert rig.manager.launched(parent, 1) == []
    assert rig.manager.launched(child, 1) == [(tail.device.index, own.device.index)]
    assert rig.manager.launched(child, 2) == []
    rig.check()
    rig.manager.commit(parent, 4, [1, 2, 3, 4])
    rig.manager.commit(child, 4, [1, 2, 3, 9])
    rig.manager.collected(1)
    assert list(tail.holders) == [parent]
    rig.check()


def test_of_equal_holders_one_writes_in_place_and_the_others_copy() -> None:
    rig = Rig(8, 8)
    parent = rig.run([1, 2, 3])
    first, second = forked(rig, parent, 3), forked(rig, parent, 3)
    tail = parent.blocks[1]
    rig.release(parent)
    assert rig.manager.reserve(first, 4)
    assert rig.manager.reserve(second, 4)
    assert first.blocks[1] is tail
    assert second.blocks[1] is not tail
    rig.check()


def test_a_step_that_fails_leaves_the_child_with_the_shared_tail_and_it_copies_again() -> None:
    rig = Rig(8, 8)
    parent = rig.run([1, 2, 3])
    child = forked(rig, parent, 3)
    rig.manager.reserve(child, 5)
    rig.launch(parent, child)
    rig.manager.collected(rig.step)
    rig.manager.trim(child)
    assert child.blocks == parent.blocks
    assert rig.manager.num_available == 6
    rig.check()
    rig.manager.reserve(child, 4)
    assert len(rig.manager.launched(child, 3)) == 1
    rig.check()


def test_the_source_of_a_copy_stays_until_its_step_is_collected() -> None:
    """Whatever becomes of parent and child meanwhile: the step reads the slot when its turn comes."""
    rig = Rig(4, 0, caches=False)
    parent = rig.run([1])
    child = forked(rig, parent, 1)
    rig.manager.reserve(child, 2)
    step = rig.launch(child)
    rig.release(parent)
    assert rig.manager.num_available == 2
    rig.release(child)
    assert (rig.manager.num_available, rig.manager.num_draining) == (2, 2)
    rig.check()
    rig.manager.collected(step)
    assert rig.manager.num_available == 4


def test_a_tail_on_the_host_is_shared_there_and_loaded_once_for_both() -> None:
    rig = Rig(4, 4, caches=False)
    parent = rig.run([1, 2, 3])
    rig.park(parent)
    rig.release(rig.run([9] * 8))
    child = rig.manager.fork(parent, 3)
    rig.tables.append(child)
    assert states(child) == [State.HOST_ONLY, State.HOST_ONLY]
    rig.manager.resume(child)
    rig.manager.resume(parent)
    assert rig.copy_all() == 2
    rig.compute(child, [1, 2, 3, 9])
    rig.compute(parent, [1, 2, 3, 4])
    assert rig.manager.device.num_free == 1
    rig.check()


def test_a_tail_that_another_is_about_to_fill_is_forked_from_its_source() -> None:
    rig = Rig(8, 8)
    parent = rig.run([1, 2, 3])
    child = forked(rig, parent, 3)
    rig.manager.reserve(child, 4)
    rig.launch(child)
    grandchild = rig.manager.fork(child, 3)
    rig.tables.append(grandchild)
    assert grandchild.blocks == parent.blocks
    rig.check()


# Going back


def test_a_table_is_cut_to_fewer_positions_and_goes_on_from_there() -> None:
    rig = Rig(8, 8)
    table = rig.run([1, 2, 3, 4, 5])
    rig.manager.truncate(table, 3)
    assert (table.num_tokens, len(table.blocks)) == (3, 2)
    assert rig.manager.device.num_free == 6
    rig.check()
    rig.compute(table, [1, 2, 3, 9, 9])
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 9, 9]).length == 2
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4, 9]).length == 1
    rig.check()


def test_others_keep_what_one_of_them_is_cut_short_of() -> None:
    rig = Rig(8, 8)
    table = rig.run([1, 2, 3, 4])
    other = forked(rig, table, 4)
    rig.manager.truncate(table, 3)
    rig.compute(table, [1, 2, 3, 9])
    assert table.blocks[0] is other.blocks[0]
    assert table.blocks[1] is not other.blocks[1]
    assert rig.manager.find_prefix(rig.manager.new_table("t"), [1, 2, 3, 4, 5]).length == 2
    rig.check()


def test_a_copy_under_way_counts_only_as_far_as_nothing_was_overwritten() -> None:
    rig = Rig(4, 4, caches=False)
    table = rig.run([1, 2])
    rig.manager.write_ahead(table.blocks, 1)
    rig.manager.flush()
    rig.manager.truncate(table, 1)
    rig.compute(table, [1, 9])
    rig.copy_all()
    (block,) = table.blocks
    assert block.host is not None
    assert (block.state, block.host.valid_len) == (State.DIRTY, 1)
    rig.check()


def test_a_parked_table_is_cut_where_it_lies() -> None:
    rig = Rig(4, 4, caches=False)
    table = rig.run([1, 2, 3, 4])
    rig.park(table)
    rig.manager.truncate(table, 1)
    assert states(table) == [State.CLEAN]
    assert (rig.manager.device.num_free, rig.manager.host.num_free) == (3, 3)
    rig.check()


# Misuse


def test_committing_to_a_block_off_the_device_raises() -> None:
    rig = Rig(2, 4)
    table = rig.run([1])
    rig.park(table)
    rig.run([9] * 4)
    with pytest.raises(RuntimeError, match="not on the device"):
        rig.manager.commit(table, 2, [1, 2])


def test_the_walk_tells_a_forgotten_table() -> None:
    rig = Rig(2, 0)
    rig.run([1, 2])
    with pytest.raises(RuntimeError, match="holders are miscounted"):
        rig.manager.check_integrity([])


# Ahead of need, and who goes first where the host is full


def test_full_blocks_are_written_ahead_while_steps_read_them_and_leave_at_once() -> None:
    rig = Rig(4, 4)
    table = rig.run([1, 2, 3, 4, 5])
    assert rig.manager.write_ahead(table.blocks[:2], 8) == 2
    rig.copy_all()
    assert states(table) == [State.CLEAN, State.CLEAN, State.DIRTY]
    rig.manager.suspend(table)
    assert rig.manager.num_reclaimable == 2
    assert rig.manager.num_draining == 1
    rig.check()


def test_only_prefixes_that_were_of_use_are_written_before_they_are_evicted() -> None:
    rig = Rig(8, 8)
    rig.release(rig.run([1, 2, 3, 4, 9]))
    rig.release(rig.run([5, 6, 7, 8, 9]))
    rig.release(rig.run([1, 2, 3, 4, 8]))
    assert rig.manager.demote_prefixes(8) == 2
    rig.copy_all()
    rig.release(rig.run(range(100, 116)))
    again = rig.admit([1, 2, 3, 4, 7])
    assert states(again) == [State.LOADING, State.LOADING]
    rig.copy_all()
    assert again.is_ready
    rig.check()


def test_writing_ahead_never_goes_round_in_circles() -> None:
    """More prefixes stand in line than the host holds: their own copies are not dropped for one another."""
    rig = Rig(8, 2)
    for _ in range(2):
        rig.release(rig.run([1, 2, 3, 4, 9]))
        rig.release(rig.run([5, 6, 7, 8, 9]))
    assert rig.manager.demote_prefixes(8) == 2
    rig.copy_all()
    assert rig.manager.demote_prefixes(8) == 0
    rig.check()


def test_where_the_host_is_full_the_longest_parked_gives_up_its_tail() -> None:
    rig = Rig(12, 4)
    first, second, runner = rig.run([1, 2, 3, 4]), rig.run([5, 6, 7, 8]), rig.run([9, 10])
    for table in (first, second):
        rig.manager.park(table)
        rig.park(table)
    rig.park(runner)
    assert (first.num_tokens, second.num_tokens, runner.num_tokens) == (2, 4, 2)
    assert rig.manager.take_truncated() == {first}
    rig.check()


def leased(rig: Rig, tokens: Sequence[int], tenant: str = "t") -> BlockTable:
    """A table of a sequence that has ended, written to the host as far as there is room."""
    table = rig.run(tokens, tenant)
    rig.manager.park(table)
    rig.manager.suspend(table)
    rig.copy_all()
    rig.check()
    return table


def test_leases_that_fill_the_host_tier_are_room_for_whoever_runs() -> None:
    rig = Rig(12, 4)
    lease = leased(rig, [1, 2, 3, 4, 5, 6, 7])
    assert rig.manager.num_host_available == 0
    assert [rig.manager.has_host_room(number) for number in (1, 4, 5)] == [True, True, False]
    runner = rig.run([8, 9, 8, 9, 8])
    rig.manager.suspend(runner)
    rig.copy_all()
    assert runner.num_tokens == 5
    assert rig.manager.take_truncated() == {lease}
    # Nothing makes way for more of those that go on by themselves.
    assert [rig.manager.has_host_room(number) for number in (1, 2)] == [True, False]
    rig.check()


def test_of_parked_tables_the_last_one_stays() -> None:
    rig = Rig(12, 3)
    first = leased(rig, [1, 2, 3, 4])
    second = leased(rig, [5, 6, 7, 8])
    assert (first.num_tokens, second.num_tokens) == (2, 4)
    rig.manager.park(first)
    third = leased(rig, [9, 10])
    assert (first.num_tokens, second.num_tokens, third.num_tokens) == (2, 2, 2)


def test_a_table_that_is_wanted_back_is_safe_from_those_that_are_parked() -> None:
    rig = Rig(12, 2)
    wanted = leased(rig, [1, 2, 3, 4])
    rig.manager.unpark(wanted)
    assert leased(rig, [5, 6]).num_tokens == 0
    assert wanted.num_tokens == 4


def test_what_a_tenant_has_parked_beyond_its_quota_goes_before_what_others_have_within() -> None:
    rig = Rig(16, 4, host_quota=2)
    modest = leased(rig, [1, 2, 3, 4], "modest")
    older, newer = leased(rig, [5, 6], "greedy"), leased(rig, [7, 8], "greedy")
    assert rig.manager.num_parked("greedy") == 2
    third = leased(rig, [9, 10], "greedy")
    assert [t.num_tokens for t in (modest, older, newer, third)] == [4, 0, 2, 2]
    # Nobody is beyond: now the one parked longest ago makes way for a sequence that is to run.
    runner = rig.run([11, 12])
    rig.park(runner)
    assert [t.num_tokens for t in (modest, older, newer, third, runner)] == [2, 0, 2, 2, 2]
    assert rig.manager.take_truncated() == {modest, older}


def test_a_tenant_alone_beyond_its_quota_keeps_what_fits_and_displaces_only_itself() -> None:
    rig = Rig(16, 4, host_quota=2)
    modest = leased(rig, [1, 2, 3, 4], "modest")
    greedy = leased(rig, list(range(10, 18)), "greedy")
    assert (modest.num_tokens, greedy.num_tokens) == (4, 4)


def test_blocks_that_parked_tables_share_count_once() -> None:
    rig = Rig(16, 16, host_quota=3)
    first = leased(rig, [1, 2, 3, 4, 5])
    branch = rig.manager.fork(first, 5)
    rig.tables.append(branch)
    rig.manager.park(branch)
    assert rig.manager.num_parked("t") == 3
    rig.release(first)
    assert rig.manager.num_parked("t") == 3
    rig.manager.truncate(branch, 2)
    assert rig.manager.num_parked("t") == 1
    rig.release(branch)
    assert rig.manager.num_parked("t") == 0
    rig.check()


def test_a_tail_that_others_hold_too_is_given_up_only_where_nothing_better_is_parked() -> None:
    """It would free nothing."""
    rig = Rig(16, 3)
    shared = leased(rig, [1, 2])
    branch = rig.manager.fork(shared, 2)
    rig.tables.append(branch)
    rig.manager.park(branch)
    alone = leased(rig, [3, 4, 5, 6])
    rig.park(rig.run([7, 8]))
    assert [t.num_tokens for t in (shared, branch, alone)] == [2, 2, 2]


def test_a_table_that_is_still_being_written_gives_up_nothing_for_a_slot_that_it_cannot_give() -> None:
    rig = Rig(16, 4)
    settled = leased(rig, [1, 2, 3, 4])
    rig.manager.unpark(settled)
    under_way = rig.run([5, 6, 7, 8])
    rig.manager.park(under_way)
    rig.manager.suspend(under_way)
    rig.manager.flush()
    rig.manager.park(settled)
    rig.manager.suspend(rig.run([9, 10]))
    assert (settled.num_tokens, under_way.num_tokens) == (2, 4)
    rig.copy_all()


# What it counts


def test_swaps_are_counted_by_what_they_are_for() -> None:
    rig = Rig(8, 8)
    preempted = rig.run([1, 2, 3, 4])
    rig.manager.write_ahead(preempted.blocks[:1], 1)
    rig.copy_all()
    rig.park(preempted)
    lease = leased(rig, [5, 6])
    rig.release(rig.run([9] * 16))
    rig.manager.resume(preempted)
    rig.copy_all()
    rig.release(lease)
    rig.admit([5, 6, 7])
    rig.copy_all()
    stats = rig.manager.stats
    assert stats.copied_out == {Reason.AHEAD: 1, Reason.PREEMPT: 1, Reason.PARK: 1}
    assert stats.copied_in == {Reason.RESUME: 2, Reason.PREFIX: 1}
    assert (stats.host_hits_resumed, stats.host_hits_prefix) == (4, 2)
    assert stats.thrash == 3


def test_what_was_clean_when_it_was_preempted_is_counted_for_sequences_of_some_length() -> None:
    rig = Rig(16, 16)
    rig.park(rig.run([1, 2]))
    table = rig.run(list(range(11)))
    rig.manager.write_ahead(table.blocks[:3], 3)
    rig.copy_all()
    rig.park(table)
    leased(rig, list(range(20, 30)))
    assert (rig.manager.stats.preempted_full, rig.manager.stats.preempted_clean) == (5, 3)


def test_blocks_are_counted_by_state() -> None:
    rig = Rig(8, 8)
    table = rig.run([1, 2, 3])
    rig.manager.reserve(table, 5)
    assert +rig.manager.stats.states == {State.DIRTY: 2, State.RESERVED: 1}
    rig.park(table)
    assert +rig.manager.stats.states == {State.CLEAN: 2}
