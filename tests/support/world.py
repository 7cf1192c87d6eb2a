"""A world in which the real scheduler and block manager run without a model: everything else is fake.

The fake model's key/value content of a position is a hash of the tokens up to it, and its next token a
hash of that: so one wrong block, anywhere, changes the tokens or is seen when it is read. Time is
virtual, and all chance comes from one seed.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tidegate.engine.constraints import Constraints
from tidegate.engine.core import EngineCore
from tidegate.engine.memory.block import TRANSITIONS, Block, Event, State
from tidegate.engine.memory.copies import Completion, CopyOp
from tidegate.engine.memory.groups import KVGroup, longest_sequence
from tidegate.engine.memory.prefix import BlockHasher
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import EngineInfo
from tidegate.engine.request import Request
from tidegate.engine.scheduler import Limits, Scheduler
from tidegate.engine.step import RowSetup, StepPlan, StepResult

VOCAB = 50
EOS = 0
MASK = (1 << 61) - 1
POISON = -1


def chain(parent: int, token: int) -> int:
    """The content of the position behind ``parent`` that holds ``token``."""
    return ((parent * 1_000_003) ^ (token + 7) * 0x9E3779B97F4A7C15) & MASK


def stored(context: int, group: int) -> int:
    """What the layers of a group keep of it: no two groups the same."""
    return context if context == POISON else context ^ group * 0x5BD1E995


def sample(context: int, seed: int, index: int) -> int:
    return (context * 31 + seed * 17 + index * 101) % 9973 % VOCAB


def expected_tokens(request: Request, choice: int, limit: int) -> list[int]:
    """What the fake model says to this request, from the request alone."""
    context = 0
    for token in request.prompt_token_ids:
        context = chain(context, token)
    output: list[int] = []
    while len(output) < limit:
        token = sample(context, request.seed, request.sample_index + choice)
        output.append(token)
        if token == EOS and not request.params.ignore_eos:
            break
        context = chain(context, token)
    return output


@dataclass
class Clock:
    """Virtual seconds."""

    time: float = 0.0

    def __call__(self) -> float:
        return self.time


@dataclass
class Faults:
    """Probabilities, by event."""

    copy_fails: float = 0.0
    copy_delay: float = 0.3
    """That a copy under way does not end at this look."""
    copy_haste: float = 0.3
    """That its content moves at one of the moments before its end."""
    copy_repeats: float = 0.1
    """That an earlier copy is reported once more at a look."""
    step_haste: float = 0.5
    """That a step computes as soon as it is launched, and not when it is waited for."""
    step_fails: float = 0.0
    nonfinite: float = 0.0


class FakeTiers:
    """The content of both tiers, and a copy engine that takes its time and its own order."""

    def __init__(self, device: int, host: int, size: int, rng: random.Random, faults: Faults) -> None:
        self.trace = hashlib.blake2b()
        """Of all copies and steps in the order in which they were ordered."""
        self.device = [[POISON] * size for _ in range(device)]
        self.host = [[POISON] * size for _ in range(host)]
        self.bytes_per_second = 1e9
        self.under_way: list[CopyOp] = []
        self._moved: set[int] = set()
        """Tickets of those whose content has arrived, though nobody has been told."""
        self._told: deque[int] = deque(maxlen=16)
        """Tickets of the last ones; now and then one of them is reported again."""
        self._rng = rng
        self._faults = faults

    def submit(self, ops: list[CopyOp]) -> None:
        self.trace.update(msgspec.msgpack.encode(ops))
        self.under_way.extend(ops)
        self.move_some()

    def move_some(self) -> None:
        """Content moves at any moment behind the order, whatever the device does meanwhile."""
        for op in self.under_way:
            if op.ticket not in self._moved and self._rng.random() < self._faults.copy_haste:
                self._move(op)

    def _move(self, op: CopyOp) -> None:
        self._moved.add(op.ticket)
        self._copy(op)

    def poll(self) -> list[Completion]:
        done = []
        self._rng.shuffle(self.under_way)
        for op in list(self.under_way):
            if self._rng.random() < self._faults.copy_delay:
                continue
            self.under_way.remove(op)
            if op.ticket not in self._moved:
                self._move(op)
            self._moved.remove(op.ticket)
            if self._rng.random() < self._faults.copy_fails:
                self._break(op)
                done.append(Completion(op.ticket, False))
                continue
            done.append(Completion(op.ticket, True))
            self._told.append(op.ticket)
        if self._told and self._rng.random() < self._faults.copy_repeats:
            done.append(Completion(self._rng.choice(self._told), True))
        return done

    def _copy(self, op: CopyOp) -> None:
        if op.to_host:
            self.host[op.host_index] = list(self.device[op.device_index])
        else:
            self.device[op.device_index] = list(self.host[op.host_index])

    def _break(self, op: CopyOp) -> None:
        """A failed copy leaves rubbish at its target."""
        target = self.host[op.host_index] if op.to_host else self.device[op.device_index]
        target[:] = [POISON] * len(target)

    def wait(self, timeout: float) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Row:
    setup: RowSetup
    tokens: list[int]
    blocks: list[list[int]]
    """Of each KV group."""


@dataclass
class FakeStep:
    runner: "FakeRunner"
    plan: StepPlan
    outcome: StepResult | Exception | None = None

    def result(self) -> StepResult:
        self.runner.run_until(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


class FakeRunner:
    """Computes steps in order, each at some moment between its launch and its collection."""

    def __init__(
        self,
        tiers: FakeTiers,
        size: int,
        rng: random.Random,
        faults: Faults,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        self._tiers = tiers
        self._windows = windows
        self._trace = tiers.trace
        self._size = size
        self._rng = rng
        self._faults = faults
        self._rows: dict[int, Row] = {}
        self._queue: list[FakeStep] = []
        self.num_launched = 0

    def launch(self, plan: StepPlan) -> FakeStep:
        self.num_launched += 1
        self._trace.update(msgspec.msgpack.encode(plan))
        step = FakeStep(self, plan)
        self._queue.append(step)
        if self._rng.random() < self._faults.step_haste:
            self.run_until(step)
        self._tiers.move_some()
        return step

    def run_until(self, step: FakeStep) -> None:
        while step.outcome is None:
            self._tiers.move_some()
            first = self._queue.pop(0)
            first.outcome = self._compute(first.plan)

    def close(self) -> None:
        pass

    def _compute(self, plan: StepPlan) -> StepResult | Exception:
        for setup in plan.setups:
            self._rows[setup.row] = Row(setup, list(setup.token_ids), list(map(list, setup.block_ids)))
        for row, group, index, block in plan.new_blocks:
            blocks = self._rows[row].blocks[group]
            del blocks[index:]
            assert index == len(blocks), "a block table has a hole"
            blocks.append(block)
        if self._rng.random() < self._faults.step_fails:
            return MemoryError("a planned fault")
        for source, target in plan.block_copies:
            self._tiers.device[target] = list(self._tiers.device[source])
        result = StepResult([], [], [], 0.001 * len(plan.chunks))
        for chunk in plan.chunks:
            row = self._rows[chunk.row]
            context = self._read(row, chunk.start)
            for position in range(chunk.start, chunk.start + chunk.count):
                context = chain(context, row.tokens[position]) if position < len(row.tokens) else POISON
                for group in range(len(self._windows)):
                    self._slot(row, group, position)[position % self._size] = stored(context, group)
            if chunk.samples:
                token = sample(context, row.setup.seed, row.setup.sample_index)
                finite = self._rng.random() >= self._faults.nonfinite
                result.token_ids.append(token)
                result.finite.append(finite)
                result.logprobs.append(None)
                del row.tokens[chunk.start + chunk.count :]
                row.tokens.append(token)
        return result

    def _slot(self, row: Row, group: int, position: int) -> list[int]:
        return self._tiers.device[row.blocks[group][position // self._size]]

    def _read(self, row: Row, length: int) -> int:
        """All that attention would read, checked position by position in each group."""
        context = 0
        firsts = [0 if window is None else length + 1 - window for window in self._windows]
        for position in range(length):
            before = context
            context = chain(before, row.tokens[position]) if position < len(row.tokens) else POISON
            for group, first in enumerate(firsts):
                if position < first:
                    continue
                content = self._slot(row, group, position)[position % self._size]
                if context == POISON or content != stored(context, group):
                    # Behind a step that failed the next one computes rubbish, and nobody may use it.
                    name = f"position {position} of row {row.setup.row}, group {group},"
                    assert self._faults.step_fails, f"{name} is not its own"
                    return POISON
        return context


@dataclass
class World:
    """An engine whose model, copies and clock are fake; the rest is what is served with."""

    seed: int
    device_blocks: int = 16
    host_blocks: int = 32
    block_size: int = 4
    depth: int = 2
    max_num_seqs: int = 8
    max_step_tokens: int = 16
    park_grace: float = 0.05
    preemption: str = "auto"
    prefix_caching: bool = True
    write_ahead: float = 0.01
    host_quota: int | None = None
    """Host blocks that a tenant's parked and leased sequences may hold before they are the first to go."""
    windows: tuple[int | None, ...] = (None,)
    """Of each KV group."""
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.clock = Clock()
        self.transitions: set[tuple[State, Event]] = set()
        self.tiers = FakeTiers(self.device_blocks, self.host_blocks, self.block_size, self.rng, self.faults)
        groups = [KVGroup(window) for window in self.windows]
        self.manager = BlockManager(
            block_size=self.block_size,
            device_blocks=self.device_blocks,
            host_blocks=self.host_blocks,
            transfer=self.tiers,
            hasher=BlockHasher("fake", self.block_size, secret=b"seed") if self.prefix_caching else None,
            groups=groups,
            most_uncommitted=self.depth * self.max_step_tokens,
            host_quota=self.host_quota,
            observer=self._observe,
        )
        # With windows alone, sequences may be longer than the device tier.
        self.max_model_len = longest_sequence(
            groups,
            self.device_blocks - len(groups),
            2 * self.device_blocks // len(groups) * self.block_size,
            self.depth * self.max_step_tokens,
            self.block_size,
        )
        self.scheduler = Scheduler(
            Limits(
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_step_tokens=self.max_step_tokens,
                park_grace=self.park_grace,
                preemption=self.preemption,
                block_bytes=1024,
                write_ahead=self.write_ahead,
            ),
            self.manager,
            Constraints(Path("nowhere"), VOCAB, [EOS]),
            eos_token_ids=frozenset({EOS}),
            bytes_per_second=lambda: self.tiers.bytes_per_second,
            now=self.clock,
        )
        self.runner = FakeRunner(self.tiers, self.block_size, self.rng, self.faults, self.windows)
        info = EngineInfo(
            "fake", "Fake", VOCAB, self.max_model_len, [EOS], self.block_size, self.device_blocks,
            self.host_blocks, 256, "fake", "fake", {},
        )  # fmt: skip
        self.core = EngineCore(info, self.scheduler, self.runner, self.tiers, self.depth)

    def _observe(self, block: Block, event: Event, before: State, after: State) -> None:
        allowed = TRANSITIONS.get((before, event), frozenset())
        assert after in allowed, f"{before} --{event}--> {after} is not in the table"
        self.transitions.add((before, event))


Hook = Callable[[World, int], None]
