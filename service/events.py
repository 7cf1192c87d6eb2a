"""What happens to requests, on its way to the stream that listens: neutral of any wire protocol."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from tidegate.engine.messages import PositionLogprobs, ProgressKind
from tidegate.engine.request import FinishReason
from tidegate.service.errors import Failure

BATCH_TOKENS = 65_536
"""Tokens of one message, a reported alternative counted as one: about 1 MB, below every default cap."""


@dataclass(slots=True)
class Admitted:
    request_id: str
    queue_position: int
    cached_device_tokens: int
    cached_host_tokens: int
    seed: int
    prompt_token_ids: list[int]


@dataclass(slots=True)
class Delta:
    """New output of one choice; ``offset`` is the output offset of its first token."""

    request_id: str
    choice: int
    offset: int
    token_ids: list[int]
    text: str
    logprobs: list[PositionLogprobs] | None
    finish_reason: FinishReason | None

    @property
    def end_offset(self) -> int:
        return self.offset + len(self.token_ids)

    def absorb(self, later: "Delta") -> None:
        """Become this delta and the next one of the same choice together."""
        self.token_ids += later.token_ids
        self.text += later.text
        if later.logprobs:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.finish_reason = later.finish_reason


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


Notice = Admitted | Progress | Finished | Failed | CommandRejected | GoAway | Heartbeat
Event = Delta | Notice


class Outbox:
    """The events of one stream that its writer has not taken yet.

    It needs no bound of its own: what a request may have in here is bounded by its credit.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._closed = False
        self._failure: Failure | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def close(self, failure: Failure | None = None) -> None:
        """Nothing comes any more; the first close counts. With a failure, the stream ends with it."""
        if not self._closed:
            self._closed, self._failure = True, failure
            self._wake()

    async def take(self) -> list[Event]:
        """All events so far, once there are any; empty when closed. Raises the failure of ``close``.

        Events of one engine step arrive together, since they are put without a pause in between.
        """
        while not self._events and not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        if not events and self._failure is not None:
            raise self._failure
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def coalesce(events: list[Event]) -> Iterator[Notice | list[Delta]]:
    """The events in order, with every run of deltas as one list that names each choice once.

    A writer that is behind thus sends fewer and larger messages.
    """
    run: dict[tuple[str, int], Delta] = {}
    weight = 0
    for event in events:
        if isinstance(event, Delta):
            key = (event.request_id, event.choice)
            first = run.get(key)
            if first is None:
                run[key] = event
            else:
                first.absorb(event)
            weight += len(event.token_ids)
            if event.logprobs:
                weight += sum(len(position.top) for position in event.logprobs)
            if weight < BATCH_TOKENS:
                continue
        if run:
            yield list(run.values())
            run, weight = {}, 0
        if not isinstance(event, Delta):
            yield event
    if run:
        yield list(run.values())
