"""Continuous batching with chunked prefill: who runs in this step, and what becomes of the results.

Every sequence stands in exactly one place: the *ready* queue (wants to run, has no row), *running* (has
a row and resident blocks), *idle* (without credit), or behind its first choice until their common
prompt is computed. ``plan`` moves sequences between these places and chooses a batch; ``apply`` takes in
what the step sampled, one step or more later. Neither knows torch.
"""

import math
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import count

import structlog

from tidegate.engine import policy
from tidegate.engine.journal import Journal
from tidegate.engine.memory.tiers import Block, BlockManager, BlockTable, State
from tidegate.engine.messages import (
    Finish,
    Limit,
    PositionLogprobs,
    ProgressKind,
    Release,
    Stats,
    StepOutput,
    Submit,
    TierStats,
    Update,
)
from tidegate.engine.request import FinishReason, Request, Violation
from tidegate.engine.sequence import Sequence, Status
from tidegate.engine.step import Chunk, RowSetup, StepPlan, StepResult
from tidegate.engine.timers import Timers

MAX_STEP_FAILURES = 3

Sample = tuple[int, bool, PositionLogprobs | None]
"""A sampled token: its id, whether its logits were finite, and what was asked for beside it."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a step and the queue; see ``EngineConfig`` for each."""

    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    park_grace: float
    preemption: str
    block_bytes: int
    write_ahead: int
    """Blocks of likely victims that may be written to the host in a step, before anybody is preempted.
    0 where copying takes computing time, as on the CPU device."""


@dataclass(slots=True)
class Throughput:
    """How fast prompts are computed lately, in tokens a second; None before the first prefill."""

    tokens_per_second: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-9)
        known = self.tokens_per_second
        self.tokens_per_second = rate if known is None else known + 0.2 * (rate - known)


@dataclass(slots=True)
class ScheduledStep:
    """A plan, and for each of its chunks the sequence and the generation it was planned under."""

    plan: StepPlan
    members: list[tuple[Sequence, int]]


class Scheduler:
    """Calls come from the engine's thread alone. ``now`` is a monotonic clock in seconds."""

    def __init__(
        self,
        limits: Limits,
        manager: BlockManager,
        *,
        eos_token_ids: frozenset[int],
        bytes_per_second: Callable[[], float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._manager = manager
        self._eos = eos_token_ids
        self._bytes_per_second = bytes_per_second
        self._now = now
        self._prefill = Throughput()
        self._caution = policy.CAUTION_AT_START
        self._displaced = 0
        self._requests: dict[str, list[Sequence]] = {}
        # The block manager speaks of tables: whose is one that lost blocks?
        self._by_table: dict[BlockTable, Sequence] = {}
        self._ready: list[Sequence] = []
        self._running: list[Sequence] = []
        self._idle: set[Sequence] = set()
        self._parking: list[Sequence] = []
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._timers = Timers(alive=self._requests)
        self._arrivals = count()
        self._last_step = 0
        self._journal = Journal(now)

    # What the front says

    def submit(self, command: Submit) -> None:
        request = command.request
        violations = self._violations(request)
        if violations:
            self._journal.refused(request.id, violations)
            return
        choices = [self._new_sequence(request, i) for i in range(request.params.n)]
        self._requests[request.id] = choices
        choices[0].siblings = choices[1:]
        if request.deadline is not None:
            name = request.id
            self._timers.at(request.deadline, name, lambda: self._end(name, FinishReason.DEADLINE))
        self._make_ready(choices[0])

    def limit(self, command: Limit) -> None:
        for seq in self._requests.get(command.request_id, ()):
            seq.emit_upto = max(seq.emit_upto, command.emit_upto)
            if seq in self._idle and seq.may_sample:
                self._idle.remove(seq)
                self._make_ready(seq)

    def finish(self, command: Finish) -> None:
        self._end(command.request_id, command.reason, command.choice, command.at_offset)

    def update(self, command: Update) -> None:
        for seq in self._requests.get(command.request_id, ()):
            if command.stop_token_ids is not None:
                ends = frozenset() if seq.request.params.ignore_eos else self._eos
                seq.stop_ids = frozenset(command.stop_token_ids) | ends
            if command.max_tokens is not None:
                most = self._limits.max_model_len - seq.num_prompt
                seq.max_output = max(seq.max_output, min(most, command.max_tokens))

    def release(self, command: Release) -> None:
        """Leases end. Nothing is leased yet: what a finished request computed stays as a known prefix."""

    def request_ids(self) -> list[str]:
        """Requests that have not ended, in the order in which they came."""
        return list(self._requests)

    def preempt(self, request_id: str) -> bool:
        """Take the device blocks of a request that runs, as pressure would; it comes back by itself."""
        running = [seq for seq in self._requests.get(request_id, ()) if seq in self._running]
        for seq in running:
            self._preempt(seq)
        return bool(running)

    # One step

    def plan(self) -> ScheduledStep | None:
        """The next step, or None where nothing can run at present."""
        self._manager.poll()
        self._note_truncated()
        self._timers.run_due(self._now())
        self._announce_parked()
        step = ScheduledStep(StepPlan(self._last_step + 1), [])
        if not self._plan_suspect(step):
            self._plan_decodes(step)
            budget = max(1, self._limits.max_step_tokens - len(step.plan.chunks))
            budget = self._plan_prefills(step, budget)
            self._admit(step, budget)
        self._note_truncated()
        self._copy_ahead()
        self._manager.flush()
        self._caution, self._displaced = policy.next_caution(self._caution, self._displaced), 0
        if not step.plan.chunks:
            return None
        self._last_step = step.plan.step_id
        return step

    def apply(self, step: ScheduledStep, result: StepResult) -> None:
        """Take in a step's results. Steps are applied in the order in which they were planned."""
        self._manager.collected(step.plan.step_id)
        self._journal.stats.steps += 1
        self._observe(step.plan, result.seconds)
        samples = zip(result.token_ids, result.finite, result.logprobs, strict=True)
        for chunk, (seq, generation) in zip(step.plan.chunks, step.members, strict=True):
            sample = next(samples) if chunk.samples else None
            if seq.generation == generation:
                self._take(seq, chunk, sample)
        self._manager.flush()

    def fail(self, step: ScheduledStep, error: Exception) -> None:
        """A step raised: its members go on from what was collected before, a few times at the most."""
        log.error("step_failed", step=step.plan.step_id, error=repr(error), sequences=len(step.members))
        self._manager.collected(step.plan.step_id)
        for seq, generation in step.members:
            if seq.generation != generation:
                continue
            self._manager.trim(seq.table)
            seq.rewind()
            # The step may have failed before it had set up its rows.
            seq.row_blocks = -1
            seq.failures += 1
            if seq.failures >= MAX_STEP_FAILURES:
                self._finish(seq, FinishReason.ERROR, error="STEP_FAILED")
            elif seq.preempted:
                self._preempt(seq)
        self._manager.flush()

    def take_output(self) -> StepOutput:
        """All there is to say since the last call."""
        return self._journal.take()

    @property
    def has_work(self) -> bool:
        """Whether the next ``plan`` could do anything; timers apart."""
        return bool(self._ready or self._running or self._parking or self.is_copying)

    @property
    def is_copying(self) -> bool:
        """Whether blocks are on their way between the tiers."""
        return self._manager.copies_in_flight > 0

    @property
    def is_stuck(self) -> bool:
        """After a plan that came to nothing, with no step and no copy under way: nothing can move."""
        return bool(self._ready or self._running)

    def next_timer(self) -> float | None:
        return self._timers.next

    def shed(self) -> None:
        """Nothing can run, and nothing is under way that could change that: say so and end one request."""
        seq = min([*self._running, *self._ready], key=lambda s: s.order)
        log.error("no_progress", request=seq.request.id, available=self._manager.num_available)
        self._finish(seq, FinishReason.ERROR, error="NO_PROGRESS")

    def snapshot(self) -> Stats:
        """The totals, with the present state of queue and tiers filled in."""
        stats, manager = copy(self._journal.stats), self._manager
        sequences = [seq for choices in self._requests.values() for seq in choices]
        stats.running = len(self._running)
        stats.stalled = sum(seq.status is Status.STALLED for seq in sequences)
        stats.swapped = sum(seq.status in (Status.SWAPPED, Status.PARKED) for seq in sequences)
        stats.waiting = sum(seq.status is Status.WAITING for seq in sequences)
        stats.device = TierStats(manager.device.num_blocks, manager.device.num_free, manager.num_reclaimable)
        stats.host = TierStats(manager.host.num_blocks, manager.host.num_free, manager.num_host_reclaimable)
        stats.swap_out_bytes = manager.copied_out * self._limits.block_bytes
        stats.swap_in_bytes = manager.copied_in * self._limits.block_bytes
        return stats

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` where the queues, the rows or the blocks do not add up."""
        self._manager.check_integrity(self._by_table)
        alive = {seq for choices in self._requests.values() for seq in choices}
        behind = [sibling for seq in alive for sibling in seq.siblings]
        places = [*self._ready, *self._running, *self._idle, *behind]
        if len(places) != len(set(places)) or set(places) != alive:
            raise RuntimeError("a sequence stands in no place, or in two")
        if {seq.table for seq in alive} != set(self._by_table):
            raise RuntimeError("a table belongs to no sequence that is alive")
        if sorted([*self._rows, *(seq.row for seq in self._running)]) != list(
            range(self._limits.max_num_seqs)
        ):
            raise RuntimeError("free and used rows do not add up")

    # Coming in

    def _violations(self, request: Request) -> list[Violation]:
        found = []
        prompt, given = len(request.prompt_token_ids), len(request.output_token_ids)
        params, longest = request.params, self._limits.max_model_len
        output = params.max_tokens or given + 1
        if request.id in self._requests:
            found.append(Violation("request_id", "is in use by a request that has not ended"))
        if prompt == 0:
            found.append(Violation("prompt", "is empty: give at least one token"))
        elif prompt + output > longest:
            found.append(
                Violation(
                    "max_tokens" if prompt < longest else "prompt",
                    f"{prompt} prompt tokens and {output} of output exceed the limit of "
                    f"{longest}: shorten the prompt or lower max_tokens",
                )
            )
        if params.max_tokens is not None and given >= params.max_tokens:
            found.append(Violation("output_token_ids", "leave nothing to generate: raise max_tokens"))
        if given and params.n != 1:
            found.append(Violation("n", "must be 1 when generation goes on behind given output tokens"))
        return found

    def _new_sequence(self, request: Request, choice: int) -> Sequence:
        params = request.params
        most = self._limits.max_model_len - len(request.prompt_token_ids)
        seq = Sequence(
            request=request,
            choice=choice,
            arrival=next(self._arrivals),
            arrived_at=self._now(),
            table=self._manager.new_table(request.tenant),
            tokens=[*request.prompt_token_ids, *request.output_token_ids],
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            max_output=most if params.max_tokens is None else min(most, params.max_tokens),
        )
        if request.emit_upto is not None:
            seq.emit_upto = request.emit_upto
        self._by_table[seq.table] = seq
        return seq

    def _make_ready(self, seq: Sequence) -> None:
        """Find the place of a sequence that has no row: ready, idle without credit, or running at once."""
        table = seq.table
        if not seq.may_sample:
            seq.status = Status.PARKED if table.blocks else Status.STALLED
            self._idle.add(seq)
            if table.blocks:
                self._manager.park(table)
                self._parking.append(seq)
            return
        self._manager.unpark(table)
        if table.resident:
            # Credit came back within the grace. Nobody could take the blocks of a sequence that waits in
            # the ready queue, so without a row it must not keep them.
            if self._rows:
                self._journal.progress(seq, ProgressKind.RESUMED)
                self._run(seq)
                return
            self._manager.suspend(table)
        seq.status = Status.SWAPPED if table.blocks else Status.WAITING
        insort(self._ready, seq, key=lambda s: s.order)

    def _run(self, seq: Sequence) -> None:
        seq.status = Status.RUNNING
        seq.row = self._rows.pop()
        seq.row_blocks = -1
        insort(self._running, seq, key=lambda s: s.order)

    def _admit(self, step: ScheduledStep, budget: int, above: float = -math.inf) -> int:
        """Bring in sequences of a priority ``above`` from the ready queue, in their order.

        While rows, blocks and budget last; returns what is left of the budget.
        """
        while self._ready and budget > 0:
            seq = self._ready[0]
            if seq.request.priority <= above or not self._find_row(seq) or not self._enter(seq):
                break
            if seq.table.is_ready:
                budget -= self._schedule(step, seq, budget)
        return budget

    def _find_row(self, seq: Sequence) -> bool:
        """Whether there is a row to take; where there is none, a less urgent sequence gives up its own."""
        if not self._rows and not any(running.preempted for running in self._running):
            victim = self._victim(lambda c: not c.stalled and c.priority < seq.request.priority)
            if victim is not None:
                self._preempt(victim)
        return bool(self._rows)

    def _enter(self, seq: Sequence) -> bool:
        """Take a sequence from the ready queue into the batch; False, unchanged, where there is no room."""
        table, manager = seq.table, self._manager
        known = self._find_room(seq)
        if known is None:
            return False
        # Making room may have cost its own tail. Later, this would drop the step that it gets now.
        self._note_truncated()
        returns = bool(table.blocks)
        # The order in the queue depends on whether it has started: out of the queue first.
        self._ready.remove(seq)
        if seq.started_at is None:
            seq.started_at = self._now()
            on_host = sum(block.device is None or block.state is State.LOADING for block in known)
            size = manager.block_size
            self._journal.admitted(seq, known=len(known) * size, on_host=on_host * size)
        else:
            seq.immune_until = self._last_step + policy.IMMUNE_STEPS
            self._journal.progress(seq, ProgressKind.RESUMED)
        if returns:
            manager.resume(table)
        else:
            manager.adopt(table, known)
        seq.num_scheduled = table.num_tokens
        self._run(seq)
        return True

    def _find_room(self, seq: Sequence) -> list[Block] | None:
        """The blocks that a newcomer starts with, its own or a known prefix, once they fit on the device.

        With room left for others to grow; the stalled and the less urgent make way. None: not now.
        """
        while True:
            # Looked up anew each time: making room may have cost the prefix.
            known = seq.table.blocks or self._manager.find_prefix(seq.table, seq.tokens)
            extra = self._manager.blocks_for(len(seq.tokens) + 1) - len(known)
            reserve = policy.growth_reserve(len(self._running), self._manager.block_size, self._caution)
            if self._manager.has_room(known, extra + reserve):
                return known
            if self._room_on_its_way():
                return None
            victim = self._victim(lambda c: c.stalled or c.priority < seq.request.priority)
            if victim is None:
                return None
            self._preempt(victim)

    # Choosing the batch

    def _plan_suspect(self, step: ScheduledStep) -> bool:
        """One sequence whose steps keep failing gets its last chance alone, so that no other pays for it."""
        for seq in list(self._running):
            is_suspect = seq.failures == MAX_STEP_FAILURES - 1 and self._may_run(seq)
            if is_suspect and self._schedule(step, seq, self._limits.max_step_tokens):
                return True
        return False

    def _plan_decodes(self, step: ScheduledStep) -> None:
        for seq in list(self._running):
            if self._may_run(seq) and seq.num_unscheduled == 1:
                self._schedule(step, seq, 1)

    def _plan_prefills(self, step: ScheduledStep, budget: int) -> int:
        for seq in list(self._running):
            if seq.num_unscheduled > 1:
                # A long prompt must not use up every step's budget before the more urgent get in.
                budget = self._admit(step, budget, above=seq.request.priority)
                if budget > 0 and self._may_run(seq):
                    budget -= self._schedule(step, seq, budget)
        return budget

    @staticmethod
    def _may_run(seq: Sequence) -> bool:
        running = seq.status is Status.RUNNING and not seq.preempted
        return running and seq.table.is_ready and seq.may_sample

    def _schedule(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        """Add the sequence's next positions to the step; how many they are, 0 without room for them."""
        start, amount = seq.num_scheduled, min(seq.num_unscheduled, budget)
        if not self._make_room(seq, start + amount):
            return 0
        plan = step.plan
        self._update_row(plan, seq)
        samples = amount == seq.num_unscheduled
        plan.chunks.append(Chunk(seq.row, start, amount, samples))
        step.members.append((seq, seq.generation))
        seq.num_scheduled += amount
        seq.pending += samples
        seq.in_flight += 1
        self._manager.launched(seq.table, plan.step_id)
        return amount

    def _update_row(self, plan: StepPlan, seq: Sequence) -> None:
        """Tell the runner what it does not know yet of the sequence's row."""
        block_ids = [
            block.device.index for block in seq.table.blocks[max(0, seq.row_blocks) :] if block.device
        ]
        if seq.row_blocks < 0:
            seed, index = seq.request.seed, seq.request.sample_index + seq.choice
            params = seq.request.params
            # A copy: the list grows while the step that carries it is under way.
            tokens = list(seq.tokens)
            plan.setups.append(RowSetup(seq.row, tokens, seq.num_prompt, block_ids, params, seed, index))
        else:
            places = range(seq.row_blocks, len(seq.table.blocks))
            plan.new_blocks.extend((seq.row, i, block) for i, block in zip(places, block_ids, strict=True))
        seq.row_blocks = len(seq.table.blocks)

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Grow a running sequence's table, at the cost of those behind it; False where it must wait."""
        while not self._manager.reserve(seq.table, num_tokens):
            if self._room_on_its_way():
                return False
            victim = self._victim(partial(policy.may_displace, seq.candidate(self._last_step)))
            if victim is None:
                return False
            self._displaced += 1
            self._preempt(victim)
        return True

    def _room_on_its_way(self) -> bool:
        """Whether device blocks come free by themselves: preempting more before they did would cascade."""
        return self._manager.num_draining > 0 or any(seq.preempted for seq in self._running)

    # Leaving the batch

    def _victim(self, may: Callable[[policy.Candidate], bool]) -> Sequence | None:
        """The sequence that gives up its device blocks first, among those that ``may``."""
        holders = [seq for seq in self._running if not seq.preempted]
        holders += [seq for seq in self._idle if seq.table.resident]
        ranked = [
            (policy.victim_rank(candidate), seq)
            for seq, candidate in self._candidates(holders)
            if may(candidate)
        ]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None

    def _copy_ahead(self) -> None:
        """Write to the host what will have to leave the device soon, so that nobody waits for it then."""
        manager = self._manager
        total = manager.device.num_blocks
        if manager.device.num_free < policy.DEMOTE_MARK * total:
            manager.demote_prefixes(policy.DEMOTED_A_STEP)
        most = self._limits.write_ahead
        if not most or manager.num_available > (1 - policy.WRITE_AHEAD_MARK) * total:
            return
        holders = [seq for seq in self._running if seq.table.is_ready]
        ranked = sorted(self._candidates(holders), key=lambda pair: policy.victim_rank(pair[1]))
        for seq, _ in ranked:
            full = seq.table.blocks[: seq.table.num_tokens // manager.block_size]
            most -= manager.write_ahead(full, most)
            if most <= 0:
                return

    def _candidates(self, holders: list[Sequence]) -> Iterator[tuple[Sequence, policy.Candidate]]:
        return ((seq, seq.candidate(self._last_step)) for seq in holders)

    def _preempt(self, seq: Sequence) -> None:
        """Take its device blocks as soon as no step uses them; what is under way still counts."""
        if seq.status is Status.STALLED:
            self._park(seq)
        elif seq.in_flight:
            seq.preempted = True
        else:
            self._swap_or_drop(seq)

    def _swap_or_drop(self, seq: Sequence) -> None:
        seq.preempted = False
        seq.num_preemptions += 1
        self._leave(seq)
        if self._should_swap(seq):
            self._journal.stats.preemptions_swap += 1
            self._manager.suspend(seq.table)
        else:
            self._journal.stats.preemptions_recompute += 1
            self._manager.release(seq.table)
        seq.rewind()
        self._journal.progress(seq, ProgressKind.PREEMPTED)
        self._make_ready(seq)

    def _should_swap(self, seq: Sequence) -> bool:
        if self._manager.host.num_blocks == 0:
            return False
        if self._limits.preemption != "auto" or self._prefill.tokens_per_second is None:
            return self._limits.preemption != "recompute"
        own = [block for block in seq.table.blocks if len(block.holders) == 1]
        dirty = sum(not block.is_clean for block in own)
        size = self._limits.block_bytes
        costs = policy.preemption_costs(
            bytes_out=dirty * size,
            bytes_in=len(own) * size,
            queued_bytes=self._manager.copies_in_flight * size,
            bytes_per_second=self._bytes_per_second(),
            tokens=seq.table.num_tokens,
            tokens_per_second=self._prefill.tokens_per_second,
        )
        fits = dirty <= self._manager.num_host_available
        if not (fits and costs.prefers_swap):
            log.info("recompute_chosen", tokens=seq.table.num_tokens, host_room=fits, **costs._asdict())
        return fits and costs.prefers_swap

    def _stall(self, seq: Sequence) -> None:
        """Out of credit: it leaves the batch; its blocks stay resident for the grace."""
        self._leave(seq)
        seq.status = Status.STALLED
        seq.num_stalls += 1
        self._idle.add(seq)
        self._journal.progress(seq, ProgressKind.STALLED)
        stalls = seq.num_stalls
        grace_ends = self._now() + self._limits.park_grace
        self._timers.at(grace_ends, seq.request.id, lambda: self._end_grace(seq, stalls))

    def _end_grace(self, seq: Sequence, stalls: int) -> None:
        if seq.status is Status.STALLED and seq.num_stalls == stalls and seq.table.resident:
            self._park(seq)

    def _park(self, seq: Sequence) -> None:
        """Without credit for longer than the grace, or under pressure: its KV goes to the host tier."""
        seq.status = Status.PARKED
        self._manager.park(seq.table)
        self._manager.suspend(seq.table)
        self._parking.append(seq)

    def _announce_parked(self) -> None:
        for seq in list(self._parking):
            if seq.status is not Status.PARKED:
                self._parking.remove(seq)
            elif self._manager.is_written(seq.table):
                self._parking.remove(seq)
                self._journal.progress(seq, ProgressKind.PARKED)

    def _note_truncated(self) -> None:
        """Sequences whose KV was given up, in whole or in part, compute it again when they return."""
        for table in self._manager.take_truncated():
            seq = self._by_table.get(table)
            if seq is not None:
                seq.rewind()
                self._journal.stats.parked_dropped += 1
                self._journal.progress(seq, ProgressKind.DROPPED)

    def _leave(self, seq: Sequence) -> None:
        """Out of whatever place the sequence stands in. Its row may be reused by the next step."""
        if seq.row >= 0:
            self._running.remove(seq)
            self._rows.append(seq.row)
            seq.row = -1
        elif seq in self._idle:
            self._idle.remove(seq)
        elif (place := self._place_in_ready(seq)) is not None:
            del self._ready[place]
        else:
            for other in self._requests[seq.request.id]:
                if seq in other.siblings:
                    other.siblings.remove(seq)

    def _place_in_ready(self, seq: Sequence) -> int | None:
        """Found by the queue's order: thousands may wait, and may be cancelled all at once."""
        place = bisect_left(self._ready, seq.order, key=lambda s: s.order)
        return place if place < len(self._ready) and self._ready[place] is seq else None

    # What a step gave

    def _take(self, seq: Sequence, chunk: Chunk, sample: Sample | None) -> None:
        seq.in_flight -= 1
        seq.failures = 0
        if sample is not None and not sample[1]:
            self._manager.distrust(seq.table)
            self._finish(seq, FinishReason.ERROR, error="NONFINITE_LOGITS")
            return
        end = chunk.start + chunk.count
        self._journal.computed(seq, chunk.start, end)
        self._manager.commit(seq.table, end, seq.tokens)
        if sample is not None:
            seq.pending -= 1
            self._journal.token(seq, sample[0], sample[2])
            seq.tokens.append(sample[0])
            reason = seq.stop_reason()
            if reason is not None:
                self._finish(seq, reason)
                return
        if seq.siblings and seq.table.num_tokens >= seq.num_prompt:
            self._release_siblings(seq)
        if seq.in_flight == 0:
            if seq.preempted:
                self._swap_or_drop(seq)
            elif seq.is_out_of_credit:
                self._stall(seq)

    def _release_siblings(self, seq: Sequence) -> None:
        """The prompt is computed, or will not be here: the other choices go on from what there is."""
        siblings, seq.siblings = seq.siblings, []
        for sibling in siblings:
            del self._by_table[sibling.table]
            sibling.table = self._manager.fork(seq.table, seq.num_prompt - 1)
            self._by_table[sibling.table] = sibling
            sibling.high_water = sibling.table.num_tokens
            self._make_ready(sibling)

    def _observe(self, plan: StepPlan, seconds: float) -> None:
        """Only steps that are mostly prefill tell how fast recomputation would be."""
        if plan.num_tokens >= 2 * len(plan.chunks):
            self._prefill.observe(plan.num_tokens, seconds)

    # Ending

    def _end(
        self, request_id: str, reason: FinishReason, choice: int | None = None, at_offset: int | None = None
    ) -> None:
        for seq in list(self._requests.get(request_id, ())):
            if choice is None or seq.choice == choice:
                if at_offset is not None:
                    del seq.tokens[seq.num_prompt + at_offset :]
                self._finish(seq, reason)

    def _finish(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """The one end of a sequence: its blocks go, its last word is queued, later results are dropped."""
        self._leave(seq)
        seq.status = Status.FINISHED
        seq.generation += 1
        self._release_siblings(seq)
        self._manager.release(seq.table)
        del self._by_table[seq.table]
        choices = self._requests[seq.request.id]
        choices.remove(seq)
        if not choices:
            del self._requests[seq.request.id]
        self._journal.finished(seq, reason, error)
