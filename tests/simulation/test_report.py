"""What the engine tells about itself adds up, and is what stands in its books."""

import msgspec
import pytest
from scenes import ends, request, step, submit
from world import World

from tidegate.engine.messages import (
    FREE_SLOT,
    PREFIX_SLOT,
    SLOT_LETTERS,
    Inspect,
    Inspection,
    Limit,
    StepOutput,
)
from tidegate.engine.request import Parent


def inspect(world: World, max_sequences: int = 1000) -> Inspection:
    world.core.handle(Inspect(max_sequences))
    (out,) = step(world, 1)
    assert out.inspection is not None
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(out), type=StepOutput)
    assert decoded.inspection == out.inspection
    assert step(world, 1)[0].inspection is None, "it was asked for once"
    return out.inspection


def test_each_slot_of_both_tiers_is_shown_by_the_state_of_its_block():
    world = World(1, device_blocks=24, host_blocks=48, park_grace=0.0)
    submit(world, *(request(f"r{i}", 9, 30) for i in range(5)), request("idle", 6, 9, emit_upto=2))
    seen: set[str] = set()
    for _ in range(60):
        world.core.handle(Inspect())
        stats = world.core.stats()
        (out,) = step(world, 1)
        assert out.inspection is not None
        for letters, tier in ((out.inspection.device, stats.device), (out.inspection.host, stats.host)):
            text = letters.decode()
            assert len(text) == tier.total
            assert text.count(FREE_SLOT) == tier.free
            for state, count in tier.states.items():
                # A known prefix that nobody holds has a letter of its own, whatever its state.
                assert text.count(SLOT_LETTERS.get(state, "?")) <= count
            seen |= set(text)
    assert seen == {FREE_SLOT, PREFIX_SLOT, *SLOT_LETTERS.values()}


def test_sequences_are_shown_with_their_progress_and_their_place():
    world = World(1, park_grace=0.0, prefix_caching=False)
    submit(world, request("parked", 9, 9, emit_upto=2, tenant="a"), request("leased", 4, 2, leased=True))
    step(world, 30)
    submit(world, request("running", 8, 30, priority=3))
    step(world, 4)
    shown = {view.request_id: view for view in inspect(world).sequences}
    assert [shown[name].status for name in ("running", "parked", "leased")] == ["running", "parked", "leased"]
    parked = shown["parked"]
    assert (parked.tenant, parked.prompt_tokens, parked.output_tokens, parked.computed_tokens) == (
        "a",
        9,
        2,
        10,
    )
    assert parked.device_blocks + parked.host_blocks == 3
    assert shown["running"].priority == 3
    assert [view.request_id for view in inspect(world, max_sequences=1).sequences] == ["running"]


def test_each_wait_for_a_row_counts_once():
    world = World(2, preemption="swap", park_grace=0.0, host_blocks=80)
    submit(world, *(request(f"r{i}", 6, 40, leased=True) for i in range(4)))
    submit(world, request("idle", 6, 9, emit_upto=2))
    step(world, 500)
    world.core.handle(Limit("idle", 9))
    outputs = step(world, 50)
    assert "idle" in ends(outputs)
    prompt = [*request("r1", 6, 40).prompt_token_ids, 7]
    submit(world, request("turn", prompt=prompt, parent=Parent("r1")))
    step(world, 50)
    stats = world.core.stats()
    assert stats.preemptions_swap > 0
    assert sum(stats.preempt_stall.counts) == stats.preemptions_swap
    assert sum(stats.resume_wait.counts) == 2, "one that got credit, one that continues another"
    assert stats.preempt_stall.sum > 0
    assert sum(stats.step_time.counts) == stats.steps
    assert stats.scheduled_sequences >= stats.output_tokens


def test_what_was_moved_and_found_adds_up():
    world = World(3, preemption="swap", park_grace=0.0, host_blocks=80)
    submit(world, *(request(f"r{i}", 6, 40, leased=i < 2) for i in range(5)))
    step(world, 600)
    stats = world.core.stats()
    assert sum(stats.swap_out.bytes.values()) == stats.swap_out_bytes > 0
    assert sum(stats.swap_in.bytes.values()) == stats.swap_in_bytes > 0
    assert set(stats.swap_out.bytes) >= {"preempt", "park"}
    assert set(stats.swap_in.bytes) == {"resume"}
    assert stats.host_hit_tokens_resumed > 0
    assert 0 < stats.preempted_clean_blocks <= stats.preempted_blocks
    assert stats.leased == 2
    assert stats.leased_blocks == 2 * 12
    assert stats.swap_out.queue_bytes == stats.swap_in.queue_bytes == 0
    for tier in (stats.device, stats.host):
        assert sum(tier.states.values()) == tier.total - tier.free


@pytest.mark.parametrize(("seconds", "share"), [(0.1, 0.1), (5.0, 1.0)])
def test_the_use_of_the_link_is_a_share_of_the_time(seconds, share):
    world = World(1)
    world.core.stats()
    world.clock.time += 1.0
    world.manager.stats.seconds_out += seconds
    assert world.core.stats().swap_out.utilization == pytest.approx(share, rel=0.01)
    world.clock.time += 1.0
    assert world.core.stats().swap_out.utilization == 0
