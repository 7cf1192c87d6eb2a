"""Many requests on one bidirectional stream, each with its own flow control."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, Unpack

import grpc

from tidegate.service.client import messages
from tidegate.service.client.errors import (
    Cancelled,
    ServerFault,
    TidegateError,
    Unavailable,
    error_from_rpc,
    error_from_status,
)
from tidegate.service.client.messages import Chunk, Event, Finished, Options, PromptInput
from tidegate.service.client.retry import Attempts
from tidegate.service.client.stream import Stream
from tidegate.v1 import events_pb2, session_pb2

SessionCall = grpc.aio.StreamStreamCall[session_pb2.SessionRequest, session_pb2.SessionResponse]

CLOSE_GRACE = 2.0
"""Seconds that a session without requests may take to end by itself."""


class SessionStream(Stream):
    """One request of a session.

    Credit is how far the server may generate ahead of the reader. By default it is topped up as chunks
    are read, so a reader that pauses pauses its request, and only that one.
    """

    def __init__(
        self,
        session: "Session",
        start: session_pb2.Start,
        window: int | None,
        attempts: Attempts,
    ) -> None:
        """``window``: tokens to keep granted ahead of the reader; None: only by ``grant``."""
        super().__init__(start.request_id)
        self._session = session
        self._start = start
        self._window = window
        self._attempts = attempts
        self._granted = start.credit
        self._has_tokens = False
        self._arrived: deque[Event] = deque()
        self._error: TidegateError | None = None
        self._ended = False
        self._wakeup = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the server, or the loss of the session, ended the request."""
        return self._ended

    def cancel(self) -> None:
        if not self._ended:
            self._session._cancel(self)

    def grant(self, upto: int) -> None:
        """Let each choice generate up to output offset ``upto``. A smaller value than before does nothing."""
        if upto > self._granted and not self._ended:
            self._granted = upto
            credit = session_pb2.Credit(request_id=self.request_id, upto=upto)
            self._session._send(session_pb2.SessionRequest(credit=credit))

    async def _next_event(self) -> Event:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wakeup.clear()
            await self._wakeup.wait()
        event = self._arrived.popleft()
        if isinstance(event, Chunk):
            self._consumed(event)
        return event

    def _consumed(self, chunk: Chunk) -> None:
        if self._window is None or chunk.finish_reason is not None:
            return
        upto = chunk.offset + len(chunk.token_ids) + self._window
        limit = self._start.sampling.max_tokens or math.inf
        # Half a window at a time: one small message for many tokens.
        if upto - self._granted >= self._window / 2 and self._granted < limit:
            self.grant(upto)

    def _arrive(self, event: Event) -> None:
        self._note(event)
        self._has_tokens = self._has_tokens or isinstance(event, Chunk)
        self._ended = self._ended or isinstance(event, Finished)
        self._arrived.append(event)
        self._wakeup.set()

    def _delay_before_retry(self, error: TidegateError) -> float:
        """Seconds; raises ``error`` where it is final."""
        if self._has_tokens:
            raise error
        return self._attempts.delay(error)

    def _start_again(self) -> session_pb2.Start:
        """The first command again, as it must be by now."""
        self._start.credit = self._granted
        remaining = self._attempts.remaining
        if remaining is not None:
            self._start.time_limit.CopyFrom(messages.duration(remaining))
        return self._start

    def _fail(self, error: TidegateError) -> None:
        self._error = error
        self._ended = True
        self._wakeup.set()


class Session:
    """``async with client.session() as session``: opened on the way in, closed on the way out.

    Leaving it cancels the requests that still run. If the connection is lost, every request on it
    raises ``Unavailable``.
    """

    def __init__(self, connect: Callable[[], SessionCall], retries: int) -> None:
        self.load: events_pb2.Load | None = None
        """The server's last word about its load."""
        self.going_away = False
        """The server is about to stop: what runs may finish, nothing new is taken."""
        self._connect = connect
        self._retries = retries
        self._call: SessionCall | None = None
        self._opened = session_pb2.Opened()
        self._streams: dict[str, SessionStream] = {}
        self._outbox: asyncio.Queue[session_pb2.SessionRequest] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._resends: dict[str, asyncio.TimerHandle] = {}
        """Requests that were refused and will be started again."""
        self._error: TidegateError | None = None

    @property
    def opened(self) -> session_pb2.Opened:
        """Limits, model and fingerprint, as the server gave them."""
        return self._opened

    async def __aenter__(self) -> Self:
        attempts = Attempts(self._retries, timeout=None)
        while True:
            self._call = self._connect()
            try:
                await self._open(self._call)
            except grpc.aio.AioRpcError as failure:
                error = error_from_rpc(failure)
            else:
                break
            await asyncio.sleep(attempts.delay(error))
        self._tasks = [
            asyncio.create_task(self._read_loop(self._call)),
            asyncio.create_task(self._write_loop(self._call)),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the session; requests that still run are cancelled."""
        if self._call is None or not self._tasks:
            return
        if self._error is None and not self._streams:
            self._send(session_pb2.SessionRequest(close=session_pb2.Close()))
            await asyncio.wait(self._tasks[:1], timeout=CLOSE_GRACE)
        self._end(Cancelled("the session was closed", code=grpc.StatusCode.CANCELLED))
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for task in self._tasks:
            if not task.cancelled():
                task.result()

    async def start(
        self,
        prompt: PromptInput,
        *,
        timeout: float | None = None,
        credit: int | None = None,
        auto_credit: bool = True,
        **options: Unpack[Options],
    ) -> SessionStream:
        """Start a request; refusals and failures are raised where its stream is read.

        ``credit``: tokens that the server may be ahead of the reader, topped up as chunks are read.
        None: what the server thinks good. With ``auto_credit`` False it is the initial credit only, and
        the rest is up to ``SessionStream.grant``. ``timeout``: seconds; at the limit the request ends
        with what there is, reason ``deadline``.
        """
        if self._error is not None:
            raise self._error
        if self.going_away:
            raise Unavailable(
                "the server is about to stop: open a session elsewhere",
                code=grpc.StatusCode.UNAVAILABLE,
                reason="DRAINING",
            )
        window = self._opened.limits.default_credit if credit is None else credit
        if auto_credit and window <= 0:
            raise ValueError("credit must be positive; 0 needs auto_credit=False")
        message = session_pb2.Start(**messages.request_fields(prompt, options))
        message.credit = len(message.generated_token_ids) + window
        if timeout is not None:
            message.time_limit.CopyFrom(messages.duration(timeout))
        if message.request_id in self._streams:
            raise ValueError(f"request {message.request_id!r} is under way on this session already")
        attempts = Attempts(self._retries, timeout)
        stream = SessionStream(self, message, window if auto_credit else None, attempts)
        self._streams[stream.request_id] = stream
        self._send(session_pb2.SessionRequest(start=message))
        return stream

    async def _open(self, call: SessionCall) -> None:
        await call.write(session_pb2.SessionRequest(open=session_pb2.Open()))
        first = await call.read()
        if not isinstance(first, session_pb2.SessionResponse) or first.WhichOneof("event") != "opened":
            call.cancel()
            raise ServerFault("the server did not answer with Opened", code=grpc.StatusCode.INTERNAL)
        self._opened = first.opened

    def _send(self, command: session_pb2.SessionRequest) -> None:
        if self._error is None:
            self._outbox.put_nowait(command)

    async def _write_loop(self, call: SessionCall) -> None:
        """The only writer: gRPC takes one message of a stream at a time."""
        while True:
            command = await self._outbox.get()
            try:
                await call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The stream ended; the reader learns why and tells every request.
                return

    async def _read_loop(self, call: SessionCall) -> None:
        error: TidegateError = Unavailable("the server closed the session", code=grpc.StatusCode.UNAVAILABLE)
        try:
            while isinstance(response := await call.read(), session_pb2.SessionResponse):
                self._dispatch(response)
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
        finally:
            self._end(error)

    def _end(self, error: TidegateError) -> None:
        if self._error is None:
            self._error = error
        for timer in self._resends.values():
            timer.cancel()
        for stream in self._streams.values():
            stream._fail(self._error)
        self._streams.clear()

    def _dispatch(self, response: session_pb2.SessionResponse) -> None:
        """Events of requests that ended here already, and of kinds unknown to this client, are ignored."""
        match response.WhichOneof("event"):
            case "batch":
                for delta in response.batch.deltas:
                    self._arrive(delta.request_id, messages.chunk_event(delta))
            case "admitted":
                self._arrive(response.admitted.request_id, messages.admitted_event(response.admitted))
            case "progress":
                self._arrive(response.progress.request_id, messages.progress_event(response.progress))
            case "finished":
                self._arrive(response.finished.request_id, messages.finished_event(response.finished))
                self._streams.pop(response.finished.request_id, None)
            case "request_error":
                self._refused(response.request_error)
            case "load":
                self.load = response.load
            case "go_away":
                self.going_away = True
            case _:
                pass

    def _arrive(self, request_id: str, event: Event) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream._arrive(event)

    def _refused(self, refusal: session_pb2.RequestError) -> None:
        stream = self._streams.get(refusal.request_id)
        if stream is None:
            return
        error = error_from_status(refusal.status)
        try:
            delay = stream._delay_before_retry(error)
        except TidegateError as final:
            self._drop(stream, final)
            return

        def start_again() -> None:
            del self._resends[stream.request_id]
            self._send(session_pb2.SessionRequest(start=stream._start_again()))

        self._resends[stream.request_id] = asyncio.get_running_loop().call_later(delay, start_again)

    def _cancel(self, stream: SessionStream) -> None:
        waiting = self._resends.pop(stream.request_id, None)
        if waiting is None:
            cancel = session_pb2.Cancel(request_id=stream.request_id)
            self._send(session_pb2.SessionRequest(cancel=cancel))
        else:
            waiting.cancel()
            # The server refused it and knows nothing of it any more: no event would end it.
            self._drop(stream, Cancelled("cancelled before a retry", code=grpc.StatusCode.CANCELLED))

    def _drop(self, stream: SessionStream, error: TidegateError) -> None:
        del self._streams[stream.request_id]
        stream._fail(error)
