"""What passes between a front and an engine: one batch of commands in, one ``StepOutput`` out a step.

Everything is absolute and idempotent (a credit is "up to", a finish is "at"), so that a repeated or a
late message does no harm. Encoded with msgspec's MessagePack when the engine is a process of its own.
"""

from bisect import bisect_left
from enum import StrEnum
from typing import NamedTuple

import msgspec

from tidegate.engine.request import FinishReason, Request, Violation


class Submit(msgspec.Struct, tag="submit"):
    """Run this request. Its id must be new to the engine.

    A parent counts as it is when this is taken in: what ends its lease comes behind it.
    """

    request: Request


class Limit(msgspec.Struct, tag="limit"):
    """Every choice of the request may have produced up to ``emit_upto`` tokens; the larger wins."""

    request_id: str
    emit_upto: int


class Finish(msgspec.Struct, tag="finish"):
    """The front ended a choice at output offset ``at_offset``: later tokens do not exist.

    ``choice`` None ends all choices that still run, each where it stands.
    """

    request_id: str
    reason: FinishReason
    choice: int | None = None
    at_offset: int | None = None


class Update(msgspec.Struct, tag="update"):
    """Change a request that runs; what is None stays as it is. Behind its end it does nothing."""

    request_id: str
    max_tokens: int | None = None
    """The new limit of every choice that runs. It can only grow."""
    stop_token_ids: tuple[int, ...] | None = None
    """Replaces those of the request, from the next token on."""


class Release(msgspec.Struct, tag="release"):
    """The leases of these requests are over: nobody will continue them. Unknown ids do no harm."""

    request_ids: list[str]


class Inspect(msgspec.Struct, tag="inspect"):
    """Say once what is in the tiers and who is in the engine (see ``Inspection``)."""

    max_sequences: int = 1000


class Pause(msgspec.Struct, tag="pause"):
    """Plan no more steps, or go on. What is under way is collected; commands are taken in."""

    is_on: bool


class Flush(msgspec.Struct, tag="flush"):
    """Forget the prefixes that nobody holds, in these tiers. Answered by ``Flushed``."""

    device: bool
    host: bool


class Profile(msgspec.Struct, tag="profile"):
    """Record a trace of the next steps, so many. Answered by ``Profiled``; one at a time."""

    steps: int


Command = Submit | Limit | Finish | Update | Release | Inspect | Pause | Flush | Profile


class Logprob(msgspec.Struct, array_like=True):
    """The natural logarithm of one token's probability under the model's unfiltered logits."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely."""


class PositionLogprobs(msgspec.Struct, array_like=True):
    chosen: Logprob
    top: list[Logprob]
    """The most likely first; as many as were asked for."""


class Admitted(msgspec.Struct, array_like=True):
    """The first choice of a request got its blocks; ``cached_*`` prompt tokens need no compute."""

    request_id: str
    cached_device_tokens: int
    cached_host_tokens: int


class Delta(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one choice; ``offset`` is the output offset of the first."""

    request_id: str
    choice: int
    offset: int
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Of the prompt's tokens from ``offset`` on; the first token of a prompt has none.

    In their order, each once, and all of them before the request's first ``Delta``.
    """

    request_id: str
    offset: int
    positions: list[PositionLogprobs]


class ProgressKind(StrEnum):
    STALLED = "stalled"
    """No credit: it left the batch, its KV is still on the device."""
    PREEMPTED = "preempted"
    """Its device memory went to others; it comes back by itself."""
    PARKED = "parked"
    """Without credit for longer than the grace, and all its KV is in the host tier."""
    RESUMED = "resumed"
    DROPPED = "dropped"
    """Its KV was given up for room: it will be computed again on return."""
    RECOVERED = "recovered"
    """The engine died and another one goes on: the front's word, since no engine can say it."""


class Progress(msgspec.Struct, array_like=True):
    request_id: str
    choice: int
    kind: ProgressKind


class Usage(msgspec.Struct, array_like=True):
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    preemptions: int


class Timings(msgspec.Struct, array_like=True):
    """Seconds."""

    queued: float
    to_first_token: float | None
    total: float


class Finished(msgspec.Struct, array_like=True):
    """A choice ended, and holds no block of its own any more unless it is leased. The last word about it.

    ``error`` is an UPPER_SNAKE reason when ``reason`` is ``ERROR``.
    """

    request_id: str
    choice: int
    reason: FinishReason
    usage: Usage
    timings: Timings
    error: str | None = None


class Refused(msgspec.Struct, array_like=True):
    """The request was not accepted: nothing of it ran."""

    request_id: str
    violations: list[Violation]


class TierStats(msgspec.Struct):
    """Blocks of one tier. ``total = free + used``; ``reclaimable`` of the used ones can go at once."""

    total: int = 0
    free: int = 0
    reclaimable: int = 0
    states: dict[str, int] = {}
    """The used ones by state (see ``memory/block.py``); on the host also ``stale``: the device holds more."""


DURATION_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds in seconds, inclusive; behind the last one there is one count more."""


class Durations(msgspec.Struct):
    """How long things of one kind took: how often within each bound, and the sum in seconds."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(DURATION_BOUNDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(DURATION_BOUNDS, seconds)] += 1
        self.sum += seconds

    def __copy__(self) -> "Durations":
        return Durations(list(self.counts), self.sum)


class SwapStats(msgspec.Struct):
    """Copies between the tiers in one direction."""

    bytes: dict[str, int] = {}
    """By what they were for (see ``memory/copies.py``)."""
    seconds: float = 0.0
    """What they took, one after another."""
    queue_bytes: int = 0
    """Ordered, and not arrived yet."""
    utilization: float = 0.0
    """Share of the time, lately, during which this direction carried something."""


class Stats(msgspec.Struct):
    """Running totals since the engine started, and the present state of queue and tiers."""

    waiting: int = 0
    running: int = 0
    stalled: int = 0
    swapped: int = 0
    """Sequences that have left the device, parked ones included."""
    parked: int = 0
    leased: int = 0
    """Choices that have ended and whose KV is kept, and the blocks that they hold, shared ones each time."""
    leased_blocks: int = 0
    device: TierStats = msgspec.field(default_factory=TierStats)
    host: TierStats = msgspec.field(default_factory=TierStats)
    steps: int = 0
    step_time: Durations = msgspec.field(default_factory=Durations)
    scheduled_sequences: int = 0
    """The sizes of all steps, summed up."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_host_hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions_swap: int = 0
    preemptions_recompute: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    parked_dropped: int = 0
    swap_out: SwapStats = msgspec.field(default_factory=SwapStats)
    swap_in: SwapStats = msgspec.field(default_factory=SwapStats)
    failed_copies: int = 0
    preempt_stall: Durations = msgspec.field(default_factory=Durations)
    """From a preemption to the first step afterwards."""
    resume_wait: Durations = msgspec.field(default_factory=Durations)
    """Of a parked sequence and of one that continues another: from being wanted to the first step."""
    preempted_blocks: int = 0
    """Full blocks of preempted sequences, and those of them that the host held already."""
    preempted_clean_blocks: int = 0
    host_hit_tokens_resumed: int = 0
    """Tokens that came from the host tier to a sequence or a lease (class S), and as a known prefix (P)."""
    host_hit_tokens_prefix: int = 0
    thrashed_blocks: int = 0
    """Blocks that came back soon after they had left the device."""


FREE_SLOT = "."
PREFIX_SLOT = "p"
"""Of a known prefix that no sequence holds."""
SLOT_LETTERS = {
    "reserved": "r",
    "dirty": "d",
    "writing_back": "w",
    "clean": "c",
    "host_only": "h",
    "loading": "l",
}
"""Of a block that a sequence holds, by state."""


class SequenceView(msgspec.Struct, array_like=True):
    """One choice of a request, as it stands."""

    request_id: str
    choice: int
    tenant: str
    status: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    """Of prompt and output, those that have KV."""
    device_blocks: int
    host_blocks: int
    """Those that are in the host tier alone."""
    seconds: float
    """Since it came."""


class Inspection(msgspec.Struct):
    """What the tiers hold and who is in the engine, at one moment."""

    device: bytes
    """One letter for each slot, in order: see ``SLOT_LETTERS``."""
    host: bytes
    sequences: list[SequenceView]
    """Those that run first, then by urgency, then the leased ones."""


class Flushed(msgspec.Struct, array_like=True):
    """Slots that came free."""

    device_blocks: int
    host_blocks: int


class Profiled(msgspec.Struct, array_like=True):
    path: str
    """Of the trace."""


class StepOutput(msgspec.Struct):
    """All that one step gives to the front, in the order in which it is to be read."""

    refused: list[Refused] = []
    admitted: list[Admitted] = []
    prompt_logprobs: list[PromptLogprobs] = []
    deltas: list[Delta] = []
    progress: list[Progress] = []
    finished: list[Finished] = []
    stats: Stats | None = None
    inspection: Inspection | None = None
    flushed: Flushed | None = None
    profiled: Profiled | None = None

    def __bool__(self) -> bool:
        return bool(
            self.refused
            or self.admitted
            or self.prompt_logprobs
            or self.deltas
            or self.progress
            or self.finished
            or self.stats
            or self.inspection
            or self.flushed
            or self.profiled
        )


class Place(NamedTuple):
    """Positions ``[start, end)`` of one choice, which a step computes. Part of an engine's last word."""

    request_id: str
    choice: int
    start: int
    end: int


class EngineInfo(msgspec.Struct, frozen=True):
    """What a front must know of an engine that is ready to serve."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """Prompt and output together; also what the device tier can hold for one sequence."""
    eos_token_ids: list[int]
    block_size: int
    device_blocks: int
    host_blocks: int
    kv_bytes_per_token: int
    device: str
    dtype: str
    load_seconds: dict[str, float]
    """Where the start went: ``imports``, ``load``, ``pool``, in seconds."""
    kv_groups: int = 1
    """A token takes its place in a block of each (see ``memory/groups.py``)."""

    def tokens_in(self, blocks: int) -> int:
        """How many tokens so many blocks hold that all groups keep."""
        return blocks * self.block_size // self.kv_groups
