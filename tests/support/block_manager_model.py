"""A model of everything around the block manager, and an oracle that knows what each slot must hold.

The model plays the scheduler (admits, forks, suspends, resumes, releases), the runner (launches steps,
computes them some time later, collects them, lets them fail) and the copy engine (``FakeTransfer``). A
position's content is a number that stands for the tenant and all tokens up to there, as KV does, in each
group another one. Each rule is one method; ``choose(n)`` makes every decision, so that one model serves a
seeded random run and hypothesis alike. After every rule ``check`` compares tables, slots and content with
what must be.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from fake_transfer import POISON, FakeTransfer

from tidegate.engine.memory.block import TRANSITIONS, Block, BlockTable, Event, Slot, State
from tidegate.engine.memory.groups import KVGroup
from tidegate.engine.memory.prefix import BlockHasher
from tidegate.engine.memory.tiers import BlockManager

T = TypeVar("T")

GARBAGE = -2
"""What a step writes that fails, or that stands on one that failed."""

TENANTS = ("red", "blue")
NUM_TOKENS = 2
"""A tiny alphabet, so that prompts often begin alike."""
MAX_SEQUENCES = 6
PIPELINE_DEPTH = 2


class Violation(AssertionError):
    """The block manager broke a promise."""


def require(holds: bool, text: str) -> None:
    if not holds:
        raise Violation(text)


def index_of(slot: Slot | None) -> int:
    if slot is None:
        raise Violation("a block is not where it has to be")
    return slot.index


@dataclass(eq=False)
class Sequence:
    tenant: str
    table: BlockTable
    confirmed: int
    """Tokens that never change: the prompt, and what was sampled from committed steps."""
    tokens: list[int] = field(default_factory=list)
    content: list[int] = field(default_factory=list)
    """Of each position, what its KV must be."""
    computed: int = 0
    """What ``table.num_tokens`` should be."""
    scheduled: int = 0
    """Positions that launched steps cover: ``scheduled >= computed``."""
    in_flight: int = 0
    """Steps in flight that have it."""
    epoch: int = 0
    """Raised when a step failed: what was launched before then is void."""
    spoiled: bool = False
    """A step has failed, and nobody knows yet: what stands on it is void too."""
    released: bool = False

    def append(self, token: int) -> None:
        before = self.content[-1] if self.content else TENANTS.index(self.tenant)
        self.tokens.append(token)
        self.content.append(hash((before, token)) & 0xFFFFFFFF)


class Chunk(NamedTuple):
    """Positions ``[start, end)`` of a sequence in a step, and where its table stood when it was launched."""

    sequence: Sequence
    epoch: int
    start: int
    end: int
    slots: list[dict[int, int]]
    """Of each group, by the number of the block."""
    copies: list[tuple[int, int]]
    """Source and target slots that the step copies before it computes."""

    @property
    def uses(self) -> list[int]:
        held = [slot for group in self.slots for slot in group.values()]
        return [*held, *(source for source, _ in self.copies)]

    @property
    def is_void(self) -> bool:
        return self.sequence.released or self.epoch != self.sequence.epoch


@dataclass(eq=False)
class Step:
    step_id: int
    chunks: list[Chunk]
    fails: bool
    computed: bool = False


Choose = Callable[[int], int]


def stored(content: list[int], group: int) -> list[int]:
    """What the layers of a group keep of these positions."""
    return [value ^ group << 40 for value in content]


def first_visible(kind: KVGroup, num_tokens: int) -> int:
    """The first position that the one behind ``num_tokens`` sees."""
    return 0 if kind.window is None else max(0, num_tokens - kind.window + 1)


class BlockManagerModel:
    def __init__(
        self,
        choose: Choose,
        *,
        block_size: int,
        device_blocks: int,
        host_blocks: int,
        host_ready: int | None = None,
        host_quota: int | None = None,
        copies_fail: bool = True,
        walk: bool = True,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        """``windows``: of each KV group. ``host_ready``: host blocks that are in place from the start; None:
        all. ``walk`` False leaves out ``check_integrity``: the content oracle has to find faults alone.
        """
        self.choose = choose
        self.block_size = block_size
        self.copies_fail = copies_fail
        self.walk = walk
        self.kinds = [KVGroup(window) for window in windows]
        self.max_len = (device_blocks // len(windows) - 1) * block_size
        self.host_blocks = host_blocks
        self.host_ready = host_blocks if host_ready is None else host_ready
        self.transfer = FakeTransfer(device_blocks, host_blocks, block_size)
        self.manager = BlockManager(
            block_size=block_size,
            device_blocks=device_blocks,
            host_blocks=host_blocks,
            host_quota=host_quota,
            host_ready=lambda: self.host_ready,
            transfer=self.transfer,
            hasher=BlockHasher("model", block_size, secret=b"secret"),
            groups=self.kinds,
            most_uncommitted=2 * block_size,
            observer=self.observe,
        )
        self.sequences: list[Sequence] = []
        self.steps: list[Step] = []
        self.next_step = 1
        self.seen: Counter[tuple[State, Event, State]] = Counter()
        self.hits = 0
        self.truncations = 0
        self.copies_on_write = 0
        self.left_behind = 0
        """Blocks that left a window."""
        self.truth: dict[Block, list[int]] = {}
        """What each block that a table holds must contain, as far as anybody committed to it."""
        self._used_by_steps: Counter[int] = Counter()
        self._copying: dict[Block, tuple[int, int]] = {}

    # What there is to choose from

    @property
    def idle(self) -> list[Sequence]:
        return [s for s in self.sequences if s.table.resident and not s.in_flight]

    @property
    def idle_and_ready(self) -> list[Sequence]:
        return [s for s in self.idle if s.table.is_ready]

    @property
    def parked(self) -> list[Sequence]:
        return [s for s in self.sequences if not s.table.resident]

    @property
    def ready(self) -> list[Sequence]:
        return [s for s in self.sequences if s.table.is_ready]

    @property
    def uncomputed(self) -> list[Step]:
        return [s for s in self.steps if not s.computed]

    # What the manager reports

    def observe(self, block: Block, event: Event, before: State, after: State) -> None:
        allowed = TRANSITIONS.get((before, event), frozenset())
        require(after in allowed, f"{before} + {event} → {after} is not in the table")
        self.seen[before, event, after] += 1
        if event in (Event.RESERVE, Event.LOAD):
            self._given_device(block)
        if event in (Event.LOAD, Event.WRITE_BACK):
            self._given_copy(block, event)
        elif event in (Event.EVICT, Event.DROP_HOST, Event.DISCARD):
            require(block not in self._copying, f"{event} of a block under copy")
        elif event not in (Event.RESERVE, Event.COMMIT, Event.CUT):
            del self._copying[block]

    def _given_device(self, block: Block) -> None:
        index = index_of(block.device)
        require(self._used_by_steps[index] == 0, f"device slot {index} is given away under a step")
        require(
            all(index != device for device, _ in self._copying.values()),
            f"device slot {index} is given away under a copy",
        )
        self.transfer.device[index] = [POISON] * self.block_size

    def _given_copy(self, block: Block, event: Event) -> None:
        require(block not in self._copying, "a second copy of one block")
        device, host = index_of(block.device), index_of(block.host)
        require(all(device != d and host != h for d, h in self._copying.values()), "two copies share a slot")
        if event is Event.WRITE_BACK:
            # A step only reads what is full, and so may the copy; anything else it may be writing to.
            is_full = block.device is not None and block.device.valid_len == self.block_size
            require(is_full or self._used_by_steps[device] == 0, "a slot is written back under a step")
            self.transfer.host[host] = [POISON] * self.block_size
        self._copying[block] = (device, host)

    # Rules: what a scheduler does

    def admit(self) -> None:
        """A new sequence: what is known of its prompt, and room for a first chunk."""
        tenant = TENANTS[self.choose(len(TENANTS))]
        tokens: list[int] = []
        if self.sequences and self.choose(2):
            tokens += self._pick(self.sequences).tokens
        tokens += [self.choose(NUM_TOKENS) for _ in range(1 + self.choose(3 * self.block_size))]
        self._start(tenant, tokens[: self.max_len], self.manager.new_table(tenant))

    def _start(self, tenant: str, tokens: list[int], table: BlockTable) -> None:
        manager = self.manager
        sequence = Sequence(tenant, table, len(tokens))
        for token in tokens:
            sequence.append(token)
        found = manager.find_prefix(table, tokens)
        cached = found.length * self.block_size
        require(cached < len(tokens), "a hit covers the last token")
        end = min(len(tokens), cached + 1 + self.choose(2 * self.block_size))
        growth = manager.blocks_for(end) - found.length
        if not manager.has_room(found.blocks, growth * len(self.kinds)):
            return
        manager.adopt(table, found)
        self.sequences.append(sequence)
        sequence.computed = sequence.scheduled = cached
        self.hits += found.length
        require(manager.reserve(table, end), "there was room, and now there is none")

    def fork(self) -> None:
        """A branch of a sequence, wherever it is: what it has up to somewhere, then tokens of its own."""
        parent = self._pick(self.sequences)
        wanted = self.choose(parent.computed + 2 * self.block_size)
        table = self.manager.fork(parent.table, wanted)
        require(table.num_tokens == self._reach(parent, wanted), "a fork shares less than there is, or more")
        child = Sequence(parent.tenant, table, table.num_tokens + 1)
        for token in [*parent.tokens[: table.num_tokens], self.choose(NUM_TOKENS)]:
            child.append(token)
        child.computed = child.scheduled = table.num_tokens
        self.sequences.append(child)

    def _reach(self, sequence: Sequence, wanted: int) -> int:
        """All that there is of it, or nothing where a window reaches back to blocks that are gone."""
        wanted = min(wanted, sequence.computed)
        for kind, group in zip(self.kinds, sequence.table.groups, strict=True):
            if first_visible(kind, wanted) // self.block_size < group.start:
                return 0
        return wanted

    def truncate(self) -> None:
        """A sequence goes back to somewhere, at any moment, and on from there with another token."""
        sequence = self._pick(self.sequences)
        kept = self.choose(sequence.computed + 1)
        left = self._reach(sequence, kept)
        self.manager.truncate(sequence.table, kept)
        sequence.epoch += 1
        sequence.spoiled = False
        sequence.computed = sequence.scheduled = left
        del sequence.tokens[kept:], sequence.content[kept:]
        sequence.append(self.choose(NUM_TOKENS))
        sequence.confirmed = kept + 1

    def reserve_in_vain(self) -> None:
        """Room is made for a step that is not launched after all."""
        sequence = self._pick(self.idle_and_ready)
        if self._reserve(sequence, min(sequence.computed + 1 + self.choose(self.block_size), self.max_len)):
            self.manager.trim(sequence.table)

    def suspend(self) -> None:
        """A sequence leaves the device, loading or not; what steps in flight compute for it is lost."""
        self._suspend(self._pick([s for s in self.sequences if s.table.resident]))

    def _suspend(self, sequence: Sequence) -> None:
        self.manager.suspend(sequence.table)
        sequence.epoch += 1
        sequence.spoiled = False
        sequence.scheduled = sequence.computed
        del sequence.tokens[sequence.confirmed :], sequence.content[sequence.confirmed :]

    def resume(self) -> None:
        """A sequence comes back, if there is room for it."""
        table = self._pick(self.parked).table
        if self.manager.has_room(table.blocks, self.choose(2)):
            self.manager.resume(table)

    def park(self) -> None:
        """A client lets its sequence wait: it goes first where the host tier is full."""
        self.manager.park(self._pick(self.parked).table)

    def unpark(self) -> None:
        self.manager.unpark(self._pick(self.parked).table)

    def write_ahead(self) -> None:
        """Full blocks of a sequence that may run are copied before they have to leave."""
        full = self._pick(self.ready).table.full_blocks(self.block_size)
        self.manager.write_ahead(full, 1 + self.choose(3))

    def demote(self) -> None:
        self.manager.demote_prefixes(1 + self.choose(3))

    def release(self) -> None:
        """The end of a sequence, at any moment."""
        self._release(self._pick(self.sequences))

    def recompute(self) -> None:
        """Preemption by recomputing: the blocks go, the sequence starts over with what is still known."""
        sequence = self._pick(self.sequences)
        self._release(sequence)
        self._start(sequence.tenant, sequence.tokens[: sequence.confirmed], sequence.table)

    def _release(self, sequence: Sequence) -> None:
        sequence.released = True
        self.sequences.remove(sequence)
        self.manager.release(sequence.table)

    # Rules: what a runner does

    def launch(self) -> None:
        """A step over some of the ready sequences; a failed reservation leaves one out."""
        chunks = []
        for sequence in [s for s in self.ready if self.choose(3)]:
            start = sequence.scheduled
            end = min(start + 1 + self.choose(2 * self.block_size), self.max_len)
            if start < end and self._reserve(sequence, end):
                while len(sequence.tokens) < end:
                    sequence.append(self.choose(NUM_TOKENS))
                copies = self.manager.launched(sequence.table, self.next_step)
                chunk = Chunk(sequence, sequence.epoch, start, end, self._slots(sequence.table), copies)
                self._used_by_steps.update(chunk.uses)
                self.copies_on_write += len(copies)
                chunks.append(chunk)
                sequence.scheduled = end
                sequence.in_flight += 1
        if chunks:
            self.steps.append(Step(self.next_step, chunks, fails=self.choose(8) == 0))
            self.next_step += 1

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        table, manager = sequence.table, self.manager
        before = table.end
        growth = max(manager.blocks_for(num_tokens) - before, 0) * len(self.kinds)
        fits = growth + self._num_tails_to_copy(sequence) <= manager.num_available
        reserved = manager.reserve(table, num_tokens)
        require(reserved == fits, "a reservation contradicts the room there was")
        wanted = max(before, manager.blocks_for(num_tokens)) if fits else before
        require(all(group.end == wanted for group in table.groups), "a reservation is off")
        return reserved

    def _num_tails_to_copy(self, sequence: Sequence) -> int:
        """In how many groups another sequence needs, or writes, what this one would overwrite."""
        table = sequence.table
        place, shared = divmod(sequence.computed, self.block_size)
        if not shared:
            return 0
        others = [s for s in self.sequences if s is not sequence]
        count = 0
        for group in table.groups:
            tail = group.blocks[place - group.start]
            if group.source is None and tail.writer is not table:
                holders = [s for s in others if tail in s.table.held]
                count += tail.writer is not None or any(s.computed > sequence.computed for s in holders)
        return count

    def _slots(self, table: BlockTable) -> list[dict[int, int]]:
        return [
            {i: index_of(block.device) for i, block in enumerate(group.blocks, group.start)}
            for group in table.groups
        ]

    def compute(self) -> None:
        """The oldest step that has not computed yet reads what lies before its chunks, and writes them."""
        self._compute(self.uncomputed[0])

    def _compute(self, step: Step) -> None:
        step.computed = True
        device = self.transfer.device
        copies = [copy for chunk in step.chunks for copy in chunk.copies]
        # A step that fails may do so before, after or amid its copies.
        for source, target in copies[: self.choose(len(copies) + 1)] if step.fails else copies:
            device[target] = list(device[source])
        for chunk in step.chunks:
            content = chunk.sequence.content
            # Of a released sequence too: its slots are fenced, so nobody has touched them.
            current = chunk.epoch == chunk.sequence.epoch
            chunk.sequence.spoiled |= step.fails and current
            sound = current and not chunk.sequence.spoiled
            for group, (kind, slots) in enumerate(zip(self.kinds, chunk.slots, strict=True)):
                if sound:
                    seen = range(first_visible(kind, chunk.start), chunk.start)
                    expected = stored(content[seen.start : seen.stop], group)
                    require(self._read(slots, seen) == expected, "a step read garbage")
                for position in range(chunk.start, chunk.end):
                    slot = device[slots[position // self.block_size]]
                    value = stored([content[position]], group)[0] if sound else GARBAGE
                    slot[position % self.block_size] = value

    def _chunks(self, sequence: Sequence) -> list[Chunk]:
        return [chunk for step in self.steps for chunk in step.chunks if chunk.sequence is sequence]

    def _read(self, slots: dict[int, int], positions: range) -> list[int]:
        size, device = self.block_size, self.transfer.device
        require(all(p // size in slots for p in positions), "a step sees a block that its table let go")
        return [device[slots[p // size]][p % size] for p in positions]

    def collect(self) -> None:
        """The oldest step ends. One that failed is not committed: its sequences are trimmed."""
        step = self.steps.pop(0)
        if not step.computed:
            self._compute(step)
        for chunk in step.chunks:
            self._used_by_steps.subtract(chunk.uses)
            chunk.sequence.in_flight -= 1
        collected_first = self.choose(2)
        if collected_first:
            self.manager.collected(step.step_id)
        for chunk in step.chunks:
            if not chunk.is_void:
                self._settle(chunk, failed=step.fails)
        if not collected_first:
            self.manager.collected(step.step_id)

    def _settle(self, chunk: Chunk, *, failed: bool) -> None:
        sequence = chunk.sequence
        if failed:
            sequence.epoch += 1
            sequence.spoiled = False
            sequence.scheduled = sequence.computed
            # What the step would have sampled is not known: it may turn out otherwise next time.
            del sequence.tokens[sequence.confirmed :], sequence.content[sequence.confirmed :]
            self.manager.trim(sequence.table)
        else:
            held = [list(enumerate(group.blocks, group.start)) for group in sequence.table.groups]
            before = [group.start for group in sequence.table.groups]
            self.manager.commit(sequence.table, chunk.end, sequence.tokens[: chunk.end])
            for number, numbered in enumerate(held):
                for place, block in numbered:
                    start = place * self.block_size
                    end = min(start + self.block_size, chunk.end)
                    if start < end and end > sequence.computed // self.block_size * self.block_size:
                        self.truth[block] = stored(sequence.content[start:end], number)
            after = [group.start for group in sequence.table.groups]
            self.left_behind += sum(after) - sum(before)
            sequence.computed = chunk.end
            sequence.confirmed = max(sequence.confirmed, chunk.end)

    def run_step(self) -> None:
        """A step from beginning to end, with nothing in between."""
        self.launch()
        while self.steps:
            self.collect()

    # Rules: what a copy engine does

    def grow_host(self) -> None:
        """More of the host tier's memory is in place."""
        self.host_ready = min(self.host_blocks, self.host_ready + 1 + self.choose(4))

    def flush(self) -> None:
        self.manager.flush()

    def poll(self) -> None:
        self.manager.poll()

    def advance_copy(self) -> None:
        """Some more of a copy arrives."""
        ticket = self._pick(list(self.transfer.under_way))
        self.transfer.advance(ticket, 1 + self.choose(self.block_size))

    def finish_copy(self) -> None:
        """Any copy under way ends, whatever was submitted before it."""
        self.transfer.finish(self._pick(list(self.transfer.under_way)), ok=True)

    def fail_copy(self) -> None:
        self.transfer.finish(self._pick(list(self.transfer.under_way)), ok=False)

    def report_again(self) -> None:
        """A copy that ended long ago is reported once more."""
        self.transfer.report_again(self._pick(self.transfer.ended), ok=bool(self.choose(2)))

    def copy_all(self) -> None:
        """All copies that are ordered end, in order and well."""
        self.manager.flush()
        for ticket in list(self.transfer.under_way):
            self.transfer.finish(ticket, ok=True)
        self.manager.poll()

    # Rules: a moment of calm

    def quiesce(self) -> None:
        """Everything under way ends: then no slot may be left on its way to somewhere."""
        while self.steps:
            self.collect()
        manager = self.manager
        for _ in range(manager.device.num_blocks + manager.host.num_blocks):
            self.copy_all()
        require(manager.copies_in_flight == 0, "there is always one more copy")
        require(manager.num_draining == 0, "a slot drains for ever")
        kept = {b for s in self.sequences for b in s.table.blocks if s.table.resident}
        require(manager.num_available == manager.device.num_blocks - len(kept), "a device slot is nobody's")

    def park_all(self) -> None:
        """Everybody leaves: then the whole device is to be had, and each sequence alone fits again."""
        self.quiesce()
        for sequence in self.sequences:
            if sequence.table.resident:
                self._suspend(sequence)
        self.quiesce()
        for sequence in self.sequences:
            require(self.manager.has_room(sequence.table.blocks, 1), "a parked sequence cannot come back")

    def finish(self) -> None:
        """Everything is over: both tiers are whole again."""
        for sequence in list(self.sequences):
            self._release(sequence)
        self.quiesce()
        self.check()
        manager = self.manager
        require(manager.num_available == manager.device.num_blocks, "device slots leaked")
        require(manager.num_host_available == manager.host.num_blocks, "host slots leaked")

    # The oracle

    def check(self) -> None:
        self._check_truncated()
        if self.walk:
            self.manager.check_integrity(s.table for s in self.sequences)
        for sequence in self.sequences:
            self._check_content(sequence)

    def _check_truncated(self) -> None:
        truncated = set(self.manager.take_truncated())
        for sequence in self.sequences:
            table = sequence.table
            if table in truncated:
                truncated.remove(table)
                require(table.num_tokens < sequence.computed, "a table is truncated and has lost nothing")
                require(table.num_tokens == table.end * self.block_size, "half a block is left")
                require(all(c.is_void for c in self._chunks(sequence)), "a running sequence lost blocks")
                sequence.computed = sequence.scheduled = table.num_tokens
                self.truncations += 1
            require(table.num_tokens == sequence.computed, "tokens came or went in silence")
        require(not truncated, "a table that is over counts as truncated")

    def _check_content(self, sequence: Sequence) -> None:
        """Each slot of a table holds what it claims to, up to its ``valid_len``; a ready table all."""
        size, table = self.block_size, sequence.table
        for number, (kind, group) in enumerate(zip(self.kinds, table.groups, strict=True)):
            needed = first_visible(kind, sequence.computed) // size
            require(group.start <= needed, "a group let go of what its next position sees")
            require(group.start >= needed - 1, "a group holds what its window has long passed")
            for i, block in enumerate(group.blocks, group.start):
                content = sequence.content[i * size : min((i + 1) * size, sequence.computed)]
                if group.source is not None and i == sequence.computed // size:
                    require(
                        block.device is not None and block.device.valid_len == 0, "an unfilled tail counts"
                    )
                    block = group.source
                self._check_block(block, stored(content, number), table.is_ready)

    def _check_block(self, block: Block, expected: list[int], is_ready: bool) -> None:
        transfer = self.transfer
        if is_ready:
            held = transfer.device[index_of(block.device)][: len(expected)]
            require(held == expected, "a ready table holds garbage")
        truth = self.truth.get(block, [])
        require(truth[: len(expected)] == expected, "a table's content is overwritten")
        for slot, tier in ((block.device, transfer.device), (block.host, transfer.host)):
            if slot is not None and slot.valid_len:
                require(slot.valid_len <= len(truth), "a slot claims too much")
                n = slot.valid_len
                require(tier[slot.index][:n] == truth[:n], "a slot holds garbage")

    def _pick(self, items: list[T]) -> T:
        return items[self.choose(len(items))]


class Rule(NamedTuple):
    run: Callable[[BlockManagerModel], None]
    weight: float
    """How often a random run takes it: mostly work, some trouble, seldom calm."""
    when: Callable[[BlockManagerModel], Any]
    """Truthy where there is something to do it to."""


RULES = (
    Rule(BlockManagerModel.admit, 6, lambda m: len(m.sequences) < MAX_SEQUENCES),
    Rule(BlockManagerModel.fork, 2, lambda m: 0 < len(m.sequences) < MAX_SEQUENCES),
    Rule(BlockManagerModel.truncate, 2, lambda m: m.sequences),
    Rule(BlockManagerModel.reserve_in_vain, 1, lambda m: m.idle_and_ready),
    Rule(BlockManagerModel.suspend, 4, lambda m: [s for s in m.sequences if s.table.resident]),
    Rule(BlockManagerModel.resume, 6, lambda m: m.parked),
    Rule(BlockManagerModel.park, 2, lambda m: m.parked),
    Rule(BlockManagerModel.unpark, 1, lambda m: m.parked),
    Rule(BlockManagerModel.write_ahead, 2, lambda m: m.ready),
    Rule(BlockManagerModel.demote, 2, lambda m: True),
    Rule(BlockManagerModel.release, 2, lambda m: m.sequences),
    Rule(BlockManagerModel.recompute, 1, lambda m: m.sequences),
    Rule(BlockManagerModel.launch, 14, lambda m: m.ready and len(m.steps) < PIPELINE_DEPTH),
    Rule(BlockManagerModel.compute, 8, lambda m: m.uncomputed),
    Rule(BlockManagerModel.collect, 14, lambda m: m.steps),
    Rule(BlockManagerModel.run_step, 2, lambda m: m.ready),
    Rule(BlockManagerModel.grow_host, 1, lambda m: m.host_ready < m.host_blocks),
    Rule(BlockManagerModel.flush, 10, lambda m: m.manager.copies_in_flight > len(m.transfer.under_way)),
    Rule(BlockManagerModel.poll, 12, lambda m: m.transfer.num_reports),
    Rule(BlockManagerModel.advance_copy, 6, lambda m: m.transfer.under_way),
    Rule(BlockManagerModel.finish_copy, 14, lambda m: m.transfer.under_way),
    Rule(BlockManagerModel.fail_copy, 1, lambda m: m.transfer.under_way and m.copies_fail),
    Rule(BlockManagerModel.report_again, 1, lambda m: m.transfer.ended),
    Rule(BlockManagerModel.copy_all, 1, lambda m: m.manager.copies_in_flight),
    Rule(BlockManagerModel.quiesce, 0.5, lambda m: True),
    Rule(BlockManagerModel.park_all, 0.3, lambda m: m.sequences),
)

RULES_PER_EPISODE = 2_000

WINDOWS: tuple[tuple[int | None, ...], ...] = ((None,), (None, 3), (None,), (2, 7), (None, None, 5), (4,))
"""Of the groups of each episode in turn: full attention, as most models have it, and others."""


@dataclass
class Totals:
    """What a random run has met."""

    rules: int = 0
    hits: int = 0
    truncations: int = 0
    copies_on_write: int = 0
    left_behind: int = 0
    seen: Counter[tuple[State, Event, State]] = field(default_factory=Counter)


def chooser(rng: random.Random) -> Choose:
    return lambda n: int(rng.random() * n)


def run_random(num_rules: int, *, walk: bool = True) -> Totals:
    """Episode after episode, each from a seed of its own, on tiers of other sizes, to the last release."""
    totals, seed = Totals(), 0
    while totals.rules < num_rules:
        rng = random.Random(seed)
        windows = WINDOWS[seed % len(WINDOWS)]
        model = BlockManagerModel(
            chooser(rng),
            windows=windows,
            block_size=rng.choice((1, 2, 4)),
            device_blocks=rng.choice((3, 5, 8, 12)) * len(windows),
            host_blocks=rng.choice((0, 2, 4, 16)) * len(windows),
            host_ready=rng.choice((None, 0, 1)),
            host_quota=rng.choice((None, 0, 3)),
            walk=walk,
        )
        run_episode(model, rng, f"seed {seed}")
        seed += 1
        totals.rules += RULES_PER_EPISODE
        totals.hits += model.hits
        totals.truncations += model.truncations
        totals.copies_on_write += model.copies_on_write
        totals.left_behind += model.left_behind
        totals.seen += model.seen
    return totals


def run_episode(model: BlockManagerModel, rng: random.Random, name: str) -> None:
    weights = list(itertools.accumulate(rule.weight for rule in RULES))
    number = 0
    try:
        while number < RULES_PER_EPISODE:
            (rule,) = rng.choices(RULES, cum_weights=weights)
            if rule.when(model):
                number += 1
                rule.run(model)
                model.check()
        model.finish()
    except Exception as error:
        error.add_note(f"{name}, rule {number}")
        raise
