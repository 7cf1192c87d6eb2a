"""One step of the engine, as the scheduler plans it and the runner computes it.

The runner keeps one *row* for each resident sequence: its token ids, block tables and sampling
parameters stay there from step to step, so that a plan carries changes only. Everything a plan does
to rows is applied in step order, behind the step before it: a row may be given to another sequence
while an earlier step that uses it still runs.
"""

from dataclasses import dataclass, field
from typing import Protocol

from tidegate.engine.constraint import Mask
from tidegate.engine.messages import PositionLogprobs
from tidegate.engine.request import SamplingParams


class DeviceLost(RuntimeError):
    """An error that a GPU does not recover from: the process must end, and another one start."""


class StepOutOfMemory(MemoryError):
    """The device has no memory for the step, however small its parts are made."""


@dataclass(slots=True)
class RowSetup:
    """A sequence that takes a row: all that the runner keeps of it."""

    row: int
    token_ids: list[int]
    """Prompt and confirmed output; positions behind them are written by the sampler."""
    num_prompt_tokens: int
    block_ids: list[list[int]]
    """For each KV group the device block of each logical block, in order; anything in place of those that its
    window has passed."""
    params: SamplingParams
    seed: int
    sample_index: int


@dataclass(slots=True)
class Scored:
    """Prompt tokens whose logprobs are wanted: those right behind the positions from ``start`` on."""

    start: int
    token_ids: list[int]
    top: int
    """How many of the most likely tokens to report beside each."""

    def within(self, start: int, end: int) -> "Scored | None":
        """Those behind positions ``[start, end)``."""
        first, last = max(start, self.start), min(end, self.start + len(self.token_ids))
        if first >= last:
            return None
        return Scored(first, self.token_ids[first - self.start : last - self.start], self.top)


@dataclass(slots=True)
class Chunk:
    """Positions ``[start, start + count)`` of one row, to be computed in this step.

    A chunk with ``samples`` ends at the last token known: the token at ``start + count`` is sampled
    from its logits and written to the row, where the next step may read it before it is confirmed.
    """

    row: int
    start: int
    count: int
    samples: bool
    scored: Scored | None = None
    """Of its own positions alone."""


@dataclass(slots=True)
class StepPlan:
    step_id: int
    chunks: list[Chunk] = field(default_factory=list)
    """Decodes (``count == 1`` and ``samples``) first."""
    setups: list[RowSetup] = field(default_factory=list)
    """Rows that change hands before this step computes."""
    new_blocks: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(row, KV group, index in its block table, device block id): growth of rows set up earlier."""
    masks: dict[int, Mask] = field(default_factory=dict)
    """By row, the tokens that may be sampled; rows that are free to choose have none."""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, target) device block ids, to be copied behind the step before and before this one computes:
    a row goes on from a block that it shares with others."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


@dataclass(slots=True)
class StepResult:
    """What a step sampled: one entry for each chunk with ``samples``, in plan order."""

    token_ids: list[int]
    finite: list[bool]
    """False where the logits held NaN or infinity; that token is meaningless."""
    logprobs: list[PositionLogprobs | None]
    """None where the request did not ask for them."""
    seconds: float
    """Wall time of the step's computation."""
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    """One for each scored token, in plan order."""


class StepHandle(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled; raises what the step raised."""


class Runner(Protocol):
    """Computes steps in the order in which they are launched."""

    def launch(self, plan: StepPlan) -> StepHandle: ...

    def close(self) -> None: ...
