"""What happens to requests, on its way to the stream that listens: neutral of any wire protocol."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tidegate.engine.messages import PositionLogprobs, ProgressKind
from tidegate.engine.request import FinishReason
from tidegate.service.errors import Failure


@dataclass(slots=True)
class Admitted:
    request_id: str
    queue_position: int
    cached_device_tokens: int
    cached_host_tokens: int
    seed: int
    prompt_tokens: int
    prompt_token_ids: Sequence[int]
    """Empty where they were not asked for."""


class Delta(msgspec.Struct, gc=False):
    """New output of one choice; ``offset`` is the output offset of its first token.

    A ``Struct``, since one is made for every token: a quarter of what a dataclass takes.
    """

    request_id: str
    choice: int
    offset: int
    token_ids: "array[int] | list[int]"
    text: str
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None

    @property
    def weight(self) -> int:
        """Its part of a message's size, in tokens."""
        if self.logprobs:
            return len(self.token_ids) + sum(len(position.top) for position in self.logprobs)
        return len(self.token_ids)

    @property
    def end_offset(self) -> int:
        return self.offset + len(self.token_ids)

    def absorb(self, later: "Delta") -> None:
        """Become this delta and the next one of the same choice together."""
        self.token_ids.extend(later.token_ids)
        self.text += later.text
        if later.logprobs:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.finish_reason = later.finish_reason


@dataclass(slots=True)
class PromptLogprobs:
    """Some of the prompt's; ``offset`` is the prompt offset of the first one's token."""

    request_id: str
    offset: int
    positions: list[PositionLogprobs]

    @property
    def weight(self) -> int:
        """Its part of a message's size, in tokens."""
        return len(self.positions) + sum(len(position.top) for position in self.positions)


@dataclass(slots=True)
class Progress:
    request_id: str
    choice: int
    kind: ProgressKind


@dataclass(slots=True)
class ChoiceEnd:
    choice: int
    reason: FinishReason
    output_tokens: int
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True)
class Timings:
    """Seconds from the arrival of the request."""

    queued: float
    to_first_token: float | None
    total: float


@dataclass(slots=True)
class Finished:
    """The terminal event of a request that was served, to its end or until it was stopped."""

    request_id: str
    choices: list[ChoiceEnd]
    usage: Usage
    timings: Timings


@dataclass(slots=True)
class Failed:
    """The terminal event of a request that was refused or met a fault."""

    request_id: str
    failure: Failure


@dataclass(slots=True)
class CommandRejected:
    """A command of a session about a request was refused; the request goes on."""

    request_id: str
    command: str
    failure: Failure


@dataclass(slots=True)
class GoAway:
    """The server will stop in ``grace`` seconds."""

    grace: float


@dataclass(slots=True)
class Heartbeat:
    """Nothing happened for a while: say so, since proxies cut idle streams."""


Notice = Admitted | PromptLogprobs | Progress | Finished | Failed | CommandRejected | GoAway | Heartbeat
Event = Notice | list[Delta]
"""The deltas of a list name each choice once."""
