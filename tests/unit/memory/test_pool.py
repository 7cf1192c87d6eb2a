"""One tier's slots by index."""

import random

import pytest

from tidegate.engine.memory.pool import BlockPool


def test_takes_the_lowest_free_index_so_that_neighbours_go_together() -> None:
    pool = BlockPool(6)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    for index in (2, 0, 1):
        pool.give(index)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 4]


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
    """Whatever the order, an index is held by one taker, and the lowest free one is next."""
    rng = random.Random(0)
    pool = BlockPool(17)
    free, used = set(range(17)), set[int]()
    for _ in range(5_000):
        if free and (not used or rng.random() < 0.5):
            index = pool.take()
            assert index == min(free)
            free.remove(index)
            used.add(index)
        else:
            index = rng.choice(sorted(used))
            pool.give(index)
            used.remove(index)
            free.add(index)
        assert pool.num_free == len(free)
    pool.check_integrity(used)
