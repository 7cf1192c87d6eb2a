"""The laboratory: the real scheduler, policies and block manager on machines that are not at hand.

Time is virtual. A step takes what its bytes and operations take on the machine described; a copy takes
its bytes over the link, one after another in each direction. What is printed is simulated, good for
comparing policies on one machine, and no measurement of any.

    make simulate
    python tests/simulation/lab.py [--seed S] [--machine NAME]
"""

import argparse
import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, quantiles

from rich.console import Console
from rich.table import Table

from tidegate.engine.core import EngineCore
from tidegate.engine.logging import quiet_by_default
from tidegate.engine.memory.copies import Completion, CopyOp
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import EngineInfo, Limit, StepOutput, Submit
from tidegate.engine.request import Request, SamplingParams
from tidegate.engine.scheduler import Limits, Scheduler
from tidegate.engine.step import StepPlan, StepResult


@dataclass(frozen=True)
class Machine:
    """A device and a model on it. Rates are achieved ones, in SI units."""

    name: str
    parameters: float
    """Without the embeddings."""
    kv_bytes_per_token: int
    block_size: int
    flops: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Between the tiers, each way."""
    step_overhead: float
    """Seconds of a step that computes nothing."""

    def step_seconds(self, plan: StepPlan) -> float:
        weights = 2 * self.parameters / self.memory_bytes_per_second
        products = 2 * self.parameters * plan.num_tokens / self.flops
        read = sum(chunk.start + chunk.count for chunk in plan.chunks) * self.kv_bytes_per_token
        return self.step_overhead + max(weights, products) + read / self.memory_bytes_per_second


MACHINES = (
    Machine("H200, 8B", 7.5e9, 131_072, 64, 5e14, 4.3e12, 52e9, 150e-6),
    Machine("H200, 70B shard of 8", 8.6e9, 40_960, 64, 5e14, 4.3e12, 52e9, 300e-6),
    Machine("2-core CPU, 5M", 3e6, 1024, 32, 2e11, 1e10, 4e9, 3e-3),
)


@dataclass
class Clock:
    time: float = 0.0

    def __call__(self) -> float:
        return self.time


class Link:
    """The copy engine: first in, first out in each direction, at the link's rate."""

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self.bytes_per_second = machine.link_bytes_per_second
        self._seconds_a_block = (
            machine.kv_bytes_per_token * machine.block_size / machine.link_bytes_per_second
        )
        self._clock = clock
        self._free_at = {True: 0.0, False: 0.0}
        self._under_way: list[tuple[float, int]] = []

    def submit(self, ops: Sequence[CopyOp]) -> None:
        for op in ops:
            ends = max(self._clock.time, self._free_at[op.to_host]) + self._seconds_a_block
            self._free_at[op.to_host] = ends
            self._under_way.append((ends, op.ticket))

    def poll(self) -> list[Completion]:
        done = [ticket for ends, ticket in self._under_way if ends <= self._clock.time]
        self._under_way = [copy for copy in self._under_way if copy[0] > self._clock.time]
        return [Completion(ticket, True) for ticket in done]

    def wait(self, timeout: float) -> None:
        ends = min((ends for ends, _ in self._under_way), default=self._clock.time + timeout)
        self._clock.time = max(self._clock.time, ends)

    def close(self) -> None:
        pass


@dataclass
class Launched:
    clock: Clock
    ends: float
    outcome: StepResult

    def result(self) -> StepResult:
        self.clock.time = max(self.clock.time, self.ends)
        return self.outcome


class Device:
    """Computes one step after another; every token it says is the same."""

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self._machine = machine
        self._clock = clock
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> Launched:
        seconds = self._machine.step_seconds(plan)
        self._free_at = max(self._clock.time, self._free_at) + seconds
        sampled = sum(chunk.samples for chunk in plan.chunks)
        outcome = StepResult([1] * sampled, [True] * sampled, [None] * sampled, seconds)
        return Launched(self._clock, self._free_at, outcome)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Arrival:
    at: float
    request: Request


@dataclass(frozen=True)
class Load:
    """Requests by time; ``pause`` is how long a client thinks before it grants the rest of its tokens."""

    name: str
    arrivals: list[Arrival]
    device_tokens: int
    pause: float | None = None


def loads(machine: Machine, rng: random.Random) -> list[Load]:
    """A storm that needs four times the device tier, and clients that pause in mid-answer."""
    prompt, output, count = 512, 512, 128
    need = count * (prompt + output)

    def requests(emit_upto: int | None) -> Iterable[Request]:
        for i in range(count):
            length = rng.randint(prompt // 2, prompt * 3 // 2)
            params = SamplingParams(max_tokens=rng.randint(output // 2, output * 3 // 2), ignore_eos=True)
            tokens = [rng.randrange(1, 50_000) for _ in range(length)]
            yield Request(id=f"r{i}", prompt_token_ids=tokens, params=params, seed=i, emit_upto=emit_upto)

    second = machine.step_seconds(StepPlan(0)) * 1000
    storm = [Arrival(0.0, request) for request in requests(None)]
    pausing = [Arrival(second * rng.random(), request) for request in requests(64)]
    return [
        Load("storm, KV for 1/4", storm, need // 4),
        Load("pauses, KV for 1/4", sorted(pausing, key=lambda a: a.at), need // 4, second / 4),
    ]


@dataclass(frozen=True)
class Policy:
    name: str
    preemption: str
    write_ahead: int


POLICIES = (
    Policy("auto, written ahead", "auto", 32),
    Policy("auto", "auto", 0),
    Policy("swap", "swap", 0),
    Policy("recompute", "recompute", 0),
)


class Trial:
    """One load under one policy on one machine."""

    def __init__(self, machine: Machine, load: Load, policy: Policy) -> None:
        self.load = load
        self.clock = Clock()
        link = Link(machine, self.clock)
        device_blocks = load.device_tokens // machine.block_size
        manager = BlockManager(
            block_size=machine.block_size,
            device_blocks=device_blocks,
            host_blocks=4 * device_blocks,
            transfer=link,
            hasher=None,
        )
        limits = Limits(
            max_model_len=4096,
            max_num_seqs=256,
            max_step_tokens=2048,
            park_grace=machine.step_seconds(StepPlan(0)) * 10,
            preemption=policy.preemption,
            block_bytes=machine.kv_bytes_per_token * machine.block_size,
            write_ahead=policy.write_ahead,
        )
        scheduler = Scheduler(
            limits,
            manager,
            eos_token_ids=frozenset(),
            bytes_per_second=lambda: machine.link_bytes_per_second,
            now=self.clock,
        )
        info = EngineInfo(
            machine.name, "", 50_000, 4096, [], machine.block_size, device_blocks, 4 * device_blocks,
            machine.kv_bytes_per_token, "", "", {},
        )  # fmt: skip
        self.core = EngineCore(info, scheduler, Device(machine, self.clock), link, 2)
        self.arrived: dict[str, float] = {}
        self.told_at: dict[str, list[float]] = defaultdict(list)
        self.grants: list[tuple[float, str]] = []
        self.unfinished = len(load.arrivals)

    def run(self) -> None:
        pending = list(reversed(self.load.arrivals))
        while self.unfinished:
            while pending and pending[-1].at <= self.clock.time:
                arrival = pending.pop()
                self.arrived[arrival.request.id] = arrival.at
                self.core.handle(Submit(arrival.request))
            self._grant()
            if not self.core.has_work():
                times = [pending[-1].at] if pending else []
                times += [at for at, _ in self.grants]
                timer = self.core.next_deadline()
                self.clock.time = min([*times, *([] if timer is None else [timer])])
            self._take(self.core.step())

    def _grant(self) -> None:
        for at, name in [grant for grant in self.grants if grant[0] <= self.clock.time]:
            self.grants.remove((at, name))
            self.core.handle(Limit(name, 1 << 30))

    def _take(self, out: StepOutput) -> None:
        for delta in out.deltas:
            told = self.told_at[delta.request_id]
            told.append(self.clock.time)
            if self.load.pause is not None and len(told) == 64:
                self.grants.append((self.clock.time + self.load.pause, delta.request_id))
        self.unfinished -= len(out.finished)

    def row(self) -> list[str]:
        stats = self.core.stats()
        first = [told[0] - self.arrived[name] for name, told in self.told_at.items()]
        gaps = [b - a for told in self.told_at.values() for a, b in itertools.pairwise(told)]
        preemptions = stats.preemptions_swap + stats.preemptions_recompute
        return [
            f"{stats.output_tokens / self.clock.time:,.0f}",
            f"{quantiles(first, n=100)[49] * 1e3:,.0f} / {quantiles(first, n=100)[98] * 1e3:,.0f}",
            f"{mean(gaps) * 1e3:,.2f} / {quantiles(gaps, n=1000)[989] * 1e3:,.1f}",
            f"{preemptions}",
            f"{(stats.swap_out_bytes + stats.swap_in_bytes) / 1e9:,.2f}",
            f"{stats.recomputed_tokens:,}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", choices=[m.name for m in MACHINES], help="this one alone")
    args = parser.parse_args()
    quiet_by_default()
    for machine in MACHINES:
        if args.machine not in (None, machine.name):
            continue
        table = Table(title=f"simulated: {machine.name}")
        for name in ("load", "policy", "tokens/s", "TTFT p50 / p99 ms", "ITL mean / p99 ms", "preempted",
                     "GB moved", "recomputed"):  # fmt: skip
            table.add_column(name)
        for load in loads(machine, random.Random(args.seed)):
            for policy in POLICIES:
                trial = Trial(machine, load, policy)
                trial.run()
                table.add_row(load.name, policy.name, *trial.row())
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
