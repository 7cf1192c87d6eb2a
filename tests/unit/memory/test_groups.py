"""KV groups: what a window needs of a sequence, and what becomes of the blocks that it has passed."""

import pytest
import torch
from memory_rig import SIZE, Rig, states
from msgspec.structs import replace

from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.memory.block import BlockTable, State
from tidegate.engine.memory.copies import Reason
from tidegate.engine.memory.groups import KVGroup, longest_sequence, most_blocks
from tidegate.engine.memory.layout import BlockLayout, group_layers, places_of
from tidegate.engine.memory.sizing import size_tiers

FULL, WINDOW = 0, 1
TOKENS = list(range(1, 100))


def spans(table: BlockTable) -> list[tuple[int, int]]:
    """Of each group the numbers of the blocks that it holds, [start, end)."""
    return [(group.start, group.end) for group in table.groups]


# What a window needs


@pytest.mark.parametrize("window", [2, 3, 8, 9, 64])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_what_is_needed_is_what_the_next_position_sees(window: int, size: int) -> None:
    """Position n sees (n - window, n]: from the block of the first of these on, and a block more is kept."""
    group = KVGroup(window)
    for n in range(200):
        seen = [j for j in range(n) if j > n - window]
        needed = group.needed_from(n, size)
        assert all(j // size >= needed for j in seen)
        assert needed == (min(seen) // size if seen else needed)
        assert group.kept_from(n, size) == max(0, needed - 1)


@pytest.mark.parametrize("window", [None, 2, 7, 20])
@pytest.mark.parametrize("step", [1, 5, 16])
def test_no_sequence_holds_more_than_the_most(window: int | None, step: int) -> None:
    """However its steps are cut, up to the limit that was given."""
    group, size = KVGroup(window), 4
    held = [
        -(-min(n + step, 120) // size) - group.kept_from(n, size) for n in range(120)
    ]  # before a step is committed, from any length
    assert max(held) <= group.most_blocks(120, step, size)
    if window is not None:
        assert group.most_blocks(10_000, step, size) < 16


def test_the_longest_sequence_is_what_all_groups_hold_together() -> None:
    kinds = (KVGroup(), KVGroup(window=8))
    longest = longest_sequence(kinds, 30, 1000, uncommitted=4, block_size=4)
    assert most_blocks(kinds, longest, 4, 4) <= 30 < most_blocks(kinds, longest + 4, 4, 4)
    assert longest_sequence((KVGroup(window=8),), 6, 1000, uncommitted=4, block_size=4) == 1000
    assert longest_sequence(kinds, 0, 1000, uncommitted=4, block_size=4) == 0


def test_a_model_of_windows_alone_takes_sequences_longer_than_the_device_tier() -> None:
    config = EngineConfig(model="m", device_kv_tokens=256, host_kv_tokens=0)
    given = {"block_size": 16, "block_bytes": 1024, "model_len": 4096, "step_tokens": 32, "free": 1 << 30}
    windows = size_tiers(config, **given, groups=(KVGroup(window=64),))
    assert (windows.device, windows.max_model_len) == (16, 4096)
    both = size_tiers(config, **given, groups=(KVGroup(window=64), KVGroup()))
    # 32 blocks: one to spare for each group, and up to 10 for the window and the two steps in flight.
    assert (both.device, both.max_model_len) == (32, 20 * 16)
    one_step = size_tiers(replace(config, pipeline_depth=1), **given, groups=(KVGroup(64), KVGroup()))
    assert one_step.max_model_len == 22 * 16
    with pytest.raises(ConfigError, match="the device tier holds 0 tokens"):
        size_tiers(config, **{**given, "block_size": 256}, groups=(KVGroup(window=64), KVGroup()))


# Which layers are a group


@pytest.mark.parametrize(
    ("windows", "sizes"),
    [
        ((None,) * 28, [28]),
        ((4096,) * 32, [32]),
        ((None,) * 21 + (4096,) * 7, [7, 7, 7, 7]),
        ((4096, None) * 13, [13, 13]),
        # As in models with one layer of full attention in six: two places of 28 stay empty.
        (tuple(None if i % 6 == 5 else 512 for i in range(26)), [4, 4, 4, 4, 4, 2, 4]),
        ((None, 64, 64), [1, 1, 1]),
    ],
)
def test_layers_are_cut_into_groups_of_one_size(windows: tuple[int | None, ...], sizes: list[int]) -> None:
    """As few as go with an eighth of the room empty; every layer has a place among those of its window."""
    groups = group_layers(windows)
    assert [len(group.layers) for group in groups] == sizes
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.kind.window for group in groups for layer in group.layers)
    for layer, (number, place) in enumerate(places_of(groups)):
        assert groups[number].layers[place] == layer


def test_a_token_takes_its_place_in_the_blocks_of_every_group() -> None:
    layout = BlockLayout(4, 2, 8, block_size=16, dtype=torch.bfloat16, num_groups=3)
    assert layout.block_bytes == 4 * 2 * 2 * 8 * 16 * 2
    assert layout.bytes_per_token == 3 * layout.block_bytes // 16
    assert layout.allocate(5, torch.device("cpu")).nbytes == 5 * layout.block_bytes


# What becomes of blocks


def test_a_window_lets_go_of_blocks_and_full_attention_does_not() -> None:
    """With a window of 4 and blocks of 2, position 12 sees [9, 12]; one block more than that is kept."""
    rig = Rig(16, 0, caches=False, windows=(None, 4))
    table = rig.run(TOKENS[:12])
    assert spans(table) == [(0, 6), (3, 6)]
    assert rig.manager.num_available == 16 - 6 - 3
    rig.check()
    rig.release(table)
    assert rig.manager.num_available == 16


def test_what_a_window_has_passed_waits_for_the_steps_under_way() -> None:
    """A step was launched while the block was still in the table: its slot is nobody else's until then."""
    rig = Rig(16, 0, caches=False, windows=(None, 4))
    table = rig.admit(TOKENS[:14])
    assert rig.manager.reserve(table, 12)
    first = rig.launch(table)
    assert rig.manager.reserve(table, 14)
    second = rig.launch(table)
    rig.manager.collected(first)
    rig.manager.commit(table, 12, TOKENS[:12])
    assert spans(table) == [(0, 7), (3, 7)]
    assert (rig.manager.num_draining, rig.manager.device.num_free) == (3, 16 - 14)
    rig.manager.collected(second)
    assert (rig.manager.num_draining, rig.manager.device.num_free) == (0, 16 - 11)
    rig.check()


def test_what_a_window_has_passed_serves_on_as_a_known_prefix() -> None:
    """Another prompt that begins alike, but is shorter, finds the blocks of its own window."""
    rig = Rig(32, 0, windows=(None, 4))
    table = rig.run(TOKENS[:20])
    assert spans(table) == [(0, 10), (7, 10)]
    found = rig.manager.find_prefix(rig.manager.new_table("t"), [*TOKENS[:8], 0])
    assert (found.length, len(found.groups[FULL]), len(found.groups[WINDOW])) == (4, 4, 2)
    other = rig.run([*TOKENS[:8], 0])
    assert spans(other) == [(0, 5), (2, 5)]
    rig.check()


def test_a_hit_needs_the_blocks_of_the_window_before_it() -> None:
    """Those of full attention alone are none: the next token would look back at nothing."""
    rig = Rig(32, 0, windows=(None, 4))
    table = rig.run(TOKENS[:12])
    for place in (4, 2):
        key = table.keys[place]
        block = rig.manager._store.index.get(WINDOW, key)
        assert block is not None
        rig.manager._store.forget(block)
        rig.manager._store.settle(block)
    # Of [0, 12) the window of the next position needs blocks 4 and 5, of [0, 8) 2 and 3; of [0, 4) 0 and 1.
    found = rig.manager.find_prefix(rig.manager.new_table("t"), TOKENS[:13])
    assert (found.length, [len(blocks) for blocks in found.groups]) == (2, [2, 2])
    rig.check()


def test_only_what_the_groups_keep_is_swapped() -> None:
    rig = Rig(16, 16, caches=False, windows=(None, 4))
    table = rig.run(TOKENS[:12])
    rig.manager.suspend(table)
    assert rig.copy_all() == 6 + 3
    assert rig.manager.num_available == 16
    blocker = rig.run(TOKENS[50:64])
    assert spans(blocker) == [(0, 7), (4, 7)]
    rig.release(blocker)
    assert states(table).count(State.HOST_ONLY) > 0
    rig.manager.resume(table)
    rig.copy_all()
    assert table.is_ready
    rig.compute(table, TOKENS[:13])
    assert spans(table) == [(0, 7), (4, 7)]
    assert rig.manager.stats.copied_out[Reason.PREEMPT] == 9
    rig.check()


def test_host_hits_count_each_token_once() -> None:
    rig = Rig(16, 32, windows=(None, 64))
    table = rig.run(TOKENS[:7])
    rig.park(table)
    rig.release(rig.run(TOKENS[50:64]))
    rig.manager.resume(table)
    assert rig.manager.stats.host_hits_resumed == 7


@pytest.mark.parametrize(("length", "kept", "left"), [(12, 9, 0), (6, 6, 2)])
def test_a_parked_table_that_loses_its_tail_has_nothing_left_behind_a_window(length, kept, left) -> None:
    """More than a block, that is. Where no window has let go of anything the rest serves on."""
    rig = Rig(16, kept + 1, caches=False, windows=(None, 4))
    table = rig.run(TOKENS[:length])
    rig.manager.park(table)
    rig.manager.suspend(table)
    assert rig.copy_all() == kept
    # Another sequence has to leave with two blocks in each group, and comes first.
    rig.manager.suspend(rig.run([50, 51, 52]))
    rig.copy_all()
    assert set(rig.manager.take_truncated()) == {table}
    assert (table.num_tokens, len(table.blocks)) == (left, left)
    rig.check()


def test_a_failed_load_in_one_group_costs_all_groups_the_same_tokens() -> None:
    rig = Rig(12, 16, caches=False, windows=(None, 64))
    table = rig.run(TOKENS[:8])
    rig.park(table)
    rig.release(rig.run(TOKENS[40:52]))
    rig.manager.resume(table)
    rig.manager.flush()
    # Copies are ordered group by group: the last is the last block of the window's.
    ticket = max(rig.transfer.under_way)
    for other in [t for t in rig.transfer.under_way if t != ticket]:
        rig.transfer.finish(other, ok=True)
    rig.transfer.finish(ticket, ok=False)
    rig.manager.poll()
    assert set(rig.manager.take_truncated()) == {table}
    assert (table.num_tokens, spans(table)) == (6, [(0, 3), (0, 3)])
    rig.check()


# Going back


def test_a_branch_shares_every_group_and_copies_each_tail() -> None:
    rig = Rig(32, 0, caches=False, windows=(None, 4))
    parent = rig.run(TOKENS[:13])
    child = rig.manager.fork(parent, 13)
    rig.tables.append(child)
    assert spans(child) == spans(parent) == [(0, 7), (4, 7)]
    rig.manager.resume(child)
    assert rig.manager.num_missing(child, 14) == 2
    assert rig.manager.reserve(child, 14)
    copies = rig.manager.launched(child, rig.launch())
    assert len(copies) == 2
    assert all(group.source is parent.groups[i].at(6) for i, group in enumerate(child.groups))
    rig.check()


def test_a_table_may_go_back_by_a_block_and_not_behind_its_windows() -> None:
    """A stop string a few tokens back costs nothing; a branch far back begins anew."""
    rig = Rig(32, 0, caches=False, windows=(None, 4))
    table = rig.run(TOKENS[:13])
    for back, left in ((1, 12), (SIZE, 11), (SIZE + 2, 0), (8, 0)):
        branch = rig.manager.fork(table, 13 - back)
        assert branch.num_tokens == left == rig.manager.reach(table, 13 - back)
        assert bool(branch.blocks) == bool(left)
        rig.manager.release(branch)
    rig.manager.truncate(table, 11)
    assert (table.num_tokens, spans(table)) == (11, [(0, 6), (4, 6)])
    rig.check()
    rig.manager.truncate(table, 5)
    assert (table.num_tokens, spans(table)) == (0, [(0, 0), (0, 0)])
    rig.check()
    rig.compute(table, TOKENS[:9])
    assert spans(table) == [(0, 5), (2, 5)]
    rig.check()


def test_room_is_asked_for_what_a_window_comes_to_hold_at_once() -> None:
    """A prompt longer than the device tier may enter, where its groups let go of blocks on the way."""
    rig = Rig(10, 0, caches=False, windows=(4,))
    table = rig.manager.new_table("t")
    start = rig.manager.start_of(table, TOKENS)
    assert rig.manager.num_to_come(table, start, 99) == KVGroup(4).most_blocks(99, 4 * SIZE, SIZE) == 8
    rig.manager.adopt(table, start)
    rig.tables.append(table)
    for end in range(8, 96, 8):
        rig.compute(table, TOKENS[:end])
        rig.check()
    assert spans(table) == [(41, 44)]


def test_what_was_not_finite_is_forgotten_behind_the_window_too() -> None:
    rig = Rig(32, 0, windows=(None, 4))
    table = rig.run(TOKENS[:12])
    rig.manager.distrust(table)
    rig.release(table)
    assert rig.manager.find_prefix(rig.manager.new_table("t"), TOKENS[:5]).length == 0
    assert rig.manager.num_reclaimable == 0
    rig.check()
