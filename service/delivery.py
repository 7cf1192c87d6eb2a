"""What a stream writes next: taken from its requests when it can write, so nothing queues up before it.

A request keeps its output in its own log (``choice.py``). All that waits here is the news that there is
something to take: a stream that is behind finds more in the logs and sends fewer and larger messages.
"""

import asyncio
from typing import Protocol

from tidegate.service.errors import Failure
from tidegate.service.events import Delta, Event, Notice, PromptLogprobs

BATCH_TOKENS = 2048
"""Of one message, a reported alternative counted as one: about 16 KB."""
WAITING_CHARS = 8192
"""Text of all requests that may wait for the stream; more is made again from the tokens when it is taken."""


class Flush:
    """What one turn of a stream's writer takes: at most one batch, and what goes before and behind it."""

    __slots__ = ("_passed_on", "after", "before", "deltas", "room")

    def __init__(self, passed_on: list[Delta]) -> None:
        """``passed_on``: deltas of one token each, which the batch begins with."""
        self.before: list[Notice] = []
        self.deltas = passed_on
        self.after: list[Notice] = []
        self.room = BATCH_TOKENS - len(passed_on)
        """Tokens that may still come into the batch."""
        self._passed_on: dict[tuple[str, int], Delta] | None = None if passed_on else {}
        """By request and choice; None: to be made when it is needed, which is seldom."""

    def passed_on(self, request_id: str, choice: int) -> Delta | None:
        """What the batch began with of this choice."""
        if self._passed_on is None:
            self._passed_on = {(delta.request_id, delta.choice): delta for delta in self.deltas}
        return self._passed_on.get((request_id, choice))

    def add_prompt(self, part: PromptLogprobs) -> None:
        self.room -= part.weight
        self.before.append(part)

    def add(self, delta: Delta) -> None:
        self.room -= delta.weight
        if before := self.passed_on(delta.request_id, delta.choice):
            before.absorb(delta)
        else:
            self.deltas.append(delta)

    def events(self) -> list[Event]:
        return [*self.before, *([self.deltas] if self.deltas else []), *self.after]


class Source(Protocol):
    """A request that says ``mark`` when it has something new."""

    is_marked: bool
    listener: "Delivery | None"

    def collect(self, flush: Flush) -> None:
        """Put what is new into the flush, as far as there is room, and mark again where more is left."""


class Delivery:
    """What one stream has to write: notices of its own, and requests that have something new.

    Where the writer waits, a token goes straight into its next message, which is what happens to most.
    Where it writes, requests keep what is new and are marked.
    """

    __slots__ = ("_closed", "_failure", "_notices", "_ready", "_waiter", "passing_on", "waiting_chars")

    def __init__(self) -> None:
        self.waiting_chars = 0
        """Text that was made and not taken yet."""
        self._notices: list[Event] = []
        self.passing_on: list[Delta] | None = None
        """While the writer waits: what it will write, each one token of a request that is not marked."""
        self._ready: list[Source] = []
        self._closed = False
        self._failure: Failure | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, notice: Notice) -> None:
        self._notices.append(notice)
        self.wake()

    def wake(self) -> None:
        """There is something to write."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def mark(self, source: Source) -> None:
        """There is something to take of this request."""
        if not source.is_marked:
            source.is_marked = True
            if not self._ready:
                self.wake()
            self._ready.append(source)

    def close(self, failure: Failure | None = None) -> None:
        """Nothing comes any more; the first close counts. With a failure, the stream ends with it."""
        if not self._closed:
            self._closed, self._failure = True, failure
            self.wake()

    def cut(self, failure: Failure) -> None:
        """End the stream at once; what it has not written is for another one to write."""
        self._notices.clear()
        self._ready.clear()
        self.passing_on = None
        self._closed, self._failure = True, failure
        self.wake()

    async def take(self) -> list[Event]:
        """What there is to write, once there is something; empty when closed. Raises ``close``'s failure.

        What one engine step gave is taken together, since it is marked without a pause in between.
        """
        while True:
            if not (self._notices or self._ready or self._closed):
                self.passing_on = []
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            events, self._notices = self._notices, []
            passed_on, self.passing_on = self.passing_on or [], None
            flush = Flush(passed_on)
            ready, self._ready = self._ready, []
            for index, source in enumerate(ready):
                if flush.room <= 0:
                    self._ready = ready[index:] + self._ready
                    break
                if source.listener is self:  # else it has another stream by now
                    source.is_marked = False
                    source.collect(flush)
            events += flush.events()
            if events:
                return events
            if self._closed and not self._ready:
                if self._failure is not None:
                    raise self._failure
                return []
