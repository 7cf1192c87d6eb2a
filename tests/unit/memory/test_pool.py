"""One tier's slots by index."""

import random

import pytest

from tidegate.engine.memory.pool import ROOM_TO_GROW, BlockPool


def test_neighbours_go_together() -> None:
    pool = BlockPool(20)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    pool.give(1)
    assert pool.take(after=3) == 4
    assert pool.take() == 5
    assert pool.take(after=0) == 1


def test_a_run_begins_where_there_is_room_to_grow() -> None:
    pool = BlockPool(2 * ROOM_TO_GROW)
    for _ in range(pool.num_blocks):
        pool.take()
    for index in (0, 3, *range(ROOM_TO_GROW, 2 * ROOM_TO_GROW), 4):
        pool.give(index)
    assert pool.take() == ROOM_TO_GROW
    for _ in range(ROOM_TO_GROW - 1):
        pool.take()
    assert [pool.take() for _ in range(3)] == [3, 4, 0]


def test_counts_what_is_free() -> None:
    pool = BlockPool(3)
    pool.take()
    assert pool.num_free == 2
    pool.give(0)
    assert pool.num_free == 3


def test_an_empty_pool_has_nothing_to_take() -> None:
    with pytest.raises(IndexError):
        BlockPool(0).take()


def test_giving_an_index_twice_raises_and_changes_nothing() -> None:
    pool = BlockPool(2)
    pool.give(pool.take())
    with pytest.raises(RuntimeError, match="block 0 is returned to its pool twice"):
        pool.give(0)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_integrity_wants_each_index_free_or_used_and_never_both() -> None:
    pool = BlockPool(3)
    index = pool.take()
    pool.check_integrity([index])
    for used in ([], [index, index], [index, 1], [7]):
        with pytest.raises(RuntimeError, match="do not make up the pool"):
            pool.check_integrity(used)


def test_random_takes_and_gives_agree_with_a_set() -> None:
    """Whatever the order, an index is held by one taker, and it is the neighbour wherever that is free."""
    rng = random.Random(0)
    pool = BlockPool(17)
    free, used = set(range(17)), set[int]()
    for _ in range(5_000):
        if free and (not used or rng.random() < 0.5):
            after = rng.choice((None, *used))
            index = pool.take(after)
            assert index == after + 1 if after is not None and after + 1 in free else index in free
            free.remove(index)
            used.add(index)
        else:
            index = rng.choice(sorted(used))
            pool.give(index)
            used.remove(index)
            free.add(index)
        assert pool.num_free == len(free)
    pool.check_integrity(used)
