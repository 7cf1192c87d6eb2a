"""Engines in fake worlds, each with its own load and its own troubles, all from one seed.

Whatever happens (cancels, stops, preemptions, stalls, bursts; copies late, out of order, repeated or
failed; steps that fail), these hold after every beat: the engine's own books add up, nobody is told more
than the credit, a choice ends once, and while something could go on something does. In the end each
choice has been told its own tokens, and no block is held by nobody.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import msgspec
from world import Faults, World, expected_tokens

from tidegate.engine.messages import Finish, Limit, ProgressKind, Release, Stats, StepOutput, Submit, Update
from tidegate.engine.request import FinishReason, Parent, Request, SamplingParams

MAX_BEATS = 20_000
MAX_QUIET = 8
"""Beats in a row without a step while a request could go on and no copy is under way."""
MAX_WAIT = 1_000
"""Beats without a token for the request that goes before all others."""

Key = tuple[str, int]
"""A choice: the id of its request, and its number."""


@dataclass(frozen=True)
class Outcome:
    """What one world came to."""

    requests: int
    choices: int
    steps: int
    preemptions: int
    blocks_copied: int
    longest_wait: int
    """Beats that the request before all others had to wait for a token."""
    digest: bytes
    """Of every step's plan, every copy and every word that the engine said, in order."""


class Load:
    """Requests of one seed, and the book kept about each."""

    def __init__(self, world: World, count: int, *, chaos: float, burst: float = 0.3) -> None:
        """``burst`` is the probability that one more request comes in the same beat."""
        self.world = world
        self.chaos = chaos
        self.rng = random.Random(world.seed + 1)
        self.pending = [self._request(i) for i in range(count)]
        self.requests: dict[str, Request] = {}
        self.tokens: dict[Key, list[int]] = {}
        self.finished: dict[Key, FinishReason] = {}
        self.errors: dict[Key, str | None] = {}
        self.progress: list[ProgressKind] = []
        self.credit: dict[str, int] = {}
        self.limits: dict[str, set[int]] = defaultdict(set)
        """Lengths and stop tokens that updates set while a request ran."""
        self.stops: dict[str, set[int]] = defaultdict(set)
        self.continued = 0
        self.reported: Stats | None = None
        self.longest_wait = 0
        self._burst = burst
        self._open: dict[Key, tuple[int, int]] = {}
        """Choices that have not ended, by what decides who goes first."""
        self._first: Key | None = None
        self._waited = 0
        self._quiet = 0
        self._trace = hashlib.blake2b()

    def _request(self, number: int) -> Request:
        rng = self.rng
        shared = [1 + i % 3 for i in range(rng.choice((0, 4, 8, 9)))]
        own = [rng.randrange(1, 50) for _ in range(rng.randint(1, 14))]
        most = self.world.max_model_len - len(shared) - len(own)
        params = SamplingParams(
            n=rng.choice((1, 1, 1, 2, 3)),
            max_tokens=min(rng.choice((1, 2, 6, 16)), most),
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
        """Until every request has ended, looking at everything after each beat."""
        for _ in range(MAX_BEATS):
            self._arrive()
            self._stir()
            self.beat()
            if not self.pending and not self._open:
                return
        raise AssertionError(f"requests never ended: {self.world.core.stats()}")

    def beat(self) -> None:
        steps, core = self.world.runner.num_launched, self.world.core
        self.world.clock.time += 0.001
        out = core.step()
        core.check_integrity()
        self._take(out)
        self._look_for_stalls(out, self.world.runner.num_launched - steps)

    def settle(self) -> None:
        """Let all leases end, and whatever is under way."""
        self.world.core.handle(Release(list(self.requests)))
        for _ in range(1000):
            self.beat()
            if not self.world.core.has_work() and not self.world.manager.num_draining:
                return
        raise AssertionError("copies or steps never ended")

    def _arrive(self) -> None:
        while self.pending and self.rng.random() < self._burst:
            request = self.pending.pop()
            if self.requests and self.rng.random() < 0.4:
                request = self._continued(request)
            self.requests[request.id] = request
            if request.emit_upto is not None:
                self.credit[request.id] = request.emit_upto
            for choice in range(request.params.n):
                self._open[request.id, choice] = (-request.priority, len(self.requests))
            self.world.core.handle(Submit(request))

    def _stir(self) -> None:
        """Give credit here and there, and cause trouble as far as chaos goes."""
        rng, core = self.rng, self.world.core
        for name in list(self.credit):
            if rng.random() < 0.1:
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

    def _take(self, out: StepOutput) -> None:
        assert not out.refused
        if out.stats is not None:
            self.reported = copy(out.stats)
            # When it is time to report the totals is a matter of the wall clock.
            out.stats = None
        if out:
            self._trace.update(msgspec.msgpack.encode(out))
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
            del self._open[key]

    def _look_for_stalls(self, out: StepOutput, steps: int) -> None:
        """While a request could go on, steps run or copies end; and the one before all others goes on."""
        told, credit = self.tokens, self.credit
        able = [key for key in self._open if key[0] not in credit or len(told.get(key, ())) < credit[key[0]]]
        explained = steps or out or self.world.tiers.under_way or not able
        self._quiet = 0 if explained else self._quiet + 1
        assert self._quiet <= MAX_QUIET, f"nothing moves, and {able[0]} could: {self.world.core.stats()}"
        first = min(able, key=self._open.__getitem__, default=None)
        advanced = first != self._first or any((d.request_id, d.choice) == first for d in out.deltas)
        self._first, self._waited = first, 0 if advanced else self._waited + 1
        self.longest_wait = max(self.longest_wait, self._waited)
        assert self._waited <= MAX_WAIT, f"{first} goes before all others, and does not go on"

    def check(self) -> None:
        """The end of every choice, against the model's own words and the faults of this world."""
        faults = self.world.faults
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
        explained = {None}
        explained |= {"STEP_FAILED"} if faults.step_fails else set()
        explained |= {"NONFINITE_LOGITS"} if faults.nonfinite else set()
        assert set(self.errors.values()) <= explained, (
            "a request failed, and no fault of this world explains it"
        )
        stats = self.world.core.stats()
        assert stats.device.free + stats.device.reclaimable == stats.device.total, "device blocks leaked"
        assert stats.host.free + stats.host.reclaimable == stats.host.total, "host blocks leaked"

    def outcome(self) -> Outcome:
        stats, copied = self.world.core.stats(), self.world.manager.stats
        self._trace.update(self.world.tiers.trace.digest())
        return Outcome(
            requests=len(self.requests),
            choices=len(self.finished),
            steps=stats.steps,
            preemptions=stats.preemptions_swap + stats.preemptions_recompute,
            blocks_copied=copied.copied_in.total() + copied.copied_out.total(),
            longest_wait=self.longest_wait,
            digest=self._trace.digest(),
        )


def random_world(seed: int) -> World:
    """Tiers, limits and faults of every kind and size, all from the seed."""
    rng = random.Random(seed)
    windows = rng.choice(((None,), (None,), (None, 6), (5,), (None, None, 9), (3, 12)))
    return World(
        seed,
        windows=windows,
        depth=rng.choice((1, 2)),
        max_num_seqs=rng.choice((1, 4, 8, 32, 32)),
        max_step_tokens=rng.choice((1, 7, 16, 32, 64)),
        block_size=rng.choice((2, 2, 4, 8)),
        device_blocks=rng.choice((16, 20, 20, 50)) * len(windows),
        host_blocks=rng.choice((0, 2, 8, 24, 40)) * len(windows),
        park_grace=rng.choice((0.0, 0.01, 0.2)),
        preemption=rng.choice(("auto", "auto", "swap", "recompute")),
        prefix_caching=rng.random() < 0.8,
        write_ahead=rng.choice((0, 0.001, 1)),
        host_quota=rng.choice((None, 0, 2, 12)),
        faults=Faults(
            copy_fails=rng.choice((0, 0.05, 0.3)),
            copy_delay=rng.choice((0, 0.3, 0.9)),
            copy_haste=rng.choice((0.1, 0.9)),
            copy_repeats=rng.choice((0.05, 0.5)),
            step_haste=rng.choice((0, 0.5, 1)),
            step_fails=rng.choice((0, 0, 0.01)),
            nonfinite=rng.choice((0, 0.0005)),
        ),
    )


def stormy_world(seed: int) -> World:
    """One in which blocks never rest: most of what can go wrong in a swap goes wrong within a few seeds."""
    late, windows = seed % 2, ((None,), (None, 7))[seed // 2 % 2]
    faults = Faults(
        copy_delay=0.9 if late else 0.3, copy_haste=0.0 if late else 0.9, copy_repeats=0.5, step_haste=0.0
    )
    return World(
        seed,
        max_num_seqs=32,
        block_size=2,
        device_blocks=16 * len(windows),
        host_blocks=80 * len(windows),
        park_grace=0.0,
        preemption="swap",
        windows=windows,
        faults=faults,
    )


def run_seed(seed: int, make_world: Callable[[int], World] = random_world) -> Outcome:
    """One world from its first request to its last block. A violation raises, and names the seed."""
    world = make_world(seed)
    count, chaos = world.rng.choice((20, 60, 150)), world.rng.choice((0, 0.2, 0.8))
    load = Load(world, count, chaos=chaos, burst=world.rng.choice((0.1, 0.3, 0.9)))
    try:
        load.run()
        load.settle()
        load.check()
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise
    return load.outcome()
