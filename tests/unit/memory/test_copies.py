"""Neighbouring blocks travel together, and the bytes end where they would have ended one by one."""

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engine.memory.copies import CopyOp, Run, merge_runs

BLOCKS = 12


@st.composite
def batches(draw: st.DrawFn) -> list[CopyOp]:
    """What a manager may order at once: no slot twice."""
    count = draw(st.integers(0, BLOCKS))
    device = draw(st.permutations(range(BLOCKS)))
    host = draw(st.one_of(st.just(device), st.permutations(range(BLOCKS))))
    to_host = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return [CopyOp(7 + i, to_host[i], device[i], host[i]) for i in range(count)]


@given(batches())
def test_runs_hold_each_copy_once(ops: list[CopyOp]) -> None:
    """Taken apart again, the runs are the batch."""
    apart = [
        CopyOp(ticket, run.to_host, run.device_start + i, run.host_start + i)
        for run in merge_runs(ops)
        for i, ticket in enumerate(run.tickets)
    ]
    assert sorted(apart, key=lambda op: op.ticket) == ops


@given(batches())
def test_runs_are_as_few_as_possible(ops: list[CopyOp]) -> None:
    """No two runs could have been one."""
    runs = list(merge_runs(ops))
    ends = {(r.to_host, r.device_start + len(r.tickets), r.host_start + len(r.tickets)) for r in runs}
    starts = {(r.to_host, r.device_start, r.host_start) for r in runs}
    assert not ends & starts


def test_blocks_that_are_neighbours_in_one_tier_only_stay_apart() -> None:
    ops = [CopyOp(1, True, 0, 5), CopyOp(2, True, 1, 7), CopyOp(3, True, 2, 8), CopyOp(4, False, 3, 9)]
    assert list(merge_runs(ops)) == [
        Run(False, 3, 9, [4]),
        Run(True, 0, 5, [1]),
        Run(True, 1, 7, [2, 3]),
    ]
