"""Machines in virtual time: how long a step takes, and how long a copy between the tiers.

Rates are achieved ones, in SI units. They are assumptions, written down here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.engine.memory.copies import Completion, CopyOp
from tidegate.engine.step import StepPlan, StepResult


@dataclass(frozen=True)
class Machine:
    """A device and a model on it."""

    name: str
    parameters: float
    """Without the embeddings."""
    kv_bytes_per_token: int
    attention_flops: float
    """Operations of attention for one token over one position before it."""
    block_size: int
    flops: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Between the tiers, each way."""
    copy_cost: float
    """Seconds that a step loses to each second of copying beside it."""
    step_overhead: float
    """Seconds of a step that computes nothing."""
    write_ahead: float
    """As the engine sets it for such a device; see ``Limits``."""

    @property
    def block_bytes(self) -> int:
        return self.kv_bytes_per_token * self.block_size

    @property
    def empty_step(self) -> float:
        """Seconds of a step that only reads the weights: the unit in which loads measure time."""
        return self.step_seconds(StepPlan(0))

    def step_seconds(self, plan: StepPlan) -> float:
        weights = 2 * self.parameters / self.memory_bytes_per_second
        attention = sum(chunk.count * (chunk.start + chunk.count / 2) for chunk in plan.chunks)
        operations = 2 * self.parameters * plan.num_tokens + self.attention_flops * attention
        read = sum(chunk.start + chunk.count for chunk in plan.chunks) * self.kv_bytes_per_token
        return (
            self.step_overhead + max(weights, operations / self.flops) + read / self.memory_bytes_per_second
        )


MACHINES = (
    Machine(
        "H200, 8B",
        parameters=7.5e9,
        kv_bytes_per_token=131_072,
        attention_flops=4 * 32 * 4096,
        block_size=64,
        flops=5e14,
        memory_bytes_per_second=4.3e12,
        link_bytes_per_second=52e9,
        copy_cost=0.024,
        step_overhead=150e-6,
        write_ahead=1.0,
    ),
    Machine(
        "H200, 70B in 8 shards",
        parameters=8.6e9,
        kv_bytes_per_token=40_960,
        attention_flops=4 * 80 * 8192 / 8,
        block_size=64,
        flops=5e14,
        memory_bytes_per_second=4.3e12,
        link_bytes_per_second=52e9,
        copy_cost=0.024,
        step_overhead=300e-6,
        write_ahead=1.0,
    ),
    # A copy takes cores and bandwidth that the step beside it wants.
    Machine(
        "2-core CPU, 5M",
        parameters=3e6,
        kv_bytes_per_token=1024,
        attention_flops=4 * 4 * 256,
        block_size=32,
        flops=2e11,
        memory_bytes_per_second=1e10,
        link_bytes_per_second=4e9,
        copy_cost=0.5,
        step_overhead=3e-3,
        write_ahead=0.25,
    ),
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
        self.seconds_ordered = 0.0
        self._seconds_a_block = machine.block_bytes / machine.link_bytes_per_second
        self._clock = clock
        self._free_at = {True: 0.0, False: 0.0}
        self._under_way: list[tuple[float, int]] = []

    def submit(self, ops: Sequence[CopyOp]) -> None:
        for op in ops:
            ends = max(self._clock.time, self._free_at[op.to_host]) + self._seconds_a_block
            self._free_at[op.to_host] = ends
            self._under_way.append((ends, op.ticket))
            self.seconds_ordered += self._seconds_a_block

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


SAID = 1
"""The token that the device says, always."""


class Device:
    """Computes one step after another, slowed down by the copies ordered since the step before."""

    def __init__(self, machine: Machine, clock: Clock, link: Link) -> None:
        self._machine = machine
        self._clock = clock
        self._link = link
        self._charged = 0.0
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> Launched:
        copying, self._charged = self._link.seconds_ordered - self._charged, self._link.seconds_ordered
        seconds = self._machine.step_seconds(plan) + self._machine.copy_cost * copying
        self._free_at = max(self._clock.time, self._free_at) + seconds
        sampled = sum(chunk.samples for chunk in plan.chunks)
        outcome = StepResult([SAID] * sampled, [True] * sampled, [None] * sampled, seconds)
        return Launched(self._clock, self._free_at, outcome)

    def close(self) -> None:
        pass
