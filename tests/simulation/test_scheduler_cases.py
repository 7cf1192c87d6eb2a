"""Single situations of the scheduler, each set up on purpose in the fake world."""

import itertools
import random

import pytest
import world as worlds
from scenes import POISON_TOKEN, admissions, ends, request, step, submit, tokens
from structlog.testing import capture_logs
from world import Faults, World, expected_tokens

from tidegate.engine import policy
from tidegate.engine.llm import LLM
from tidegate.engine.messages import Finish, Limit, ProgressKind
from tidegate.engine.request import FinishReason, InvalidRequest, Parent, SamplingParams
from tidegate.engine.scheduler import Scheduler
from tidegate.engine.step import StepPlan, StepResult
from tidegate.engine.text_stream import TextStream


class BreakingRunner(worlds.FakeRunner):
    """Every step that has to do with a certain prompt raises."""

    def _compute(self, plan: StepPlan) -> StepResult | Exception:
        result = super()._compute(plan)
        firsts = {self._rows[chunk.row].tokens[0] for chunk in plan.chunks}
        return MemoryError("poison") if POISON_TOKEN in firsts else result


class LateRunner(worlds.FakeRunner):
    """The step ``breaks`` raises before it sets up its rows."""

    breaks = 0

    def _compute(self, plan: StepPlan) -> StepResult | Exception:
        if plan.step_id == self.breaks:
            return MemoryError("too early")
        return super()._compute(plan)


@pytest.fixture(params=[1, 2], ids=["depth 1", "depth 2"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_a_request_that_breaks_every_step_fails_alone(depth, monkeypatch):
    monkeypatch.setattr(worlds, "FakeRunner", BreakingRunner)
    world = World(3, depth=depth, device_blocks=40, faults=Faults(step_fails=1e-12))
    good = [request(f"good {i}", 4, 20) for i in range(5)]
    submit(world, *good)
    outputs = step(world, 4)
    submit(world, request("poison", prompt=[POISON_TOKEN, 1, 2]))
    outputs += step(world, 100)
    ended = ends(outputs)
    assert ended["poison"].error == "STEP_FAILED"
    for one in good:
        assert ended[one.id].reason is FinishReason.MAX_TOKENS
        assert tokens(outputs, one.id) == expected_tokens(one, 0, 20)


def test_the_last_step_that_a_broken_request_breaks_is_its_own(depth, monkeypatch):
    """Also where it was preempted between its failures, and comes back among others."""
    monkeypatch.setattr(worlds, "FakeRunner", BreakingRunner)
    broken = []
    fail = Scheduler.fail
    monkeypatch.setattr(
        Scheduler, "fail", lambda self, step, error: (broken.append(step), fail(self, step, error))
    )
    world = World(3, depth=depth, device_blocks=60, preemption="swap", faults=Faults(step_fails=1e-12))
    good = [request(f"good {i}", 4, 40) for i in range(3)]
    submit(world, *good, request("poison", prompt=[POISON_TOKEN, 1, 2]))
    outputs = []
    for _ in range(20):
        outputs += step(world, 1)
        world.core.scheduler.preempt("poison")
    outputs += step(world, 120)
    assert ends(outputs)["poison"].error == "STEP_FAILED"
    assert [seq.request.id for seq, _ in broken[-1].members] == ["poison"]
    for one in good:
        assert tokens(outputs, one.id) == expected_tokens(one, 0, 40)


def test_a_step_that_fails_before_its_rows_are_set_up_changes_no_token(monkeypatch):
    monkeypatch.setattr(worlds, "FakeRunner", LateRunner)
    for breaks in range(1, 6):
        monkeypatch.setattr(LateRunner, "breaks", breaks)
        world = World(breaks, depth=1, device_blocks=40, faults=Faults(step_fails=1e-12))
        # Rows that had other owners before.
        submit(world, *(request(f"before {i}", 5, 1) for i in range(3)))
        outputs = step(world, 2)
        later = [request(f"later {i}", 6, 12) for i in range(3)]
        submit(world, *later)
        outputs += step(world, 60)
        for one in later:
            assert tokens(outputs, one.id) == expected_tokens(one, 0, 12), f"step {breaks} failed"


def test_an_urgent_request_takes_the_row_of_a_less_urgent_one(depth):
    world = World(1, depth=depth, max_num_seqs=2, device_blocks=40)
    low = [request(f"low {i}", 4, 60) for i in range(2)]
    submit(world, *low)
    outputs = step(world, 5)
    submit(world, request("same", 4, 2), request("high", 4, 2, priority=9))
    outputs += step(world, 8)
    assert ends(outputs)["high"].reason is FinishReason.MAX_TOKENS
    assert "same" not in admissions(outputs), "nobody gives way to an equal"
    outputs += step(world, 300)
    for one in low:
        assert tokens(outputs, one.id) == expected_tokens(one, 0, 60)


def test_an_urgent_request_does_not_wait_for_the_end_of_a_long_prompt(depth):
    world = World(1, depth=depth, device_blocks=60, max_step_tokens=16)
    low = request("low", 200, 2)
    submit(world, low)
    outputs = step(world, 2)
    submit(world, request("high", 4, 2, priority=9))
    outputs += step(world, 5)
    assert ends(outputs)["high"].reason is FinishReason.MAX_TOKENS
    outputs += step(world, 60)
    assert tokens(outputs, "low") == expected_tokens(low, 0, 2)


def test_room_that_a_running_prompt_waits_for_is_not_given_to_newcomers(depth):
    """Enough comes free for the short, time and again, and never enough at once for its next chunk."""
    stuck = Faults(copy_delay=1.0)
    world = World(1, depth=depth, device_blocks=48, max_step_tokens=64, park_grace=0, faults=stuck)
    submit(world, request("on its way to the host", 16, 2, leased=True))
    outputs = step(world, 8)
    long = request("long", 100, 2)
    submit(world, request("urgent", 56, 12, priority=9), long)
    outputs += step(world, 1)
    submit(world, request("urgent too", 60, 12, priority=9), request("short", 4, 2))
    outputs += step(world, 6)
    assert "long" in admissions(outputs)
    assert "short" not in admissions(outputs)
    stuck.copy_delay = 0.0
    outputs += step(world, 60)
    assert tokens(outputs, "long") == expected_tokens(long, 0, 2)
    assert "short" in ends(outputs)


@pytest.mark.parametrize("max_tokens", [4, None])
def test_given_output_that_leaves_nothing_to_generate_is_refused(max_tokens):
    """It would wait for ever: a choice ends where its last token is sampled."""
    world = World(1)
    longest = world.max_model_len - 4
    submit(world, request("r", 4, max_tokens, given=[7] * (max_tokens or longest)))
    (out,) = step(world, 1)
    assert [refused.request_id for refused in out.refused] == ["r"]
    submit(world, request("r", 4, max_tokens, given=[7] * ((max_tokens or longest) - 1)))
    assert len(tokens(step(world, 60), "r")) == 1


def test_deadlines_of_requests_that_ended_are_forgotten():
    """A server that runs for days holds timers for what is under way, not for all that ever was."""
    world = World(1, device_blocks=60)
    submit(world, request("long", 4, 100, deadline=world.clock() + 50, emit_upto=1))
    for i in range(5000):
        submit(world, request(f"r{i}", 4, 1, deadline=world.clock() + 86_400))
        world.core.step()
        world.core.handle(Finish(f"r{i}", FinishReason.CANCELLED))
    assert len(world.scheduler._eviction.timers) <= 1000
    world.clock.time += 51
    assert ends(step(world, 1))["long"].reason is FinishReason.DEADLINE


def test_a_stream_that_gets_credit_within_its_grace_is_said_to_run_again():
    world = World(1, park_grace=5.0)
    submit(world, request("r", 4, 8, emit_upto=2))
    outputs = step(world, 10)
    world.core.handle(Limit("r", 8))
    outputs += step(world, 20)
    assert [report.kind for out in outputs for report in out.progress] == ["stalled", "resumed"]
    assert ends(outputs)["r"].reason is FinishReason.MAX_TOKENS


def test_room_is_taken_from_the_one_that_frees_the_most_of_its_own(depth):
    """Not from the latest, of which there would have to be several, nor from those that share a prompt."""
    world = World(1, depth=depth, device_blocks=44, max_step_tokens=64, preemption="swap")
    submit(world, request("shares", 29, 60, n=2), request("large", 20, 60), request("late", 4, 60))
    outputs = step(world, 20)
    assert not [progress for out in outputs for progress in out.progress]
    submit(world, request("urgent", 60, 4, priority=1))
    outputs = step(world, 20)
    preempted = [p.request_id for out in outputs for p in out.progress if p.kind is ProgressKind.PREEMPTED]
    assert preempted[0] == "large"
    assert ends(outputs)["urgent"].reason is FinishReason.MAX_TOKENS


@pytest.mark.parametrize("leased", [True, False], ids=["held for a lease", "shared with another that runs"])
def test_the_price_of_a_preemption_is_that_of_the_blocks_that_leave(leased, monkeypatch):
    """A lease keeps nothing on the device; another choice that runs keeps what both have."""
    world = World(1, device_blocks=60, park_grace=0.0, host_blocks=60, prefix_caching=False, write_ahead=0)
    submit(world, request("parent", 16, 4 if leased else 40, leased=leased, prompt=list(range(1, 17))))
    step(world, 12 if leased else 2)
    submit(world, request("child", prompt=list(range(1, 19)), max_tokens=30, parent=Parent("parent")))
    step(world, 4)
    priced = []
    costs = policy.preemption_costs
    monkeypatch.setattr(policy, "preemption_costs", lambda **given: (priced.append(given), costs(**given))[1])
    world.core.scheduler.preempt("child")
    step(world, 2)
    (given,) = priced
    tokens, blocks = given["tokens"], given["bytes_in"] // 1024
    assert tokens >= 18 if leased else tokens < 8
    assert blocks == -(-tokens // world.block_size) or blocks == -(-(tokens + 1) // world.block_size)


@pytest.mark.parametrize(("device_blocks", "copies"), [(50, False), (40, True)])
def test_nothing_is_copied_while_all_fit_however_long_they_become(depth, device_blocks, copies):
    """Above the mark from which likely victims are written ahead, too."""
    world = World(1, depth=depth, device_blocks=device_blocks, max_step_tokens=64, write_ahead=1.0)
    submit(world, *(request(f"r{i}", 20, 24) for i in range(4)))
    step(world, 60)
    assert (world.core.stats().swap_out_bytes > 0) is copies


@pytest.mark.parametrize(("rows", "copies"), [(4, False), (8, True)])
def test_nothing_is_copied_for_those_that_wait_for_a_row(rows, copies, depth):
    """All that can run at once fit, and only where more rows are free do they crowd one another."""
    world = World(1, depth=depth, device_blocks=48, max_num_seqs=rows, max_step_tokens=64, write_ahead=1.0)
    submit(world, *(request(f"r{i}", 20, 24) for i in range(12)))
    step(world, 120)
    assert (world.core.stats().swap_out_bytes > 0) is copies


def test_no_sequence_holds_more_blocks_than_it_is_counted_for(depth, monkeypatch):
    """Of a window, all steps in flight count: the next chunk is planned before the last one is collected."""
    world = World(1, depth=depth, windows=(6,), prefix_caching=False, write_ahead=0)
    manager, launch, held = world.manager, world.runner.launch, []

    def record(plan: StepPlan) -> worlds.FakeStep:
        held.append(world.device_blocks - manager.device.num_free - manager.num_draining)
        return launch(plan)

    monkeypatch.setattr(world.runner, "launch", record)
    submit(world, request("long", 80, 10))
    assert ends(step(world, 60))["long"].reason is FinishReason.MAX_TOKENS
    assert max(held) <= manager.most_blocks(90) < manager.blocks_for(90)


def test_each_recompute_that_was_chosen_is_logged_with_what_both_ways_would_take(depth):
    world = World(1, depth=depth, device_blocks=12, write_ahead=0)
    world.tiers.bytes_per_second = 1e3
    with capture_logs() as logs:
        submit(world, *(request(f"r{i}", 12, 20) for i in range(4)))
        step(world, 400)
    chosen = [line for line in logs if line["event"] == "recompute_chosen"]
    assert len(chosen) == world.core.stats().preemptions_recompute > 0
    assert all(line["swap"] > line["recompute"] > 0 for line in chosen)


def test_without_a_host_tier_every_preemption_counts_as_recompute():
    world = World(1, host_blocks=0, preemption="swap", device_blocks=8)
    submit(world, *(request(f"r{i}", 6, 16) for i in range(4)))
    step(world, 400)
    stats = world.core.stats()
    assert stats.preemptions_recompute > 0
    assert (stats.preemptions_swap, stats.parked_dropped) == (0, 0)


def test_blocks_behind_logits_that_were_not_finite_serve_nobody_else(depth):
    """Parts of a prompt are known as a prefix before its last part shows that they are worth nothing."""
    faults = Faults(nonfinite=1.0)
    world = World(1, depth=depth, max_step_tokens=4, faults=faults)
    prompt = list(range(1, 15))
    submit(world, request("broken", prompt=prompt))
    assert ends(step(world, 10))["broken"].error == "NONFINITE_LOGITS"
    faults.nonfinite = 0.0
    submit(world, request("whole", prompt=prompt))
    outputs = step(world, 20)
    assert ends(outputs)["whole"].usage.cached_tokens == 0
    submit(world, request("again", prompt=prompt))
    assert ends(step(world, 20))["again"].usage.cached_tokens == 12


def test_thousands_that_wait_can_be_cancelled_in_any_order():
    world = World(1)
    submit(world, *(request(f"r{i}", 4, 4, priority=i % 3) for i in range(300)))
    outputs = step(world, 3)
    names = [f"r{i}" for i in range(300)]
    random.Random(1).shuffle(names)
    for name in names:
        world.core.handle(Finish(name, FinishReason.CANCELLED))
        world.core.check_integrity()
    outputs += step(world, 5)
    assert len(ends(outputs)) == 300
    assert not world.core.has_work()


def test_an_interrupted_wait_for_a_step_loses_no_block(depth, monkeypatch):
    """Ctrl-C in a notebook: the engine goes on with the next call."""
    world = World(1, depth=depth, device_blocks=8, prefix_caching=False)
    submit(world, request("first", 20, 4))
    wait = worlds.FakeStep.result

    def interrupt(handle):
        monkeypatch.setattr(worlds.FakeStep, "result", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(worlds.FakeStep, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(world, 4)
    world.core.handle(Finish("first", FinishReason.CANCELLED))
    step(world, 4)
    submit(world, request("second", 24, 4))
    assert ends(step(world, 30))["second"].reason is FinishReason.MAX_TOKENS


def test_what_was_said_to_a_refused_call_is_not_heard_by_the_next_one(depth, monkeypatch):
    world = World(1, depth=depth)
    monkeypatch.setattr("tidegate.engine.llm.build_engine", lambda config, progress: world.core)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM("demo") as llm:
        with pytest.raises(InvalidRequest, match=r"prompts\[1\]"):
            llm.generate([[5, 6], [5] * 600], params, use_tqdm=False)
        assert len(llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("num_prompt", [7, 8, 9])
def test_choices_of_one_request_share_the_prompt_and_compute_its_last_position_alone(depth, num_prompt):
    """Where the prompt ends in mid-block, that block is shared until each writes into it."""
    world = World(1, depth=depth, prefix_caching=False)
    one = request("one", num_prompt, 6, n=3)
    computed = []
    launch = world.core._runner.launch
    world.core._runner.launch = lambda plan: (computed.append(plan.num_tokens), launch(plan))[1]
    submit(world, one)
    outputs = step(world, 40)
    for choice in range(3):
        told = [t for out in outputs for d in out.deltas if d.choice == choice for t in d.token_ids]
        assert told == expected_tokens(one, choice, 6)
    # What a choice does not compute: the KV of its last token. Depth 2 may run a step in vain.
    assert sum(computed) <= num_prompt + 2 * 1 + 3 * 5 + 3 * (depth - 1)


@pytest.mark.parametrize("error", [UnicodeError, BrokenPipeError, KeyboardInterrupt])
def test_whatever_ends_a_call_the_next_one_finds_an_idle_engine(error, depth, monkeypatch):
    world = World(1, depth=depth, prefix_caching=False)
    monkeypatch.setattr("tidegate.engine.llm.build_engine", lambda config, progress: world.core)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    push, pushes = TextStream.push, itertools.count()

    def break_once(stream, token_ids, end=None):
        if next(pushes) == 3:
            raise error("once")
        return push(stream, token_ids, end)

    monkeypatch.setattr(TextStream, "push", break_once)
    with LLM("demo") as llm:
        with pytest.raises(error, match="once"):
            llm.generate([[5, 6], [7, 8, 9]], params, use_tqdm=False)
        assert not world.core.has_work()
        assert world.core.stats().device.free == world.device_blocks
        assert len(llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids) == 9


def test_an_engine_that_fails_twice_reports_its_first_error(monkeypatch):
    world = World(1)
    monkeypatch.setattr("tidegate.engine.llm.build_engine", lambda config, progress: world.core)
    failures = iter([RuntimeError("first"), RuntimeError("second")])
    with LLM("demo") as llm:
        monkeypatch.setattr(Scheduler, "plan", lambda self: (_ for _ in ()).throw(next(failures)))
        with pytest.raises(RuntimeError, match="first") as caught:
            llm.generate([[5, 6]], SamplingParams(max_tokens=4), use_tqdm=False)
        assert "second" in caught.value.__notes__[0]


def test_no_more_of_a_prompt_is_cached_than_there_is():
    """Output that came with a request may be known as a prefix too, but is no part of its prompt."""
    world = World(1)
    first = request("first", 6, 12)
    submit(world, first)
    outputs = step(world, 30)
    given = tokens(outputs, "first")[:10]
    submit(world, request("again", prompt=first.prompt_token_ids, max_tokens=12, given=given))
    outputs = step(world, 30)
    (admitted,) = [admitted for out in outputs for admitted in out.admitted]
    assert admitted.cached_device_tokens + admitted.cached_host_tokens == 6
    assert ends(outputs)["again"].usage.cached_tokens == 6
