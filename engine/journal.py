"""What there is to tell the front, gathered step by step, and the totals since the start."""

from collections.abc import Callable
from copy import copy

from tidegate.engine.messages import (
    Admitted,
    Delta,
    Finished,
    Flushed,
    Inspection,
    PositionLogprobs,
    Profiled,
    Progress,
    ProgressKind,
    PromptLogprobs,
    Refused,
    Stats,
    StepOutput,
    Timings,
    Usage,
)
from tidegate.engine.request import FinishReason, Violation
from tidegate.engine.sequence import Sequence


class Journal:
    """The scheduler writes, the core takes. ``now`` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.stats = Stats()
        self._now = now
        self._out = StepOutput()

    def take(self) -> StepOutput:
        """All there is to say since the last call."""
        out, self._out = self._out, StepOutput()
        return out

    def totals(self) -> Stats:
        """A copy that changes no more."""
        stats = copy(self.stats)
        for name in ("step_time", "preempt_stall", "resume_wait"):
            setattr(stats, name, copy(getattr(stats, name)))
        return stats

    def inspected(self, inspection: Inspection) -> None:
        self._out.inspection = inspection

    def stepped(self, num_sequences: int, seconds: float) -> None:
        """A step is collected."""
        self.stats.steps += 1
        self.stats.scheduled_sequences += num_sequences
        self.stats.step_time.observe(seconds)

    def wanted(self, seq: Sequence) -> None:
        """What it has lies elsewhere than in a row, and it may go on: the wait for that begins."""
        seq.preempted_at, seq.wanted_at = None, self._now()

    def preempted(self, seq: Sequence) -> None:
        seq.num_preemptions += 1
        seq.preempted_at, seq.wanted_at = self._now(), None
        self.progress(seq, ProgressKind.PREEMPTED)

    def scheduled(self, seq: Sequence) -> None:
        """It has a row, and is part of a step for the first time since."""
        if seq.preempted_at is not None:
            self.stats.preempt_stall.observe(self._now() - seq.preempted_at)
        if seq.wanted_at is not None:
            self.stats.resume_wait.observe(self._now() - seq.wanted_at)
        seq.preempted_at = seq.wanted_at = None

    def flushed(self, device_blocks: int, host_blocks: int) -> None:
        self._out.flushed = Flushed(device_blocks, host_blocks)

    def profiled(self, path: str) -> None:
        self._out.profiled = Profiled(path)

    def refused(self, request_id: str, violations: list[Violation]) -> None:
        self._out.refused.append(Refused(request_id, violations))

    def admitted(self, seq: Sequence, known: int, on_host: int) -> None:
        """It starts with so many tokens that need no compute, some of them still in the host tier.

        Output that came with the request may be among them; only the prompt is reported.
        """
        seq.num_cached = min(known, seq.num_prompt)
        if seq.choice == 0:
            self.stats.prefix_hit_tokens += known
            self.stats.prefix_host_hit_tokens += on_host
            cached_host = min(on_host, seq.num_cached)
            self._out.admitted.append(Admitted(seq.request.id, seq.num_cached - cached_host, cached_host))

    def computed(self, seq: Sequence, start: int, end: int) -> None:
        """KV of positions ``[start, end)``; what lies below the sequence's high water was there before."""
        if start >= seq.high_water and start >= seq.num_prompt:
            seq.high_water = end
            return
        again = max(0, min(end, seq.high_water) - start)
        seq.num_recomputed += again
        self.stats.recomputed_tokens += again
        self.stats.prompt_tokens += max(0, min(end, seq.num_prompt) - max(start, seq.high_water))
        seq.high_water = max(seq.high_water, end)

    def token(self, seq: Sequence, token_id: int, logprobs: PositionLogprobs | None) -> None:
        """The next token of the output; to be told before it is appended."""
        if seq.first_token_at is None:
            seq.first_token_at = self._now()
        self.stats.output_tokens += 1
        wanted = None if logprobs is None else [logprobs]
        self._out.deltas.append(Delta(seq.request.id, seq.choice, seq.num_output, [token_id], wanted))

    def prompt_logprobs(self, seq: Sequence, offset: int, positions: list[PositionLogprobs]) -> None:
        """Of its request's prompt, from the token at ``offset`` on."""
        self._out.prompt_logprobs.append(PromptLogprobs(seq.request.id, offset, positions))

    def progress(self, seq: Sequence, kind: ProgressKind) -> None:
        self._out.progress.append(Progress(seq.request.id, seq.choice, kind))

    def finished(self, seq: Sequence, reason: FinishReason, error: str | None) -> None:
        """The last word about a choice."""
        usage = Usage(
            prompt_tokens=seq.num_prompt,
            output_tokens=seq.num_output,
            cached_tokens=seq.num_cached,
            recomputed_tokens=seq.num_recomputed,
            preemptions=seq.num_preemptions,
        )
        now, first = self._now(), seq.first_token_at
        timings = Timings(
            queued=(now if seq.started_at is None else seq.started_at) - seq.arrived_at,
            to_first_token=None if first is None else first - seq.arrived_at,
            total=now - seq.arrived_at,
        )
        self._out.finished.append(Finished(seq.request.id, seq.choice, reason, usage, timings, error))
