"""Continuous batching with chunked prefill: who runs in this step, and what becomes of the results.

``plan`` chooses a batch and the copies that go with it; ``apply`` takes in what the step sampled, one
step or more later. Where each sequence stands is the ``Roster``'s affair, who comes in ``Admission``'s,
and who has to go ``Eviction``'s. None of them knows torch.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import structlog

from tidegate.engine import policy
from tidegate.engine.admission import Admission
from tidegate.engine.constraints import Constraints
from tidegate.engine.eviction import Eviction
from tidegate.engine.journal import Journal
from tidegate.engine.limits import Limits
from tidegate.engine.memory.block import Block
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import (
    Finish,
    Flush,
    Inspect,
    Limit,
    Place,
    PositionLogprobs,
    Release,
    Stats,
    StepOutput,
    Submit,
    Update,
)
from tidegate.engine.report import Reporter
from tidegate.engine.request import FinishReason
from tidegate.engine.roster import Roster
from tidegate.engine.sequence import MAX_STEP_FAILURES, Sequence, Status
from tidegate.engine.step import Chunk, RowSetup, StepOutOfMemory, StepPlan, StepResult

__all__ = ["Limits", "ScheduledStep", "Scheduler"]

Sample = tuple[int, bool, PositionLogprobs | None]
"""A sampled token: its id, whether its logits were finite, and what was asked for beside it."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class ScheduledStep:
    """A plan, and for each of its chunks the sequence and the generation it was planned under."""

    plan: StepPlan
    members: list[tuple[Sequence, int]]

    @property
    def places(self) -> list[Place]:
        """What it computes, in terms of requests."""
        return [
            Place(seq.request.id, seq.choice, chunk.start, chunk.start + chunk.count)
            for chunk, (seq, _) in zip(self.plan.chunks, self.members, strict=True)
        ]


class Scheduler:
    """Calls come from the engine's thread alone. ``now`` is a monotonic clock in seconds."""

    def __init__(
        self,
        limits: Limits,
        manager: BlockManager,
        constraints: Constraints,
        *,
        eos_token_ids: frozenset[int],
        bytes_per_second: Callable[[], float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._manager = manager
        self._constraints = constraints
        self._now = now
        self._journal = Journal(now)
        self._roster = Roster(limits.max_num_seqs)
        self._eviction = Eviction(
            limits, self._roster, manager, self._journal, bytes_per_second=bytes_per_second, now=now
        )
        self._admission = Admission(
            limits.max_model_len,
            self._roster,
            manager,
            self._journal,
            self._eviction,
            constraints,
            eos_token_ids=eos_token_ids,
            now=now,
        )
        self._reporter = Reporter(self._journal, self._roster, manager, limits.block_bytes, now)
        self._short_of_room = -math.inf
        """The highest priority of those that run and found no room to grow in this plan. Newcomers that are
        no more urgent would take what comes free for it, one after the other, for as long as any come."""

    # What the front says

    def submit(self, command: Submit) -> None:
        request = command.request
        violations = self._admission.violations(request)
        if violations:
            self._journal.refused(request.id, violations)
            return
        self._admission.submit(request)
        if request.deadline is not None:
            name = request.id
            self._eviction.timers.at(request.deadline, name, lambda: self._end(name, FinishReason.DEADLINE))

    def limit(self, command: Limit) -> None:
        for seq in self._choices(command.request_id):
            seq.emit_upto = max(seq.emit_upto, command.emit_upto)
            if seq in self._roster.idle and seq.may_sample:
                self._roster.leave(seq)
                if seq.started_at is not None:
                    self._journal.wanted(seq)
                self._eviction.place(seq)

    def finish(self, command: Finish) -> None:
        self._end(command.request_id, command.reason, command.choice, command.at_offset)

    def update(self, command: Update) -> None:
        for seq in self._choices(command.request_id):
            if command.stop_token_ids is not None:
                seq.stop_ids = self._admission.stop_ids(seq.request, command.stop_token_ids)
                if seq.constraint is not None:
                    seq.constraint.stop_at(seq.stop_ids)
                    self._settle_constraints([seq])
            if command.max_tokens is not None:
                most = self._limits.max_model_len - seq.num_prompt
                seq.max_output = max(seq.max_output, min(most, command.max_tokens))

    def release(self, command: Release) -> None:
        for request_id in command.request_ids:
            self._eviction.end_leases(request_id)

    def inspect(self, command: Inspect) -> None:
        self._journal.inspected(self._reporter.inspection(command.max_sequences))

    def profiled(self, path: str) -> None:
        self._journal.profiled(path)

    def flush(self, command: Flush) -> None:
        self._journal.flushed(*self._manager.forget_prefixes(device=command.device, host=command.host))

    def request_ids(self) -> list[str]:
        """Requests that have not ended, in the order in which they came."""
        return list(self._roster.requests)

    def preempt(self, request_id: str) -> bool:
        """Take the device blocks of a request that runs, as pressure would; it comes back by itself."""
        running = [seq for seq in self._choices(request_id) if seq.row >= 0]
        for seq in running:
            self._eviction.preempt(seq)
        return bool(running)

    def _choices(self, request_id: str) -> list[Sequence]:
        """Those that have not ended; of an unknown request, none."""
        return list(self._roster.requests.get(request_id, ()))

    # One step

    def plan(self) -> ScheduledStep | None:
        """The next step, or None where nothing can run at present."""
        self._manager.poll()
        self._eviction.note_truncated()
        self._eviction.timers.run_due(self._now())
        self._eviction.announce_parked()
        self._settle_constraints(self._admission.take_constraints())
        step = ScheduledStep(StepPlan(self._eviction.step_id + 1), [])
        self._short_of_room = -math.inf
        if not self._plan_suspect(step):
            self._plan_decodes(step)
            budget = max(1, self._limits.max_step_tokens - len(step.plan.chunks))
            budget = self._plan_prefills(step, budget)
            self._admit(step, budget)
        self._eviction.note_truncated()
        self._eviction.copy_ahead()
        self._manager.flush()
        if not step.plan.chunks:
            return None
        self._eviction.step_id = step.plan.step_id
        return step

    def apply(self, step: ScheduledStep, result: StepResult) -> None:
        """Take in a step's results. Steps are applied in the order in which they were planned."""
        self._manager.collected(step.plan.step_id)
        self._journal.stepped(len(step.members), result.seconds)
        self._observe(step.plan, result.seconds)
        samples = zip(result.token_ids, result.finite, result.logprobs, strict=True)
        scores = iter(result.prompt_logprobs)
        for chunk, (seq, generation) in zip(step.plan.chunks, step.members, strict=True):
            sample = next(samples) if chunk.samples else None
            scored = [] if chunk.scored is None else list(islice(scores, len(chunk.scored.token_ids)))
            if seq.generation == generation:
                self._take(seq, chunk, sample, scored)
        self._settle_constraints([seq for seq, _ in step.members])
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
                out_of_memory = isinstance(error, StepOutOfMemory)
                reason = "DEVICE_OUT_OF_MEMORY" if out_of_memory else "STEP_FAILED"
                self._finish(seq, FinishReason.ERROR, error=reason)
            elif seq.preempted:
                self._eviction.preempt(seq)
        self._manager.flush()

    def take_output(self) -> StepOutput:
        """All there is to say since the last call."""
        return self._journal.take()

    @property
    def has_work(self) -> bool:
        """Whether the next ``plan`` could do anything; timers apart."""
        return self.is_stuck or self._eviction.is_parking or self.is_copying or self.is_making_constraints

    @property
    def is_copying(self) -> bool:
        """Whether blocks are on their way between the tiers."""
        return self._manager.copies_in_flight > 0

    @property
    def is_making_constraints(self) -> bool:
        """Whether a request waits for what its output must be like."""
        return self._constraints.is_making

    def wait_for_constraints(self, timeout: float) -> None:
        """At most so many seconds."""
        self._constraints.wait(timeout)

    @property
    def is_stuck(self) -> bool:
        """After a plan that came to nothing, with no step and no copy under way: nothing can move."""
        return bool(self._roster.ready or self._roster.running)

    def next_timer(self) -> float | None:
        return self._eviction.timers.next

    def shed(self) -> None:
        """Nothing can run, and nothing is under way that could change that: say so and end one request."""
        seq = min([*self._roster.running, *self._roster.ready], key=lambda s: s.order)
        log.error("no_progress", request=seq.request.id, available=self._manager.num_available)
        self._finish(seq, FinishReason.ERROR, error="NO_PROGRESS")

    def snapshot(self) -> Stats:
        """The totals, with the present state of queue and tiers filled in."""
        return self._reporter.stats()

    def close(self) -> None:
        """End the threads on which constraints are made."""
        self._constraints.close()

    def check_integrity(self) -> None:
        """Raises ``RuntimeError`` where the queues, the rows or the blocks do not add up."""
        self._manager.check_integrity(self._roster.by_table)
        self._roster.check_integrity()

    # Choosing the batch

    def _plan_suspect(self, step: ScheduledStep) -> bool:
        """One sequence whose steps keep failing gets its last chance alone, so that no other pays for it."""
        for seq in list(self._roster.running):
            is_next = seq.is_suspect and self._may_run(seq)
            if is_next and self._schedule(step, seq, self._limits.max_step_tokens):
                return True
        return False

    def _plan_decodes(self, step: ScheduledStep) -> None:
        for seq in list(self._roster.running):
            if seq.num_unscheduled == 1 and self._may_run(seq) and not seq.is_suspect:
                self._schedule(step, seq, 1)

    def _plan_prefills(self, step: ScheduledStep, budget: int) -> int:
        for seq in list(self._roster.running):
            if seq.num_unscheduled > 1:
                # A long prompt must not use up every step's budget before the more urgent get in.
                budget = self._admit(step, budget, above=seq.request.priority)
                if budget > 0 and self._may_run(seq) and not seq.is_suspect:
                    budget -= self._schedule(step, seq, budget)
        return budget

    def _admit(self, step: ScheduledStep, budget: int, above: float = -math.inf) -> int:
        """Bring in sequences of a priority ``above`` from the ready queue, in their order.

        While rows, blocks and budget last; returns what is left of the budget.
        """
        ready, admission = self._roster.ready, self._admission
        while ready and budget > 0:
            seq = ready[0]
            if seq.request.priority <= max(above, self._short_of_room):
                break
            if not admission.find_row(seq) or not admission.enter(seq):
                break
            if seq.is_suspect and step.plan.chunks:
                # It has its row, and the next step.
                continue
            if seq.table.is_ready:
                budget -= self._schedule(step, seq, budget)
            if seq.is_suspect:
                return 0
        return budget

    @staticmethod
    def _may_run(seq: Sequence) -> bool:
        running = seq.status is Status.RUNNING and not seq.preempted
        return running and seq.table.is_ready and seq.may_sample

    def _schedule(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        """Add the sequence's next positions to the step; how many they are, 0 without room for them."""
        start, left = seq.num_scheduled, seq.num_unscheduled
        amount = min(left, budget)
        plan = step.plan
        if start + amount > seq.reserved:
            if not self._make_room(seq, start + amount):
                self._short_of_room = max(self._short_of_room, seq.request.priority)
                return 0
            self._update_row(plan, seq)
        samples = amount == left
        plan.chunks.append(Chunk(seq.row, start, amount, samples, seq.scored(start, start + amount)))
        step.members.append((seq, seq.generation))
        seq.num_scheduled += amount
        seq.pending += samples
        seq.in_flight += 1
        if samples and seq.constraint is not None:
            plan.masks[seq.row] = seq.constraint.mask
        plan.block_copies += self._manager.launched(seq.table, plan.step_id)
        return amount

    def _update_row(self, plan: StepPlan, seq: Sequence) -> None:
        """Tell the runner what it does not know yet of the sequence's row."""
        groups, known = seq.table.groups, seq.row_blocks
        if known < 0:
            self._journal.scheduled(seq)
            seed, index = seq.request.seed, seq.request.sample_index + seq.choice
            params = seq.request.params
            # A copy: the list grows while the step that carries it is under way.
            tokens = list(seq.tokens)
            block_ids = [[0] * group.start + device_ids(group.blocks) for group in groups]
            plan.setups.append(RowSetup(seq.row, tokens, seq.num_prompt, block_ids, params, seed, index))
        else:
            for number, group in enumerate(groups):
                first = max(known, group.start)
                new = enumerate(device_ids(group.blocks[first - group.start :]), first)
                plan.new_blocks.extend((seq.row, number, i, block) for i, block in new)
        seq.row_blocks = seq.table.end

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Grow a running sequence's table, at the cost of those behind it; False where it must wait."""
        while not self._manager.reserve(seq.table, num_tokens):
            if self._eviction.room_is_on_its_way:
                return False
            victim = self._eviction.victim(
                partial(policy.may_displace, seq.candidate(self._eviction.step_id))
            )
            if victim is None:
                return False
            self._eviction.preempt(victim)
        seq.reserved = seq.table.end * self._manager.block_size
        return True

    # What a step gave

    def _take(
        self, seq: Sequence, chunk: Chunk, sample: Sample | None, scored: list[PositionLogprobs]
    ) -> None:
        seq.in_flight -= 1
        seq.failures = 0
        is_finite = sample is None or sample[1]
        if not is_finite or not all(math.isfinite(position.chosen.logprob) for position in scored):
            self._manager.distrust(seq.table)
            self._finish(seq, FinishReason.ERROR, error="NONFINITE_LOGITS")
            return
        end = chunk.start + chunk.count
        self._journal.computed(seq, chunk.start, end)
        self._manager.commit(seq.table, end, seq.tokens)
        if chunk.scored is not None:
            self._journal.prompt_logprobs(seq, chunk.scored.start + 1, scored)
            seq.num_scored = chunk.scored.start + len(scored)
        if sample is not None:
            seq.pending -= 1
            self._journal.token(seq, sample[0], sample[2])
            seq.tokens.append(sample[0])
            if seq.constraint is not None:
                seq.constraint.advance(sample[0])
            reason = seq.stop_reason()
            if reason is not None:
                self._finish(seq, reason)
                return
        if seq.siblings and seq.table.num_tokens >= seq.num_prompt:
            self._release_siblings(seq)
        if seq.in_flight == 0:
            if seq.preempted:
                self._eviction.swap_or_drop(seq)
            elif seq.is_out_of_credit:
                self._eviction.stall(seq)

    def _release_siblings(self, seq: Sequence) -> None:
        """The prompt is computed, or will not be here: the other choices go on from what there is.

        Where much of it is missing one of them computes that, and the others stand behind it in turn.
        """
        siblings, seq.siblings = seq.siblings, []
        if siblings and seq.table.num_tokens < seq.num_prompt - 1:
            siblings[0].siblings, siblings = siblings[1:], siblings[:1]
        for sibling in siblings:
            self._roster.set_table(sibling, self._manager.fork(seq.table, seq.num_prompt - 1))
            sibling.high_water = sibling.table.num_tokens
            sibling.num_scored = seq.num_scored
            self._eviction.place(sibling)

    def _observe(self, plan: StepPlan, seconds: float) -> None:
        """Only steps that are mostly prefill tell how fast recomputation would be."""
        self._eviction.step_seconds = seconds
        if plan.num_tokens >= 2 * len(plan.chunks):
            self._eviction.prefill.observe(plan.num_tokens, seconds)

    # What may come next

    def _settle_constraints(self, sequences: list[Sequence]) -> None:
        """Compute the masks that are due; those that run into an end, or are a whole sentence, end here."""
        constrained = [
            (seq, seq.constraint) for seq in sequences if seq.constraint is not None and not seq.has_ended
        ]
        due = [(seq, constraint) for seq, constraint in constrained if constraint.is_due]
        ends = self._constraints.compute_masks([constraint for _, constraint in due]) if due else []
        for (seq, _), end in zip(due, ends, strict=True):
            if end is not None:
                self._finish(seq, FinishReason.ERROR, error=end.reason)
        for seq, constraint in constrained:
            if constraint.is_complete and not seq.has_ended:
                self._finish(seq, FinishReason.GRAMMAR_COMPLETE)

    # Ending

    def _end(
        self, request_id: str, reason: FinishReason, choice: int | None = None, at_offset: int | None = None
    ) -> None:
        for seq in self._choices(request_id):
            if choice is None or seq.choice == choice:
                if at_offset is not None:
                    del seq.tokens[seq.num_prompt + at_offset :]
                self._finish(seq, reason)

    def _finish(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """The one end of a sequence: its blocks go, its last word is queued, later results are dropped."""
        self._roster.leave(seq)
        seq.generation += 1
        if seq.awaits_constraint:
            seq.awaits_constraint = False
            if not any(other.awaits_constraint for other in self._choices(seq.request.id)):
                self._constraints.drop(seq.request)
        self._release_siblings(seq)
        if seq.request.is_leased and error is None and seq.table.num_tokens:
            self._eviction.lease(seq)
        else:
            seq.status = Status.FINISHED
            self._manager.release(seq.table)
            self._roster.remove(seq)
        self._journal.finished(seq, reason, error)


def device_ids(blocks: list[Block]) -> list[int]:
    """Where the blocks of a resident table lie."""
    return [block.device.index for block in blocks if block.device]
