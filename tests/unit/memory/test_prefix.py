"""Prefix keys and the index of known blocks."""

import pytest

from tidegate.engine.memory.groups import FULL_ATTENTION, KVGroup
from tidegate.engine.memory.prefix import KEY_BYTES, BlockHasher, PrefixIndex

SIZE = 4


def keys_of(hasher: BlockHasher, tenant: str, token_ids: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    hasher.extend(keys, hasher.root(tenant), token_ids, len(token_ids) // SIZE)
    return keys


@pytest.fixture
def hasher() -> BlockHasher:
    return BlockHasher("model", SIZE, secret=b"secret")


def test_a_key_covers_every_token_before_it(hasher: BlockHasher) -> None:
    """Equal blocks behind different beginnings have different keys."""
    first = keys_of(hasher, "t", [1, 2, 3, 4, 9, 9, 9, 9])
    other = keys_of(hasher, "t", [1, 2, 3, 5, 9, 9, 9, 9])
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_equal_prefixes_have_equal_keys_whatever_follows(hasher: BlockHasher) -> None:
    first = keys_of(hasher, "t", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    other = keys_of(hasher, "t", [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13])
    assert first == other[:2]


def test_keys_grow_step_by_step_to_the_same_chain(hasher: BlockHasher) -> None:
    """Extending as tokens arrive gives what extending at once gives; what is there is not made again."""
    tokens = list(range(3 * SIZE))
    grown: list[bytes] = []
    for blocks in (1, 1, 3, 2):
        hasher.extend(grown, hasher.root("t"), tokens, blocks)
    assert grown == keys_of(hasher, "t", tokens)


def test_a_partial_block_has_no_key(hasher: BlockHasher) -> None:
    assert len(keys_of(hasher, "t", [0] * (2 * SIZE - 1))) == 1


def test_order_and_block_borders_count(hasher: BlockHasher) -> None:
    """Large ids, small ids and swapped ones never run into one another."""
    prompts = ([1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 3, 1 << 24], [1 << 24, 2, 3, 1], [0, 1, 2, 3])
    assert len({keys_of(hasher, "t", prompt)[0] for prompt in prompts}) == len(prompts)


def test_tenants_models_and_processes_share_nothing() -> None:
    """Another tenant, another model or another process's secret: other keys for the same tokens."""
    tokens = [1, 2, 3, 4]
    hashers = [BlockHasher("a", SIZE, b"1"), BlockHasher("b", SIZE, b"1"), BlockHasher("a", SIZE, b"2")]
    keys = {keys_of(hasher, tenant, tokens)[0] for hasher in hashers for tenant in ("x", "y")}
    assert len(keys) == 6


def test_a_tenant_cannot_take_another_name_by_its_choice_of_letters() -> None:
    """Tenant and model are told apart, though both are free text."""
    assert BlockHasher("b", SIZE, b"1").root("a") != BlockHasher("", SIZE, b"1").root("ab")
    assert BlockHasher("", SIZE, b"1").root("1:a") != BlockHasher("a", SIZE, b"1").root("1:")


def test_secrets_are_random_unless_given() -> None:
    assert BlockHasher("m", SIZE).root("t") != BlockHasher("m", SIZE).root("t")


def test_keys_have_128_bits(hasher: BlockHasher) -> None:
    assert KEY_BYTES * 8 == 128
    assert {len(key) for key in keys_of(hasher, "t", list(range(8)))} == {KEY_BYTES}


def test_the_first_block_under_a_key_stays() -> None:
    index: PrefixIndex[str] = PrefixIndex(FULL_ATTENTION, SIZE)
    assert index.add(0, b"k", "first")
    assert not index.add(0, b"k", "second")
    assert index.add(0, b"k", "first")
    assert index.get(0, b"k") == "first"
    assert index.values() == ["first"]


def test_the_longest_run_ends_at_the_first_gap() -> None:
    index: PrefixIndex[str] = PrefixIndex(FULL_ATTENTION, SIZE)
    for key in (b"0", b"1", b"3"):
        index.add(0, key, key.decode())
    assert index.longest([b"0", b"1", b"2", b"3"]).blocks == ["0", "1"]
    assert index.longest([b"2", b"3"]).blocks == []
    assert index.longest([]).blocks == []
    index.remove(0, b"0")
    assert index.longest([b"0", b"1"]).blocks == []
    assert len(index) == 2


def test_a_window_asks_for_what_it_sees_and_no_more() -> None:
    """The prefix ends where everything that some group needs behind it is known, however much lies before."""
    kinds = (KVGroup(), KVGroup(window=2 * SIZE + 1))
    keys = [bytes([i]) for i in range(6)]
    index: PrefixIndex[str] = PrefixIndex(kinds, SIZE)
    for i in range(6):
        index.add(0, keys[i], f"full {i}")
    assert index.longest(keys).length == 0
    for i in (0, 1, 3, 4):
        index.add(1, keys[i], f"window {i}")
    found = index.longest(keys)
    assert (found.length, found.groups[1]) == (5, ["window 3", "window 4"])
    assert list(found.numbered())[5:] == [(3, "window 3"), (4, "window 4")]
    index.remove(1, keys[4])
    assert index.longest(keys).groups == (["full 0", "full 1"], ["window 0", "window 1"])
    index.remove(0, keys[1])
    assert index.longest(keys).groups == (["full 0"], ["window 0"])


def test_groups_know_the_same_key_apart() -> None:
    index: PrefixIndex[str] = PrefixIndex((KVGroup(), KVGroup(window=8)), SIZE)
    assert index.add(0, b"k", "full")
    assert index.add(1, b"k", "window")
    assert (index.get(0, b"k"), index.get(1, b"k"), len(index)) == ("full", "window", 2)
