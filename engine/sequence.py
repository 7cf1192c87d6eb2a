"""One choice of one request on its way through the engine: what is known, computed and under way.

Positions of a sequence, as half-open intervals::

    [0, table.num_tokens)                   KV computed and collected
    [table.num_tokens, num_scheduled)       under way in launched steps
    [0, len(tokens))                        tokens known: the prompt and confirmed output
    [len(tokens), len(tokens) + pending)    tokens that launched steps will sample
    [num_scheduled, reserved)               may be scheduled without asking for blocks

``num_scheduled <= len(tokens) + pending`` always; a sequence with one position left to schedule is
decoding, one with more is in prefill, whether for the first time or again.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from tidegate.engine.constraint import Constraint
from tidegate.engine.memory.block import BlockTable
from tidegate.engine.policy import Candidate
from tidegate.engine.request import FinishReason, Request
from tidegate.engine.step import Scored

MAX_STEP_FAILURES = 3


class Status(StrEnum):
    WAITING = "waiting"
    """In the ready queue, or behind the first choice of its request: never started, or computing again."""
    RUNNING = "running"
    """Has a row and resident blocks; they may still be loading."""
    STALLED = "stalled"
    """Without credit. Its blocks, if it has any, are still resident."""
    SWAPPED = "swapped"
    """Its blocks have left the device, or may; it waits in the ready queue."""
    PARKED = "parked"
    """The same, but without credit: it waits for its client."""
    LEASED = "leased"
    """Ended, and its KV is kept for whoever continues it."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    choice: int
    arrival: int
    arrived_at: float
    table: BlockTable
    tokens: list[int]
    stop_ids: frozenset[int]
    max_output: int
    emit_upto: float = math.inf
    constraint: Constraint | None = None
    awaits_constraint: bool = False
    """It is being made, and without it no token can be chosen."""
    status: Status = Status.WAITING
    num_prompt: int = field(init=False)
    num_scored: int = field(init=False)
    """The prompt's positions whose logits have given their logprobs, where those are wanted."""
    num_scheduled: int = 0
    reserved: int = 0
    pending: int = 0
    in_flight: int = 0
    """Launched steps that have not been collected."""
    generation: int = 0
    """Results of steps planned under an older generation are dropped."""
    preempted: bool = False
    """To be preempted as soon as nothing is in flight for it."""
    row: int = -1
    row_blocks: int = -1
    """How much of the block tables the runner's row holds; -1 before the row is set up."""
    siblings: "list[Sequence]" = field(default_factory=list)
    """Other choices, until this one has computed the prompt that they share."""
    num_stalls: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    num_recomputed: int = 0
    high_water: int = 0
    """The furthest that KV was ever computed: anything below it that is computed again is recomputed."""
    full_blocks_seen: int = 0
    """Those that were looked at for copies ahead while the host had room; all are after one more."""
    failures: int = 0
    immune_until: int = 0
    preempted_at: float | None = None
    """While it waits for a row after a preemption; ``wanted_at``: after having waited for its client."""
    wanted_at: float | None = None
    started_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.prompt_token_ids)
        self.num_scored = self.request.num_scored

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def has_ended(self) -> bool:
        return self.status in (Status.LEASED, Status.FINISHED)

    @property
    def num_unscheduled(self) -> int:
        return len(self.tokens) + self.pending - self.num_scheduled

    @property
    def may_sample(self) -> bool:
        """Whether the next token may be produced: credit and length allow it, and what may come is known."""
        ahead = len(self.tokens) - self.num_prompt + self.pending
        return ahead < self.max_output and ahead < self.emit_upto and not self._lacks_mask

    @property
    def _lacks_mask(self) -> bool:
        """Whether what may come next is not known yet: it may depend on a token that is being sampled."""
        if self.constraint is None:
            return self.awaits_constraint
        return self.pending > 0 and self.constraint.follows_tokens

    @property
    def is_out_of_credit(self) -> bool:
        """Whether nothing but credit is missing for the next token."""
        return len(self.tokens) - self.num_prompt + self.pending >= self.emit_upto

    @property
    def order(self) -> tuple[int, bool, int]:
        """Who goes first: high priority, then those that have started, then first come."""
        return (-self.request.priority, self.started_at is None, self.arrival)

    @property
    def is_suspect(self) -> bool:
        """Whether its steps keep failing: one more, and it is the one that breaks them."""
        return self.failures == MAX_STEP_FAILURES - 1

    @property
    def shareable(self) -> list[int]:
        """Tokens of which all but the last one may find their KV: what is to be scored must be computed."""
        if self.request.params.prompt_logprobs is None or self.num_scored >= self.num_prompt - 1:
            return self.tokens
        return self.tokens[: self.num_scored + 1]

    def scored(self, start: int, end: int) -> Scored | None:
        """What is still to be scored behind positions ``[start, end)``."""
        top = self.request.params.prompt_logprobs
        first, last = max(start, self.num_scored), min(end, self.num_prompt - 1)
        if top is None or first >= last:
            return None
        return Scored(first, self.tokens[first + 1 : last + 1], top)

    def candidate(self, step_id: int) -> Candidate:
        return Candidate(
            stalled=self.status in (Status.STALLED, Status.LEASED),
            priority=self.request.priority,
            immune=step_id < self.immune_until,
            num_exclusive=self.table.num_exclusive,
            arrival=self.arrival,
        )

    def stop_reason(self) -> FinishReason | None:
        """Whether the last token ends the choice."""
        params = self.request.params
        if self.tokens[-1] in self.stop_ids and self.num_output > params.min_tokens:
            return FinishReason.STOP_TOKEN
        if self.constraint is not None and self.constraint.is_complete:
            return FinishReason.GRAMMAR_COMPLETE
        if self.num_output >= self.max_output:
            limited = params.max_tokens is not None and self.num_output >= params.max_tokens
            return FinishReason.MAX_TOKENS if limited else FinishReason.CONTEXT_LENGTH
        return None

    def rewind(self) -> None:
        """Go back to what is collected. A step under way runs to its end, and its result is dropped; the
        blocks that it writes to stay fenced until then.
        """
        self.generation += 1
        self.num_scheduled = self.table.num_tokens
        self.reserved = 0
        self.pending = 0
        self.in_flight = 0
        self.row_blocks = min(self.row_blocks, self.table.end)
