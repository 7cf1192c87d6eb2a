"""The engine in a fake world: every request ends once, with its own tokens, and nothing leaks."""

import os
import random
from collections import defaultdict
from copy import copy

import msgspec
import pytest
from world import Faults, World, expected_tokens

from tidegate.engine.messages import Finish, Limit, ProgressKind, Release, Stats, Submit, Update
from tidegate.engine.request import FinishReason, Parent, Request, SamplingParams

MAX_STEPS = 20_000


class Load:
    """Requests of one seed, and the book kept about each."""

    def __init__(self, world: World, count: int, *, chaos: float) -> None:
        self.world = world
        self.chaos = chaos
        self.rng = random.Random(world.seed + 1)
        self.pending = [self._request(i) for i in range(count)]
        self.requests: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], FinishReason] = {}
        self.errors: dict[tuple[str, int], str | None] = {}
        self.progress: list[ProgressKind] = []
        self.credit: dict[str, int] = {}
        self.limits: dict[str, set[int]] = defaultdict(set)
        """Lengths and stop tokens that updates set while a request ran."""
        self.stops: dict[str, set[int]] = defaultdict(set)
        self.continued = 0
        self.reported: Stats | None = None

    def _request(self, number: int) -> Request:
        rng = self.rng
        shared = [1 + i % 3 for i in range(rng.choice((0, 4, 8, 9)))]
        own = [rng.randrange(1, 50) for _ in range(rng.randint(1, 14))]
        most = self.world.max_model_len - len(shared) - len(own)
        params = SamplingParams(
            n=rng.choice((1, 1, 1, 2, 3)),
            max_tokens=rng.randint(1, min(24, most)),
            ignore_eos=rng.random() < 0.5,
        )
        return Request(
            id=f"r{number}",
            prompt_token_ids=shared + own,
            params=params,
            seed=rng.randrange(1 << 20),
            priority=rng.choice((0, 0, 0, 1, 2)),
            emit_upto=rng.choice((None, None, 0, 3)),
            deadline=self.world.clock() + rng.random() if rng.random() < self.chaos * 0.1 else None,
            tenant=rng.choice(("a", "b")),
            is_leased=rng.random() < 0.5,
        )

    def _continued(self, request: Request) -> Request:
        """The same request, as a turn behind some part of an earlier one, or as a branch of it.

        The earlier one may be running, parked, ended, released, or have had nothing computed yet.
        """
        rng = self.rng
        earlier = self.requests[rng.choice(list(self.requests))]
        choice = rng.randrange(earlier.params.n)
        told = self.tokens.get((earlier.id, choice), [])
        transcript = earlier.prompt_token_ids + told
        shared = rng.choice((len(transcript), rng.randint(1, len(transcript))))
        room = self.world.max_model_len - (request.params.max_tokens or 0) - len(request.prompt_token_ids)
        if shared > room:
            return request
        prompt = transcript[:shared] + request.prompt_token_ids[rng.randrange(2) :]
        self.continued += 1
        return msgspec.structs.replace(
            request,
            prompt_token_ids=prompt,
            parent=Parent(earlier.id, choice),
            tenant=earlier.tenant,
        )

    def run(self) -> None:
        core = self.world.core
        for _ in range(MAX_STEPS):
            self._arrive()
            self._stir()
            self.world.clock.time += 0.001
            out = core.step()
            core.check_integrity()
            self._take(out)
            if not self.pending and len(self.finished) == sum(r.params.n for r in self.requests.values()):
                return
        raise AssertionError(f"requests never ended: {core.stats()}")

    def _arrive(self) -> None:
        while self.pending and self.rng.random() < 0.3:
            request = self.pending.pop()
            if self.requests and self.rng.random() < 0.4:
                request = self._continued(request)
            self.requests[request.id] = request
            if request.emit_upto is not None:
                self.credit[request.id] = request.emit_upto
            self.world.core.handle(Submit(request))

    def _stir(self) -> None:
        """Give credit here and there, and cause trouble as far as chaos goes."""
        rng, core = self.rng, self.world.core
        for name in list(self.credit):
            if rng.random() < 0.03:
                self.credit[name] += rng.randint(1, 8)
                core.handle(Limit(name, self.credit[name]))
        if self.requests and rng.random() < 0.02:
            names = rng.sample(list(self.requests), rng.randint(1, min(3, len(self.requests))))
            core.handle(Release([*names, "unknown"]))
        if self.requests and rng.random() < self.chaos * 0.2:
            name = rng.choice(list(self.requests))
            match rng.randrange(5):
                case 0:
                    core.handle(Finish(name, FinishReason.CANCELLED))
                case 1:
                    length = len(self.tokens.get((name, 0), ()))
                    core.handle(Finish(name, FinishReason.STOP_STRING, 0, rng.randint(0, length)))
                case 2:
                    self._update(self.requests[name])
                case _:
                    core.scheduler.preempt(name)

    def _update(self, request: Request) -> None:
        """Let it become longer, and end at one token more."""
        longest = self.world.max_model_len - len(request.prompt_token_ids)
        self.limits[request.id].add(min(longest, (request.params.max_tokens or 0) + self.rng.randint(1, 8)))
        self.stops[request.id].add(self.rng.randrange(1, 50))
        stops = tuple(self.stops[request.id])
        self.world.core.handle(Update(request.id, max(self.limits[request.id]), stops))

    def _take(self, out) -> None:
        assert not out.refused
        if out.stats is not None:
            self.reported = copy(out.stats)
        for delta in out.deltas:
            key = (delta.request_id, delta.choice)
            assert key not in self.finished, "tokens after the end"
            tokens = self.tokens.setdefault(key, [])
            assert delta.offset == len(tokens), "a gap, or tokens twice"
            tokens.extend(delta.token_ids)
            assert len(tokens) <= self.credit.get(delta.request_id, 1 << 60), "more than the credit"
        self.progress += [p.kind for p in out.progress]
        for done in out.finished:
            key = (done.request_id, done.choice)
            assert key not in self.finished, "ended twice"
            self.finished[key] = done.reason
            self.errors[key] = done.error

    def check(self) -> None:
        for (name, choice), reason in self.finished.items():
            request = self.requests[name]
            told = self.tokens.get((name, choice), [])
            limits = {request.params.max_tokens or 0, *self.limits[name]}
            wanted = expected_tokens(request, choice, max(limits))
            assert told == wanted[: len(told)], f"{name}/{choice} told other tokens than its own"
            if reason is FinishReason.MAX_TOKENS:
                assert len(told) in limits
            if reason is FinishReason.STOP_TOKEN:
                assert told == wanted or told[-1] in self.stops[name]
        stats = self.world.core.stats()
        assert stats.device.free + stats.device.reclaimable == stats.device.total, "device blocks leaked"
        assert stats.host.free + stats.host.reclaimable == stats.host.total, "host blocks leaked"
        assert not self.world.core.has_work() or self.world.manager.copies_in_flight


def settle(load: Load) -> None:
    """Let all leases end, and whatever is under way."""
    load.world.core.handle(Release(list(load.requests)))
    for _ in range(200):
        load.world.core.step()
        load.world.core.check_integrity()


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
        settle(load)
        load.check()
        assert set(load.finished.values()) <= {FinishReason.MAX_TOKENS, FinishReason.STOP_TOKEN}
        preempted += world.core.stats().preemptions_swap + world.core.stats().preemptions_recompute
    assert preempted > 20, "the load was meant to need preemption"


def random_world(seed):
    """Tiers, limits and faults of every kind and size, all from the seed."""
    rng = random.Random(seed)
    return World(
        seed,
        depth=rng.choice((1, 2)),
        max_num_seqs=rng.choice((1, 2, 4, 8, 32)),
        max_step_tokens=rng.choice((1, 3, 7, 16, 64)),
        block_size=rng.choice((2, 4, 8)),
        device_blocks=rng.choice((16, 20, 50)),
        host_blocks=rng.choice((0, 1, 3, 8, 40)),
        park_grace=rng.choice((0.0, 0.01, 0.2)),
        preemption=rng.choice(("auto", "swap", "recompute")),
        prefix_caching=rng.random() < 0.8,
        write_ahead=rng.choice((0, 0.001, 1)),
        faults=Faults(
            copy_fails=rng.choice((0, 0.05, 0.3)),
            copy_delay=rng.choice((0, 0.3, 0.9)),
            step_fails=rng.choice((0, 0, 0.01)),
            nonfinite=rng.choice((0, 0.0005)),
        ),
    )


@pytest.mark.timeout(0)
def test_chaos_breaks_no_request():
    """Cancels, stops, preemptions, stalls, late and failed copies, failed steps: all end, none leaks.

    ``ENGINE_SEEDS=1000`` runs as many worlds; CI runs a share of that.
    """
    seeds, ended = int(os.environ.get("ENGINE_SEEDS", "100")), 0
    for seed in range(seeds):
        world = random_world(seed)
        load = Load(world, world.rng.choice((10, 40, 80)), chaos=world.rng.choice((0, 0.2, 0.8)))
        try:
            load.run()
            settle(load)
            load.check()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        ended += len(load.finished)
    print(f"\n{ended} choices of requests ended in {seeds} worlds, each once and with its own tokens")


def test_the_last_report_before_the_engine_idles_is_true():
    """Whoever watches the load is not left with what was under way a moment before the end."""
    for seed in range(60):
        world = World(seed, faults=Faults(copy_delay=0.5))
        load = Load(world, 20, chaos=0.5)
        load.run()
        while world.core.has_work():
            world.clock.time += 0.001
            load._take(world.core.step())
        assert load.reported == world.core.stats(), f"seed {seed}"
