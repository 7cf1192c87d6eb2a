"""One load under one variant of the policy on one machine, to the end, and what came of it."""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any
from unittest.mock import patch

from laboratory.loads import Arrival, Load, Writer
from laboratory.machines import Clock, Device, Link, Machine
from tidegate.engine import policy
from tidegate.engine.constraints import Constraints
from tidegate.engine.core import EngineCore
from tidegate.engine.memory.prefix import BlockHasher
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import EngineInfo, Limit, ProgressKind, StepOutput, Submit
from tidegate.engine.scheduler import Limits, Scheduler

HOST_TIER = 4
"""Size of the host tier, in device tiers."""

LONGEST = 32_768


@dataclass(frozen=True)
class Variant:
    """The policy as shipped, but for what it names."""

    name: str
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Limits``."""
    rules: Mapping[str, Any] = field(default_factory=dict)
    """Names in ``policy``."""
    host_tier: int = HOST_TIER


@dataclass(frozen=True)
class Figures:
    """Seconds, tokens and bytes."""

    seconds: float
    output_tokens: int
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    preemptions: int
    thrash: int
    """Preemptions of sequences that had not told a block of tokens since they came in."""
    bytes_out: int
    bytes_in: int
    recomputed: int
    full_blocks: int
    """Of the sequences preempted by swap, those with few apart; and how many of them were clean then."""
    clean_blocks: int
    steps: int

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def clean_ratio(self) -> float | None:
        return self.clean_blocks / self.full_blocks if self.full_blocks else None


class Trial:
    def __init__(self, machine: Machine, load: Load, variant: Variant) -> None:
        self.clock = Clock()
        self._load = load
        self._block_size = machine.block_size
        link = Link(machine, self.clock)
        device_blocks = load.device_tokens // machine.block_size
        self.manager = BlockManager(
            block_size=machine.block_size,
            device_blocks=device_blocks,
            host_blocks=variant.host_tier * device_blocks,
            transfer=link,
            hasher=BlockHasher(machine.name, machine.block_size, secret=b"laboratory"),
        )
        limits: dict[str, Any] = {
            "max_model_len": LONGEST,
            "max_num_seqs": 256,
            "max_step_tokens": 2048,
            "park_grace": machine.empty_step * 10,
            "preemption": "auto",
            "block_bytes": machine.block_bytes,
            "write_ahead": machine.write_ahead,
        }
        scheduler = Scheduler(
            Limits(**{**limits, **variant.limits}),
            self.manager,
            Constraints(Path("nowhere"), 50_000, ()),
            eos_token_ids=frozenset(),
            bytes_per_second=lambda: machine.link_bytes_per_second,
            now=self.clock,
        )
        info = EngineInfo(
            machine.name, "", 50_000, LONGEST, [], machine.block_size, device_blocks,
            self.manager.host.num_blocks, machine.kv_bytes_per_token, "", "", {},
        )  # fmt: skip
        self.core = EngineCore(info, scheduler, Device(machine, self.clock, link), link, 2)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._followers: dict[str, list[Arrival]] = defaultdict(list)
        self._running = sum(arrival.request.params.n for arrival in load.arrivals)
        self._choices_left: dict[str, int] = {}
        self._sent: dict[str, float] = {}
        self._told: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._told_before: dict[tuple[str, int], int] = {}
        self._credit = {
            arrival.request.id: arrival.request.emit_upto
            for arrival in load.arrivals
            if arrival.request.emit_upto is not None
        }
        self._thrash = 0
        for number, arrival in enumerate(load.arrivals):
            if arrival.after is None:
                self._due.append((arrival.wait, number, self._sending(arrival)))
            else:
                self._followers[arrival.after].append(arrival)
        self._due.sort(reverse=True, key=lambda due: due[:2])
        self._numbers = itertools.count(len(load.arrivals))

    def run(self) -> Figures:
        while self._running:
            while self._due and self._due[-1][0] <= self.clock.time:
                self._due.pop()[2]()
            if not self.core.has_work():
                timer = self.core.next_deadline()
                times = [at for at in (timer, *(due[0] for due in self._due[-1:])) if at is not None]
                self.clock.time = max(self.clock.time, min(times))
            self._take(self.core.step())
        return self._figures()

    def _later(self, wait: float, action: Callable[[], None]) -> None:
        self._due.append((self.clock.time + wait, next(self._numbers), action))
        self._due.sort(reverse=True, key=lambda due: due[:2])

    def _sending(self, arrival: Arrival) -> Callable[[], None]:
        def send() -> None:
            request = arrival.request
            self._sent[request.id] = self.clock.time
            self._choices_left[request.id] = request.params.n
            self.core.handle(Submit(request))

        return send

    def _granting(self, name: str) -> Callable[[], None]:
        return lambda: self.core.handle(Limit(name, self._credit[name]))

    def _take(self, out: StepOutput) -> None:
        if out.refused:
            raise RuntimeError(f"a request of the load was refused: {out.refused}")
        for delta in out.deltas:
            name = delta.request_id
            told = self._told[name, delta.choice]
            told.append(self.clock.time)
            if len(told) == self._credit.get(name):
                self._credit[name] += self._load.grant
                self._later(self._load.pause, self._granting(name))
        for progress in out.progress:
            key = (progress.request_id, progress.choice)
            if progress.kind is ProgressKind.RESUMED:
                self._told_before[key] = len(self._told[key])
            elif progress.kind is ProgressKind.PREEMPTED:
                self._thrash += len(self._told[key]) - self._told_before.get(key, 0) < self._block_size
        for finished in out.finished:
            self._running -= 1
            name = finished.request_id
            self._choices_left[name] -= 1
            if not self._choices_left[name]:
                for follower in self._followers[name]:
                    self._later(follower.wait, self._sending(follower))

    def _figures(self) -> Figures:
        stats = self.core.stats()
        first = sorted(told[0] - self._sent[name] for (name, _), told in self._told.items())
        gaps = [b - a for told in self._told.values() for a, b in itertools.pairwise(told)]
        ttft, itl = quantiles(first, n=100), quantiles(gaps, n=100)
        return Figures(
            seconds=self.clock.time,
            output_tokens=stats.output_tokens,
            ttft_p50=ttft[49],
            ttft_p99=ttft[98],
            itl_p50=itl[49],
            itl_p99=itl[98],
            preemptions=stats.preemptions_swap + stats.preemptions_recompute,
            thrash=self._thrash,
            bytes_out=stats.swap_out_bytes,
            bytes_in=stats.swap_in_bytes,
            recomputed=stats.recomputed_tokens,
            full_blocks=self.manager.stats.preempted_full,
            clean_blocks=self.manager.stats.preempted_clean,
            steps=stats.steps,
        )


def trial(machine: Machine, write: Callable[[Writer], Load], variant: Variant, seed: int) -> Figures:
    load = write(Writer(machine, random.Random(f"{seed} {write.__name__}")))
    with ExitStack() as stack:
        for name, rule in variant.rules.items():
            stack.enter_context(patch.object(policy, name, rule))
        return Trial(machine, load, variant).run()
