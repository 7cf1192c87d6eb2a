"""Many requests on one bidirectional stream, each with its own flow control.

A session outlives its connection. When that is lost, another one takes the session up where it was; when
the server has lost the session too, or is about to stop, every request goes on at the next address, behind
the tokens that are held here and with the seed that they were made with.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from tidegate.service.client import messages
from tidegate.service.client.addresses import Addresses, SessionCall
from tidegate.service.client.errors import (
    Cancelled,
    NotFound,
    TidegateError,
    Unavailable,
    error_from_rpc,
    error_from_status,
)
from tidegate.service.client.messages import Event, Options, PromptInput
from tidegate.service.client.retry import Attempts
from tidegate.service.client.session_stream import MAX_REQUEST_ID_CHARS, Command, SessionStream
from tidegate.v1 import events_pb2, session_pb2

CLOSE_GRACE = 2.0
"""Seconds that a session without requests may take to end by itself."""
ACK_SECONDS = 0.05
"""Output is acknowledged so soon, or when a quarter of what the server keeps has come."""
FINAL = frozenset(
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.ABORTED,
    )
)
"""Ends of a stream that another stream would meet again."""


class Session:
    """``async with client.session() as session``: opened on the way in, closed on the way out.

    Leaving it cancels the requests that still run. A lost connection is made again by itself; where that
    does not succeed, or where a request cannot go on elsewhere, it raises ``Unavailable``.
    """

    def __init__(self, connects: Sequence[Callable[[], SessionCall]], retries: int) -> None:
        """``connects``: one for each address. ``retries``: of one connection, in a row."""
        self.load: events_pb2.Load | None = None
        """The server's last word about its load."""
        self.going_away = False
        """The server is about to stop, and there is no other one to go to."""
        self._addresses = Addresses(connects)
        self._retries = retries
        self._call: SessionCall | None = None
        self._streams: dict[str, SessionStream] = {}
        self._to_send: list[session_pb2.SessionRequest] = []
        self._has_to_send = asyncio.Event()
        self._unacked_bytes = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._runner: asyncio.Task[None] | None = None
        self._resends: dict[str, asyncio.TimerHandle] = {}
        """Requests that were refused and will be started again."""
        self._error: TidegateError | None = None
        self._is_closing = False

    @property
    def opened(self) -> session_pb2.Opened:
        """Limits, model and fingerprint, as the server gave them."""
        return self._addresses.opened

    async def __aenter__(self) -> Self:
        self._call = await self._addresses.first(self._retries)
        self._runner = asyncio.create_task(self._run(self._call))
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
        if self._runner is None or self._is_closing:
            return
        self._is_closing = True
        if self._error is None:
            self.send(*self._farewell())
            await asyncio.wait({self._runner}, timeout=CLOSE_GRACE)
        self._end(Cancelled("the session was closed", code=grpc.StatusCode.CANCELLED))
        self._runner.cancel()
        if self._call is not None:
            self._call.cancel()
        await asyncio.wait({self._runner})
        if not self._runner.cancelled():
            self._runner.result()

    async def start(
        self,
        prompt: PromptInput,
        *,
        timeout: float | None = None,
        credit: int | None = None,
        auto_credit: bool = True,
        lease: float | None = None,
        **options: Unpack[Options],
    ) -> SessionStream:
        """Start a request; refusals and failures are raised where its stream is read.

        ``credit``: tokens that the server may be ahead of the reader, topped up as chunks are read.
        None: what the server thinks good. With ``auto_credit`` False it is the initial credit only, and
        the rest is up to ``SessionStream.grant``. ``timeout``: seconds; at the limit the request ends
        with what there is, reason ``deadline``. ``lease``: seconds for which the finished request can be
        continued, by ``append`` and ``fork``.
        """
        command = session_pb2.Start(**messages.request_fields(prompt, options))
        given = len(command.generated_token_ids)
        return self._start(command, None, timeout, credit, auto_credit, lease, given)

    async def append(
        self,
        parent: str | SessionStream,
        prompt: PromptInput,
        *,
        choice: int = 0,
        timeout: float | None = None,
        credit: int | None = None,
        auto_credit: bool = True,
        lease: float | None = None,
        **options: Unpack[Options],
    ) -> SessionStream:
        """Continue a finished, leased request with more input; of a chat, with its new messages alone.

        ``parent``: the request or its id. Raises ``NotFound`` where its lease is over, when it is read.
        """
        fields = messages.continued_fields(prompt, options)
        command = session_pb2.AppendTurn(
            parent_request_id=_id_of(parent), parent_choice=choice, return_prompt_token_ids=True, **fields
        )
        return self._start(command, None, timeout, credit, auto_credit, lease)

    async def fork(
        self,
        parent: str | SessionStream,
        prompt: PromptInput | None = None,
        *,
        choice: int = 0,
        at_offset: int | None = None,
        timeout: float | None = None,
        credit: int | None = None,
        auto_credit: bool = True,
        lease: float | None = None,
        **options: Unpack[Options],
    ) -> SessionStream:
        """Branch a request that runs or was leased into one that shares its tokens before ``at_offset``.

        None: all that there are. ``prompt`` goes behind them.
        """
        fields = messages.continued_fields(prompt, options)
        command = session_pb2.ForkBranch(return_prompt_token_ids=True, **fields)
        fork = session_pb2.Fork(parent_request_id=_id_of(parent), parent_choice=choice, at_offset=at_offset)
        return self._start(command, fork, timeout, credit, auto_credit, lease)

    def update(
        self,
        stream: SessionStream,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Raise a running request's ``max_tokens``; replace its stop strings and stop token ids together."""
        update = session_pb2.Update(request_id=stream.wire_id, max_tokens=max_tokens)
        if stop is not None or stop_token_ids is not None:
            update.stops.stop.extend(stop or ())
            update.stops.stop_token_ids.extend(stop_token_ids or ())
        stream.update = update
        self.send(session_pb2.SessionRequest(update=update))

    # For its streams.

    def send(self, *commands: session_pb2.SessionRequest) -> None:
        """What is queued when a connection is lost is said anew to the next one, as it must be by then."""
        if self._error is None:
            self._to_send += commands
            self._has_to_send.set()

    def cancel(self, stream: SessionStream) -> None:
        waiting = self._resends.pop(stream.wire_id, None)
        if waiting is None:
            cancel = session_pb2.Cancel(request_id=stream.wire_id)
            stream.is_cancelled = True
            self.send(session_pb2.SessionRequest(cancel=cancel))
        else:
            waiting.cancel()
            # The server refused it and knows nothing of it any more: no event would end it.
            self._drop(stream, Cancelled("cancelled before a retry", code=grpc.StatusCode.CANCELLED))

    # Connections.

    async def _run(self, call: SessionCall) -> None:
        """Carry the session over as many connections as it takes."""
        try:
            while True:
                error = await self._carry(call)
                if self._is_closing or (error is not None and error.code in FINAL):
                    break
                call = self._call = await self._go_on()
        except TidegateError as failure:
            error = failure
        closed = Unavailable("the server closed the session", code=grpc.StatusCode.UNAVAILABLE)
        self._end(error or closed)

    async def _carry(self, call: SessionCall) -> TidegateError | None:
        """Read and write until the connection ends, or another one is better; None: it ended well."""
        writer = asyncio.create_task(self._write(call))
        try:
            while isinstance(response := await call.read(), session_pb2.SessionResponse):
                self._dispatch(response)
                if response.HasField("go_away") and await self._leave(call):
                    return None
        except grpc.aio.AioRpcError as failure:
            return error_from_rpc(failure)
        finally:
            writer.cancel()
        return None

    async def _write(self, call: SessionCall) -> None:
        """The only writer: gRPC takes one message of a stream at a time."""
        while True:
            await self._has_to_send.wait()
            self._has_to_send.clear()
            commands, self._to_send = self._to_send, []
            try:
                await call.write(_one_message(commands))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The stream ended; the reader learns why.
                return

    async def _go_on(self) -> SessionCall:
        """Take the session up again, here or, where it is lost, elsewhere. Raises ``TidegateError``."""
        attempts = Attempts(self._retries, timeout=None)
        is_lost, failures = False, 0
        while True:
            try:
                if not is_lost:
                    return await self._resume()
            except TidegateError as error:
                is_lost = error.reason == "SESSION_LOST"
                failure = error
                if error.code in FINAL:
                    raise
            # Nobody is left behind for a single failure: elsewhere all is computed again.
            if is_lost or failures > 0:
                try:
                    return await self._move(is_lost)
                except TidegateError as error:
                    failure = error
            failures += 1
            await asyncio.sleep(attempts.delay(_as_unavailable(failure)))

    async def _resume(self) -> SessionCall:
        if not self.opened.HasField("resume_token"):
            raise NotFound("the server cannot resume", code=grpc.StatusCode.NOT_FOUND, reason="SESSION_LOST")
        points = [point for stream in self._streams.values() for point in stream.resume_points()]
        opening = session_pb2.Open(resume_token=self.opened.resume_token, resume_points=points)
        call = await self._addresses.open(opening)
        self._say_again()
        return call

    async def _move(self, is_lost: bool) -> SessionCall:
        """Go on elsewhere; here too, if the session is lost, where nobody else answers.

        Raises ``TidegateError``.
        """
        before = self.opened.fingerprint
        call = await self._addresses.elsewhere(or_here=is_lost)
        self.going_away = False
        moving, self._streams = self._streams, {}
        for stream in moving.values():
            try:
                stream.move(is_same=self.opened.fingerprint == before)
            except TidegateError as error:
                stream.fail(error)
            else:
                self._streams[stream.wire_id] = stream
        self._say_again()
        return call

    async def _leave(self, call: SessionCall) -> bool:
        """The server is about to stop: whether everything goes on elsewhere from here on."""
        self.going_away = len(self._addresses) == 1
        if self.going_away or self._is_closing:
            return False
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await asyncio.wait_for(call.write(_one_message(self._farewell())), CLOSE_GRACE)
        call.cancel()
        # It is not asked again: the session goes on at another address.
        self.opened.ClearField("resume_token")
        return True

    def _farewell(self) -> list[session_pb2.SessionRequest]:
        """Nothing is to run on at a server that this session leaves."""
        cancels = [
            session_pb2.SessionRequest(cancel=session_pb2.Cancel(request_id=request_id))
            for request_id in self._streams
        ]
        return [*cancels, session_pb2.SessionRequest(close=session_pb2.Close())]

    def _say_again(self) -> None:
        """To a new connection everything that the server may not have heard: it does no harm twice."""
        self._to_send.clear()
        self._unacked_bytes = 0
        for stream in self._streams.values():
            if stream.wire_id in self._resends:
                continue
            self.send(stream.starting())
            if stream.update is not None:
                stream.update.request_id = stream.wire_id
                self.send(session_pb2.SessionRequest(update=stream.update))
            self.send(stream.crediting(), *stream.reack())
            if stream.is_cancelled:
                cancel = session_pb2.Cancel(request_id=stream.wire_id)
                self.send(session_pb2.SessionRequest(cancel=cancel))

    def _end(self, error: TidegateError) -> None:
        if self._error is None:
            self._error = error
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        for timer in self._resends.values():
            timer.cancel()
        for stream in self._streams.values():
            stream.fail(self._error)
        self._streams.clear()

    # Requests.

    def _start(
        self,
        command: Command,
        fork: session_pb2.Fork | None,
        timeout: float | None,
        credit: int | None,
        auto_credit: bool,
        lease: float | None,
        given: int = 0,
    ) -> SessionStream:
        if self._error is not None:
            raise self._error
        if self.going_away:
            raise Unavailable(
                "the server is about to stop: open a session elsewhere",
                code=grpc.StatusCode.UNAVAILABLE,
                reason="DRAINING",
            )
        window = self.opened.limits.default_credit if credit is None else credit
        if auto_credit and window <= 0:
            raise ValueError("credit must be positive; 0 needs auto_credit=False")
        if len(command.request_id) > MAX_REQUEST_ID_CHARS:
            # The server's answer would name no request of ours.
            raise ValueError(f"request_id may have at most {MAX_REQUEST_ID_CHARS} characters")
        if command.request_id in self._streams:
            raise ValueError(f"request {command.request_id!r} is under way on this session already")
        command.credit = given + window
        if timeout is not None:
            command.time_limit.CopyFrom(messages.duration(timeout))
        if lease is not None:
            command.lease.time_to_live.CopyFrom(messages.duration(lease))
        attempts = Attempts(self._retries, timeout)
        stream = SessionStream(self, command, fork, window if auto_credit else None, attempts)
        self._streams[stream.wire_id] = stream
        self.send(stream.starting())
        return stream

    def _dispatch(self, response: session_pb2.SessionResponse) -> None:
        """Events of requests that ended here already, and of kinds unknown to this client, are ignored."""
        match response.WhichOneof("event"):
            case "batch":
                for delta in response.batch.deltas:
                    self._arrive(delta.request_id, messages.chunk_event(delta))
            case "admitted" if response.admitted.request_id not in self._streams:
                # Started again for a new connection, though its end was on the way.
                cancel = session_pb2.Cancel(request_id=response.admitted.request_id)
                self.send(session_pb2.SessionRequest(cancel=cancel))
            case "admitted":
                self._arrive(response.admitted.request_id, messages.admitted_event(response.admitted))
            case "prompt_logprobs":
                scored = response.prompt_logprobs
                self._arrive(scored.request_id, messages.prompt_logprobs_event(scored))
            case "progress":
                self._arrive(response.progress.request_id, messages.progress_event(response.progress))
            case "finished":
                request_id = response.finished.request_id
                self._arrive(request_id, messages.finished_event(response.finished))
                self._streams.pop(request_id, None)
                self._acknowledge_end(request_id)
            case "request_error":
                self._refused(response.request_error)
            case "load":
                self.load = response.load
            case _:
                pass

    def _arrive(self, request_id: str, event: Event) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        self._unacked_bytes += stream.arrive(event)
        limits = self.opened.limits
        if not self._unacked_bytes or not limits.HasField("unacked_log_bytes"):
            return
        if self._unacked_bytes * 4 >= limits.unacked_log_bytes:
            self._acknowledge()
        elif self._ack_timer is None:
            loop = asyncio.get_running_loop()
            self._ack_timer = loop.call_later(ACK_SECONDS, self._acknowledge)

    def _acknowledge(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._unacked_bytes = 0
        self.send(*(ack for stream in self._streams.values() for ack in stream.acks()))

    def _acknowledge_end(self, request_id: str) -> None:
        if self.opened.limits.HasField("unacked_log_bytes"):
            ack = session_pb2.Ack(request_id=request_id, end=True)
            self.send(session_pb2.SessionRequest(ack=ack))

    def _refused(self, refusal: session_pb2.RequestError) -> None:
        self._acknowledge_end(refusal.request_id)
        stream = self._streams.get(refusal.request_id)
        if stream is None:
            return
        if stream.is_cancelled:
            self._drop(stream, Cancelled("cancelled before it was taken", code=grpc.StatusCode.CANCELLED))
            return
        error = error_from_status(refusal.status)
        try:
            delay = stream.delay_before_retry(error)
        except TidegateError as final:
            self._drop(stream, final)
            return

        def start_again() -> None:
            del self._resends[stream.wire_id]
            self.send(stream.starting())

        self._resends[stream.wire_id] = asyncio.get_running_loop().call_later(delay, start_again)

    def _drop(self, stream: SessionStream, error: TidegateError) -> None:
        del self._streams[stream.wire_id]
        stream.fail(error)


def _one_message(commands: list[session_pb2.SessionRequest]) -> session_pb2.SessionRequest:
    if len(commands) == 1:
        return commands[0]
    return session_pb2.SessionRequest(commands=session_pb2.Commands(commands=commands))


def _id_of(parent: str | SessionStream) -> str:
    return parent if isinstance(parent, str) else parent.wire_id


def _as_unavailable(error: TidegateError) -> TidegateError:
    """A connection broke, in whatever way gRPC calls it: worth another try."""
    if isinstance(error, Unavailable):
        return error
    return Unavailable(str(error), code=grpc.StatusCode.UNAVAILABLE, reason=error.reason)
