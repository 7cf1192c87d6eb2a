"""Turns and branches: a request that continues another starts from the KV that the other left."""

import random

import pytest
from scenes import ends, request, step, submit, tokens
from world import World, expected_tokens

from tidegate.engine.messages import Admitted, Finish, Limit, Release, StepOutput
from tidegate.engine.request import FinishReason, Parent, Request


@pytest.fixture(params=[1, 2], ids=["depth 1", "depth 2"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def admitted(outputs: list[StepOutput], name: str) -> Admitted:
    (found,) = [report for out in outputs for report in out.admitted if report.request_id == name]
    return found


def run_parent(world: World, num_prompt: int = 6, max_tokens: int = 7) -> list[int]:
    """Run a leased request to its end; prompt and output."""
    parent = request("parent", num_prompt, max_tokens, leased=True)
    submit(world, parent)
    outputs = step(world, 30)
    assert ends(outputs)["parent"].reason is FinishReason.MAX_TOKENS
    return parent.prompt_token_ids + tokens(outputs, "parent")


def continue_with(world: World, child: Request, steps: int = 40) -> list[StepOutput]:
    submit(world, child)
    outputs = step(world, steps)
    length = child.params.max_tokens or 0
    assert tokens(outputs, child.id) == expected_tokens(child, 0, length)
    return outputs


def test_a_turn_computes_only_what_is_new(depth):
    """Of its parent all has KV but the last token; the tail lies in the middle of a block."""
    world = World(1, depth=depth, prefix_caching=False)
    transcript = run_parent(world)
    before = world.core.stats().prompt_tokens
    turn = request("turn", prompt=[*transcript, 9, 8, 7], parent=Parent("parent"))
    outputs = continue_with(world, turn)
    assert admitted(outputs, "turn").cached_device_tokens == len(transcript) - 1
    assert world.core.stats().prompt_tokens - before == 4
    assert ends(outputs)["turn"].usage.cached_tokens == len(transcript) - 1


def test_what_lies_in_the_host_tier_is_loaded_and_not_computed(depth):
    world = World(1, depth=depth, park_grace=0.0, prefix_caching=False)
    transcript = run_parent(world)
    submit(world, request("other", 50, 4))
    step(world, 40)
    turn = request("turn", prompt=[*transcript, 9], parent=Parent("parent"))
    outputs = continue_with(world, turn)
    report = admitted(outputs, "turn")
    assert report.cached_host_tokens > 0
    assert report.cached_device_tokens + report.cached_host_tokens == len(transcript) - 1
    assert world.core.stats().recomputed_tokens == 0


def test_a_prompt_that_holds_nothing_new_computes_its_last_token(depth):
    world = World(1, depth=depth, prefix_caching=False)
    transcript = run_parent(world)
    again = request("again", prompt=transcript[:8], parent=Parent("parent"))
    assert admitted(continue_with(world, again), "again").cached_device_tokens == 7


def test_branches_leave_at_any_offset_and_leave_the_parent_alone(depth):
    """While it runs; each says what it would have said alone."""
    world = World(1, depth=depth, device_blocks=60, prefix_caching=False)
    parent = request("parent", 6, 40, leased=True)
    submit(world, parent)
    outputs = step(world, 16)
    transcript = parent.prompt_token_ids + tokens(outputs, "parent")
    assert len(transcript) > 14
    offsets = [14, 14, 13, 8, 3]
    branches = [
        request(f"branch {i}", prompt=[*transcript[:offset], 40 + i], parent=Parent("parent"))
        for i, offset in enumerate(offsets)
    ]
    submit(world, *branches)
    outputs += step(world, 60)
    assert tokens(outputs, "parent") == expected_tokens(parent, 0, 40)
    for branch, offset in zip(branches, offsets, strict=True):
        assert tokens(outputs, branch.id) == expected_tokens(branch, 0, 4)
        assert admitted(outputs, branch.id).cached_device_tokens == offset


def test_a_turn_goes_on_from_where_the_front_ended_its_parent(depth):
    """The engine was ahead of the stop string: what lies behind it never was."""
    world = World(1, depth=depth, prefix_caching=False)
    parent = request("parent", 6, 40, leased=True)
    submit(world, parent)
    outputs = step(world, 14)
    world.core.handle(Finish("parent", FinishReason.STOP_STRING, 0, 3))
    transcript = parent.prompt_token_ids + tokens(outputs, "parent")[:3]
    turn = request("turn", prompt=[*transcript, 48, 47], max_tokens=9, parent=Parent("parent"))
    outputs = continue_with(world, turn)
    assert admitted(outputs, "turn").cached_device_tokens == len(transcript)


def test_a_choice_is_continued_by_its_number(depth):
    world = World(1, depth=depth, prefix_caching=False)
    parent = request("parent", 6, 6, n=3, leased=True)
    submit(world, parent)
    outputs = step(world, 30)
    for choice in range(3):
        told = [t for out in outputs for d in out.deltas if d.choice == choice for t in d.token_ids]
        assert told == expected_tokens(parent, choice, 6)
        turn = request(
            f"turn {choice}", prompt=[*parent.prompt_token_ids, *told, 9], parent=Parent("parent", choice)
        )
        assert admitted(continue_with(world, turn), turn.id).cached_device_tokens == 11


@pytest.mark.parametrize(
    "turn",
    [
        request("turn", 12, parent=Parent("nobody")),
        request("turn", 12, parent=Parent("parent", 1)),
        request("turn", 12, parent=Parent("parent"), tenant="another"),
    ],
    ids=["unknown", "no such choice", "another tenant's"],
)
def test_without_a_parent_that_is_its_own_a_request_runs_like_any_other(turn):
    world = World(1, prefix_caching=False)
    transcript = run_parent(world)
    turn.prompt_token_ids[:10] = transcript[:10]
    report = admitted(continue_with(world, turn), "turn")
    assert (report.cached_device_tokens, report.cached_host_tokens) == (0, 0)


def test_nothing_is_kept_behind_the_end_of_a_lease_or_without_one(depth):
    world = World(1, depth=depth, prefix_caching=False)
    transcript = run_parent(world)
    submit(world, request("unleased", 6, 4))
    step(world, 20)
    assert world.core.stats().device.free < world.device_blocks
    world.core.handle(Release(["parent", "unleased", "unknown"]))
    step(world, 5)
    assert world.core.stats().device.free == world.device_blocks
    turn = request("turn", prompt=[*transcript, 9], parent=Parent("parent"))
    assert admitted(continue_with(world, turn), "turn").cached_device_tokens == 0


@pytest.mark.parametrize("host_blocks", [0, 2, 40])
def test_what_is_leased_holds_up_nobody(depth, host_blocks):
    """Its room is anybody's, at once; where the host tier cannot take it, it is computed again."""
    world = World(1, depth=depth, host_blocks=host_blocks, park_grace=1e9, prefix_caching=False)
    transcript = run_parent(world, num_prompt=20, max_tokens=20)
    outputs = continue_with(world, request("other", 54, 4), steps=20)
    assert ends(outputs)["other"].reason is FinishReason.MAX_TOKENS
    turn = request("turn", prompt=[*transcript, 9], parent=Parent("parent"))
    report = admitted(continue_with(world, turn), "turn")
    known = report.cached_device_tokens + report.cached_host_tokens
    assert known == (len(transcript) - 1 if host_blocks == 40 else 4 * host_blocks)


def test_a_turn_without_credit_is_not_computed_and_loses_nothing(depth):
    world = World(1, depth=depth, park_grace=0.0, prefix_caching=False)
    transcript = run_parent(world)
    turn = request("turn", prompt=[*transcript, 9, 8], max_tokens=4, parent=Parent("parent"), emit_upto=0)
    submit(world, turn)
    world.core.handle(Release(["parent"]))
    outputs = step(world, 10)
    assert not [said for out in outputs for said in (*out.admitted, *out.progress)]
    world.core.handle(Limit("turn", 4))
    outputs = step(world, 20)
    report = admitted(outputs, "turn")
    assert report.cached_device_tokens + report.cached_host_tokens == len(transcript) - 1
    assert tokens(outputs, "turn") == expected_tokens(turn, 0, 4)


def test_conversations_compute_every_position_once(depth):
    """Many of them, over several turns, with KV on the device for a few: the host tier holds the rest."""
    for seed in range(3):
        world = World(seed, depth=depth, host_blocks=300, preemption="swap", prefix_caching=seed == 1)
        rng = random.Random(seed)
        conversations: list[list[int]] = [[] for _ in range(8)]
        new = 0
        for turn in range(4):
            requests = []
            for i, transcript in enumerate(conversations):
                told = [rng.randrange(1, 50) for _ in range(rng.randint(1, 7))]
                # The last token that a turn says has no KV when it ends.
                new += len(told) + (turn > 0)
                parent = Parent(f"{i}, turn {turn - 1}") if turn else None
                name = f"{i}, turn {turn}"
                requests.append(request(name, prompt=transcript + told, parent=parent, leased=True))
            submit(world, *requests)
            outputs = step(world, 150)
            world.core.handle(Release([f"{i}, turn {turn - 1}" for i in range(8)]))
            for i, one in enumerate(requests):
                assert tokens(outputs, one.id) == expected_tokens(one, 0, 4)
                conversations[i] = one.prompt_token_ids + tokens(outputs, one.id)
        stats = world.core.stats()
        assert stats.swap_in_bytes > 0
        assert stats.recomputed_tokens == 0
        assert stats.prompt_tokens == new


def test_choices_behind_one_that_is_cancelled_compute_the_prompt_once(depth):
    """The next one computes the rest of it for all."""
    world = World(1, depth=depth, max_step_tokens=4, prefix_caching=False)
    submit(world, request("r", 30, 3, n=4))
    outputs = step(world, 3)
    world.core.handle(Finish("r", FinishReason.CANCELLED, 0))
    outputs += step(world, 60)
    assert sum(len(out.finished) for out in outputs) == 4
    # One position each: the last of the prompt gives each choice its first token.
    assert world.core.stats().prompt_tokens <= 30 + 3 + 4


@pytest.mark.parametrize("grace", [0.0, 1e9], ids=["parked", "within its grace"])
def test_a_stream_that_waits_for_credit_and_its_branch_go_on_apart(depth, grace):
    """The branch writes first into the block that both end in."""
    world = World(1, depth=depth, park_grace=grace, prefix_caching=False)
    parent = request("parent", 6, 20, emit_upto=5)
    submit(world, parent)
    outputs = step(world, 20)
    transcript = parent.prompt_token_ids + tokens(outputs, "parent")
    branch = request("branch", prompt=[*transcript, 48], max_tokens=8, parent=Parent("parent"))
    submit(world, branch)
    outputs += step(world, 6)
    world.core.handle(Limit("parent", 20))
    outputs += step(world, 40)
    assert admitted(outputs, "branch").cached_device_tokens == 10
    assert tokens(outputs, "branch") == expected_tokens(branch, 0, 8)
    assert tokens(outputs, "parent") == expected_tokens(parent, 0, 20)
