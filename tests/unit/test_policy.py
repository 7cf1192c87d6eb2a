"""Whom to admit and whom to preempt: each rule by itself, over plain numbers."""

import pytest

from tidegate.engine import policy
from tidegate.engine.policy import Candidate


def candidate(
    *, stalled: bool = False, priority: int = 0, immune: bool = False, exclusive: int = 0, arrival: int = 0
) -> Candidate:
    return Candidate(stalled, priority, immune, exclusive, arrival)


def test_the_stalled_go_first_then_low_priority_then_those_not_just_back_then_the_largest() -> None:
    in_order = [
        candidate(stalled=True, priority=5, arrival=1),
        candidate(priority=0, exclusive=7, arrival=3),
        candidate(priority=0, exclusive=2, arrival=9),
        candidate(priority=0, exclusive=2, arrival=3),
        candidate(priority=0, immune=True, exclusive=9, arrival=9),
        candidate(priority=1, arrival=9),
    ]
    assert sorted(in_order, key=policy.victim_rank) == in_order


def test_nobody_is_displaced_for_one_that_came_later() -> None:
    old, young = candidate(arrival=1), candidate(arrival=2)
    assert policy.may_displace(old, young)
    assert not policy.may_displace(young, old)
    assert not policy.may_displace(old, old)


def test_priority_goes_before_arrival_and_the_stalled_before_both() -> None:
    urgent = candidate(priority=1, arrival=2)
    assert policy.may_displace(urgent, candidate(arrival=1))
    assert not policy.may_displace(candidate(arrival=1), urgent)
    assert policy.may_displace(candidate(arrival=9), candidate(stalled=True, priority=9, arrival=1))


def test_the_oldest_of_the_highest_priority_can_displace_everybody_and_is_displaced_by_nobody() -> None:
    everybody = [candidate(priority=p, arrival=a) for p in range(3) for a in range(3)]
    best = candidate(priority=2, arrival=0)
    assert all(policy.may_displace(best, other) for other in everybody if other != best)
    assert not any(policy.may_displace(other, best) for other in everybody)


def test_room_for_growth_is_whole_blocks_and_none_for_nobody() -> None:
    assert policy.growth_reserve(0, 16) == 0
    assert policy.growth_reserve(1, 16) == 1
    assert policy.growth_reserve(16, policy.GROWTH_ROOM) == 16


@pytest.mark.parametrize(("bytes_in", "tokens", "swaps"), [(10**6, 1000, True), (10**9, 10, False)])
def test_a_swap_is_chosen_where_the_link_is_faster_than_the_model(
    bytes_in: int, tokens: int, swaps: bool
) -> None:
    costs = policy.preemption_costs(
        bytes_out=0,
        bytes_in=bytes_in,
        queued_bytes=0,
        bytes_per_second=1e9,
        tokens=tokens,
        tokens_per_second=1e4,
    )
    assert costs.prefers_swap is swaps


def test_bytes_that_wait_before_it_make_a_swap_dearer() -> None:
    known = {"bytes_out": 10, "bytes_in": 10, "bytes_per_second": 1.0, "tokens": 1, "tokens_per_second": 1.0}
    calm = policy.preemption_costs(queued_bytes=0, **known)
    busy = policy.preemption_costs(queued_bytes=100, **known)
    assert busy.swap > calm.swap
    assert busy.recompute == calm.recompute


def test_no_more_is_written_ahead_than_the_link_carries_beside_a_step() -> None:
    def blocks(seconds: float, queued: int) -> int:
        return policy.write_ahead_blocks(
            seconds=seconds, bytes_per_second=1000.0, block_bytes=100, queued_blocks=queued
        )

    assert blocks(seconds=2.0, queued=0) == 20
    assert blocks(seconds=2.0, queued=15) == 5
    assert blocks(seconds=2.0, queued=30) == 0
    assert blocks(seconds=0.0, queued=0) == 0
