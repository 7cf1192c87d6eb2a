"""The output of one request, read as it comes: the common stream, and the one behind ``Generate``."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import grpc

from tidegate.service.client import messages
from tidegate.service.client.errors import TidegateError, error_from_rpc
from tidegate.service.client.messages import (
    Admitted,
    Chunk,
    Event,
    Finished,
    PositionLogprobs,
    Progress,
    PromptLogprobs,
)
from tidegate.service.client.retry import Attempts
from tidegate.v1 import inference_pb2

GenerateCall = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class Stream(ABC):
    """One request's output. Iterate over it for its chunks, once.

    Iteration ends when the request does, and raises ``TidegateError`` where it failed. To leave early,
    ``cancel()`` it, or use it as an async context manager.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.admitted: Admitted | None = None
        """Set once the request runs, before its first chunk."""
        self.finished: Finished | None = None
        """Set at the end: reasons, usage, timings."""
        self.progress: list[Progress] = []
        """What happened to the request so far, oldest first."""
        self.prompt_logprobs: list[PositionLogprobs] = []
        """Of the prompt's tokens from the second one on, if asked for; complete before the first chunk."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            event = await self._next_event()
            if isinstance(event, Chunk):
                return event

    async def events(self) -> AsyncIterator[Event]:
        """Everything that happens, in order, instead of the chunks alone."""
        while True:
            try:
                event = await self._next_event()
            except StopAsyncIteration:
                return
            yield event

    async def text(self) -> str:
        """Read to the end; the text of the first choice from here on."""
        return "".join([chunk.text async for chunk in self if chunk.choice == 0])

    @abstractmethod
    def cancel(self) -> None:
        """Stop the request now; does nothing once it ended. What was on the way may still be read."""

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def _next_event(self) -> Event:
        """Raises ``StopAsyncIteration`` at the end."""

    def _note(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.progress.append(event)
        elif isinstance(event, Admitted):
            self.admitted = event
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, PromptLogprobs):
            self.prompt_logprobs += event.positions

    def _unheard(self, event: PromptLogprobs) -> PromptLogprobs | None:
        """What of it is new: another attempt, or another server, begins with the first one again."""
        skip = max(0, 1 + len(self.prompt_logprobs) - event.offset)
        if skip >= len(event.positions):
            return None
        return PromptLogprobs(event.offset + skip, event.positions[skip:])


class GenerateStream(Stream):
    """A request of its own RPC. It starts with the first read."""

    def __init__(
        self,
        request_id: str,
        start: Callable[[float | None], GenerateCall],
        retries: int,
        timeout: float | None,
    ) -> None:
        """``start(seconds left)`` begins the RPC."""
        super().__init__(request_id)
        self._start = start
        self._retries = retries
        self._timeout = timeout
        self._attempts: Attempts | None = None
        self._call: GenerateCall | None = None
        self._events: deque[Event] = deque()
        self._has_tokens = False
        self._ended = False

    def cancel(self) -> None:
        self._ended = True
        if self._call is not None:
            self._call.cancel()

    async def _next_event(self) -> Event:
        event: Event | None = None
        while event is None:
            while not self._events:
                if self._ended:
                    raise StopAsyncIteration
                await self._read()
            event = self._events.popleft()
            if isinstance(event, PromptLogprobs):
                event = self._unheard(event)
        self._note(event)
        return event

    async def _read(self) -> None:
        if self._attempts is None:
            self._attempts = Attempts(self._retries, self._timeout)
        if self._call is None:
            self._call = self._start(self._attempts.remaining)
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
        except asyncio.CancelledError:
            # Either `cancel()` was called while this read waited, or the reader's own task was cancelled.
            task = asyncio.current_task()
            if self._ended and (task is None or not task.cancelling()):
                return
            raise
        else:
            if isinstance(response, inference_pb2.GenerateResponse):
                self._events.extend(_events_of(response))
                self._has_tokens = self._has_tokens or response.WhichOneof("event") == "batch"
            else:
                self._ended = True
            return
        await self._try_again(error, self._attempts)

    async def _try_again(self, error: TidegateError, attempts: Attempts) -> None:
        self._call = None
        self._ended = True
        if self._has_tokens:
            raise error
        delay = attempts.delay(error)
        self._ended = False
        await asyncio.sleep(delay)


def _events_of(response: inference_pb2.GenerateResponse) -> list[Event]:
    """Empty for an event that this client does not know yet."""
    match response.WhichOneof("event"):
        case "admitted":
            return [messages.admitted_event(response.admitted)]
        case "batch":
            return [messages.chunk_event(delta) for delta in response.batch.deltas]
        case "prompt_logprobs":
            return [messages.prompt_logprobs_event(response.prompt_logprobs)]
        case "progress":
            return [messages.progress_event(response.progress)]
        case "finished":
            return [messages.finished_event(response.finished)]
        case _:
            return []
