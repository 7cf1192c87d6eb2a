"""The engine in a fake world: every request ends once, with its own tokens, and nothing leaks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import Load, Outcome, random_world, run_seed, stormy_world
from planted import (
    with_blocks_let_go_within_the_window,
    with_hits_that_lack_the_window,
    with_one_start_for_all_groups,
)
from world import Faults, World

from tidegate.engine import policy
from tidegate.engine.admission import Admission
from tidegate.engine.memory.block import Block, BlockTable
from tidegate.engine.memory.store import BlockStore
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.request import FinishReason
from tidegate.engine.roster import Roster
from tidegate.engine.sequence import Sequence

SEEDS = int(os.environ.get("ENGINE_SEEDS", "60"))
"""CI's share: `make soak` runs a million requests."""


def run_worlds(count: int, make_world: Callable[[int], World] = random_world) -> list[Outcome]:
    return [run_seed(seed, make_world) for seed in range(count)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("preemption", ["auto", "swap", "recompute"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_requests_end_with_their_own_tokens_under_pressure(depth, preemption, prefix_caching):
    """With KV for a fraction of the need, whatever the mode, tokens are those of each request alone."""
    preempted = 0
    for seed in range(12):
        world = World(seed, depth=depth, preemption=preemption, prefix_caching=prefix_caching)
        load = Load(world, 25, chaos=0.0)
        load.run()
        load.settle()
        load.check()
        assert set(load.finished.values()) <= {FinishReason.MAX_TOKENS, FinishReason.STOP_TOKEN}
        preempted += world.core.stats().preemptions_swap + world.core.stats().preemptions_recompute
    assert preempted > 20, "the load was meant to need preemption"


@pytest.mark.timeout(0)
def test_chaos_breaks_no_request():
    """Cancels, stops, stalls, bursts, late and failed copies, failed steps: all end, and nothing leaks."""
    outcomes = run_worlds(SEEDS)
    requests, choices = (sum(getattr(o, name) for o in outcomes) for name in ("requests", "choices"))
    print(f"\n{requests} requests, {choices} choices, in {SEEDS} worlds: each ended once, with its own words")
    assert sum(o.preemptions for o in outcomes) > SEEDS
    assert sum(o.blocks_copied for o in outcomes) > 10 * SEEDS


def test_a_seed_replays_byte_for_byte():
    """In another process too, where sets of strings and bytes have another order."""
    soak = Path(__file__).with_name("soak.py")
    printed = [
        subprocess.run(
            [sys.executable, "-P", soak, "--seeds", "6", "--jobs", "1", "--digests"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    digests = [line.split() for line in printed[0].splitlines() if line.startswith("seed ")]
    assert len({digest for _, _, digest in digests}) == 6, "worlds of different seeds are meant to differ"
    assert printed[0].splitlines()[:6] == printed[1].splitlines()[:6]
    assert digests[3][2] == run_seed(3).digest.hex()


def test_the_last_report_before_the_engine_idles_is_true():
    """Whoever watches the load is not left with what was under way a moment before the end."""
    for seed in range(60):
        world = World(seed, faults=Faults(copy_delay=0.5))
        load = Load(world, 20, chaos=0.5)
        load.run()
        while world.core.has_work():
            load.beat()
        assert load.reported == world.core.stats(), f"seed {seed}"


# Planted faults: a simulation that cannot fail proves nothing.


def without_a_fence(patch: pytest.MonkeyPatch) -> None:
    """What a step still uses is free as soon as its table has let go of it."""
    launched = BlockManager.launched

    def unfenced(self: BlockManager, table: BlockTable, step_id: int) -> list[tuple[int, int]]:
        copies = launched(self, table, step_id)
        table.fence = 0
        return copies

    patch.setattr(BlockManager, "launched", unfenced)


def without_a_reference(patch: pytest.MonkeyPatch) -> None:
    """A branch shares the blocks of its parent and does not say so."""
    fork = BlockManager.fork

    def unheld(self: BlockManager, table: BlockTable, num_tokens: int) -> BlockTable:
        child = fork(self, table, num_tokens)
        for block in child.blocks:
            del block.holders[child]
        return child

    patch.setattr(BlockManager, "fork", unheld)


def without_a_generation(patch: pytest.MonkeyPatch) -> None:
    """What a step sampled for a sequence counts, whatever has become of the sequence meanwhile."""
    patch.setattr(Sequence, "generation", property(lambda self: 0, lambda self, value: None))


def without_a_ticket(patch: pytest.MonkeyPatch) -> None:
    """A second report of a copy ends whatever copy its block has under way by then."""
    owners: dict[int, Block] = {}
    poll = BlockStore.poll

    def unasked(self: BlockStore) -> None:
        owners.update(self.copies)
        reports = self._transfer.poll()
        self.copies.update((report.ticket, owners[report.ticket]) for report in reports)
        with patch.context() as moment:
            moment.setattr(self._transfer, "poll", lambda: reports)
            poll(self)

    patch.setattr(BlockStore, "poll", unasked)


def with_a_queue_that_forgets(patch: pytest.MonkeyPatch) -> None:
    """The first in the ready queue is passed over for ever."""
    find_row = Admission.find_row
    patch.setattr(Admission, "find_row", lambda self, seq: seq.arrival % 50 != 7 and find_row(self, seq))


def with_a_reserve_that_never_ends(patch: pytest.MonkeyPatch) -> None:
    """No newcomer leaves enough room, not even the only one."""
    patch.setattr(policy, "growth_reserve", lambda *_: 10_000)


WINDOW_FAULTS = [
    with_blocks_let_go_within_the_window,
    with_hits_that_lack_the_window,
    with_one_start_for_all_groups,
]


@pytest.mark.parametrize(
    "plant",
    [
        *WINDOW_FAULTS,
        without_a_fence,
        without_a_reference,
        without_a_generation,
        without_a_ticket,
        with_a_queue_that_forgets,
        with_a_reserve_that_never_ends,
    ],
)
def test_a_planted_fault_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, LookupError, RuntimeError)):
        run_worlds(100, stormy_world)


@pytest.mark.parametrize(
    "plant", [*WINDOW_FAULTS, without_a_fence, without_a_reference, without_a_generation]
)
def test_a_planted_fault_is_caught_by_what_it_does_to_tokens_and_blocks(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the engine's own books are not looked at."""
    plant(monkeypatch)
    monkeypatch.setattr(BlockManager, "check_integrity", lambda self, tables: None)
    monkeypatch.setattr(Roster, "check_integrity", lambda self: None)
    with pytest.raises((AssertionError, LookupError, RuntimeError)):
        run_worlds(100, stormy_world)
