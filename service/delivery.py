"""What a stream writes next: taken from its requests when it can write, so nothing queues up before it.

A request keeps its output in its own log (``choice.py``). All that waits here is the news that there is
something to take: a stream that is behind finds more in the logs and sends fewer and larger messages.
"""

import asyncio
from collections import deque
from typing import Protocol

from tidegate.service.errors import Failure
from tidegate.service.events import Delta, Event, Notice

BATCH_TOKENS = 2048
"""Of one message, a reported alternative counted as one: about 16 KB."""
WAITING_CHARS = 8192
"""Text of all requests that may wait for the stream; more is made again from the tokens when it is taken."""


class Flush:
    """What one turn of a stream's writer takes: at most one batch, and what goes before and behind it."""

    __slots__ = ("after", "before", "deltas", "room")

    def __init__(self) -> None:
        self.before: list[Notice] = []
        self.deltas: list[Delta] = []
        self.after: list[Notice] = []
        self.room = BATCH_TOKENS
        """Tokens that may still come into the batch."""

    def events(self) -> list[Event]:
        return [*self.before, *([self.deltas] if self.deltas else []), *self.after]


class Source(Protocol):
    """A request that says ``mark`` when it has something new."""

    is_marked: bool
    listener: "Delivery | None"

    def collect(self, flush: Flush) -> None:
        """Put what is new into the flush, as far as there is room, and mark again where more is left."""


class Delivery:
    """What one stream has to write: notices of its own, and requests that have something new."""

    def __init__(self) -> None:
        self.waiting_chars = 0
        """Text that was made and not taken yet."""
        self._notices: list[Event] = []
        self._ready: deque[Source] = deque()
        self._closed = False
        self._failure: Failure | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, notice: Notice) -> None:
        self._notices.append(notice)
        self._wake()

    def mark(self, source: Source) -> None:
        """There is something to take of this request."""
        if not source.is_marked:
            source.is_marked = True
            if not self._ready:
                self._wake()
            self._ready.append(source)

    def close(self, failure: Failure | None = None) -> None:
        """Nothing comes any more; the first close counts. With a failure, the stream ends with it."""
        if not self._closed:
            self._closed, self._failure = True, failure
            self._wake()

    def cut(self, failure: Failure) -> None:
        """End the stream at once; what it has not written is for another one to write."""
        self._notices.clear()
        self._ready.clear()
        self._closed, self._failure = True, failure
        self._wake()

    async def take(self) -> list[Event]:
        """What there is to write, once there is something; empty when closed. Raises ``close``'s failure.

        What one engine step gave is taken together, since it is marked without a pause in between.
        """
        while True:
            while not (self._notices or self._ready or self._closed):
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            events, self._notices = self._notices, []
            flush = Flush()
            for _ in range(len(self._ready)):
                if flush.room <= 0:
                    break
                source = self._ready.popleft()
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

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
