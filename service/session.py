"""A session: many requests multiplexed on one bidirectional stream.

One task reads commands, the RPC's own task writes events. A request's failure is an event; what ends
the stream itself is raised.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass

from tidegate.service import convert, events
from tidegate.service.errors import Failure, log_unexpected
from tidegate.service.events import CommandRejected, Failed, GoAway, Heartbeat, Outbox, coalesce
from tidegate.service.generation import Generation
from tidegate.service.hub import Hub, draining
from tidegate.service.intake import Intake
from tidegate.v1 import session_pb2
from tidegate.v1.session_pb2 import SessionRequest, SessionResponse

DEFAULT_CREDIT = 256
UNREAD_TOKENS = 4096
"""How far a choice may run ahead of what the stream takes, however much credit it has."""
MAX_REQUESTS = 10_000
OPEN_SECONDS = 5.0
HEARTBEAT_SECONDS = 15.0
STALL_SECONDS = 60.0
UNREAD_REFUSALS = 1000
"""Refusals that may wait for a client that does not read; then no more of its commands are read."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Seconds and bytes."""

    max_message_bytes: int
    open_timeout: float = OPEN_SECONDS
    heartbeat_interval: float = HEARTBEAT_SECONDS
    stall_limit: float = STALL_SECONDS
    """How long a client, of any stream, may take no message while there is one."""
    requests_per_session: int = MAX_REQUESTS
    default_credit: int = DEFAULT_CREDIT

    def message(self) -> session_pb2.SessionLimits:
        return session_pb2.SessionLimits(
            requests_per_session=self.requests_per_session,
            open_timeout=convert.duration(self.open_timeout),
            heartbeat_interval=convert.duration(self.heartbeat_interval),
            default_credit=self.default_credit,
            max_message_bytes=self.max_message_bytes,
        )


class Sessions:
    """All sessions of the server."""

    def __init__(self, hub: Hub, intake: Intake, limits: SessionLimits, fingerprint: str) -> None:
        self.limits = limits
        self._hub = hub
        self._intake = intake
        self._fingerprint = fingerprint
        self._outboxes: set[Outbox] = set()

    async def serve(self, commands: AsyncIterator[SessionRequest]) -> AsyncGenerator[SessionResponse]:
        """Run one session to its end: its messages, each asked for when the one before was written.

        Raises ``Failure``, for the stream as a whole.
        """
        self._refuse_if_draining()
        await self._expect_open(commands)
        self._refuse_if_draining()
        opened = session_pb2.Opened(
            limits=self.limits.message(), fingerprint=self._fingerprint, model=self._hub.info.model
        )
        yield SessionResponse(opened=opened)
        session = _Session(self._hub, self._intake, self.limits)
        self._outboxes.add(session.outbox)
        try:
            async with contextlib.aclosing(session.run(commands)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._outboxes.discard(session.outbox)

    def go_away(self, grace: float) -> None:
        """Tell every session that the server will stop."""
        for outbox in self._outboxes:
            outbox.put(GoAway(grace))

    def close(self) -> None:
        """End every session, behind the events that it still has to write."""
        for outbox in self._outboxes:
            outbox.close(draining())

    def _refuse_if_draining(self) -> None:
        if self._hub.is_draining:
            raise draining()

    async def _expect_open(self, commands: AsyncIterator[SessionRequest]) -> None:
        try:
            first = await asyncio.wait_for(anext(commands, None), self.limits.open_timeout)
        except TimeoutError:
            raise Failure("OPEN_TIMEOUT", "no Open came in time") from None
        if first is None or first.WhichOneof("command") != "open":
            raise Failure("OPEN_EXPECTED", "the first message of a session must be Open")
        if first.open.HasField("resume_token"):
            raise Failure("SESSION_LOST", "this server does not hold that session")


@dataclass(slots=True)
class _Live:
    """A request whose end the client has not been sent."""

    with_prompt: bool
    generation: Generation | None = None


class _Session:
    def __init__(self, hub: Hub, intake: Intake, limits: SessionLimits) -> None:
        self.outbox = Outbox()
        self._hub = hub
        self._intake = intake
        self._limits = limits
        self._live: dict[str, _Live] = {}
        self._rejections = 0
        """Answers, other than ends of requests, that were not written yet."""
        self._was_written = asyncio.Event()
        self._is_closing = False
        """No commands come any more: the stream ends with its last request."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, commands: AsyncIterator[SessionRequest]) -> AsyncGenerator[SessionResponse]:
        self._spawn(self._read(commands))
        self._spawn(self._beat())
        try:
            while taken := await self.outbox.take():
                for event in coalesce(taken):
                    yield self._response(event)
                    self._written(event)
        finally:
            for task in self._tasks:
                task.cancel()
            for live in self._live.values():
                if live.generation is not None:
                    live.generation.abandon()

    # Commands.

    async def _read(self, commands: AsyncIterator[SessionRequest]) -> None:
        try:
            async for command in commands:
                self._obey(command)
                if self._is_closing:
                    break
                while self._is_behind():
                    self._was_written.clear()
                    await self._was_written.wait()
        except Failure as failure:
            self.outbox.close(failure)
        except Exception as error:  # noqa: BLE001  in a task of its own, nobody else would see it
            log_unexpected("a session's command failed", error)
            self.outbox.close(Failure.internal())
        else:
            self._is_closing = True
            self._close_if_done()

    def _obey(self, request: SessionRequest) -> None:
        """Raises ``Failure`` where the protocol is broken."""
        match request.WhichOneof("command"):
            case "start":
                self._start(request.start)
            case "cancel":
                if generation := self._generation(request.cancel.request_id):
                    generation.cancel()
            case "credit":
                if generation := self._generation(request.credit.request_id):
                    generation.grant(request.credit.upto)
            case "close":
                self._is_closing = True
            case "append_turn":
                self._refuse(request.append_turn.request_id, "append_turn", _unsupported("append_turn"))
            case "fork":
                for branch in request.fork.branches:
                    self._refuse(branch.request_id, "fork", _unsupported("fork"))
            case "update":
                self._reject(request.update.request_id, "update", _unsupported("update"))
            case "ack":
                self._reject(request.ack.request_id, "ack", _unsupported("ack"))
            case "open":
                raise Failure("ALREADY_OPEN", "the session is open already")
            case _:
                raise Failure("UNKNOWN_COMMAND", "a message holds no command that this server knows")

    def _start(self, start: session_pb2.Start) -> None:
        request_id = start.request_id
        if request_id in self._live:
            in_use = Failure("REQUEST_ID_IN_USE", "a request with this id is under way in this session")
            self._refuse(request_id, "start", in_use)
            return
        live = self._live[request_id] = _Live(start.return_prompt_token_ids)
        try:
            if len(self._live) > self._limits.requests_per_session:
                raise Failure("SESSION_FULL", "the session has too many requests under way")
            credit = start.credit
            if not start.HasField("credit"):
                credit = self._limits.default_credit + len(start.generated_token_ids)
            live.generation = self._intake.open(
                request_id, start, self.outbox, credit=credit, unread=UNREAD_TOKENS
            )
        except Failure as failure:
            self.outbox.put(Failed(request_id, failure))
            return
        self._spawn(self._intake.submit(live.generation, start))

    def _generation(self, request_id: str) -> Generation | None:
        live = self._live.get(request_id)
        return None if live is None else live.generation

    def _refuse(self, request_id: str, command: str, failure: Failure) -> None:
        """Refuse to start a request."""
        if request_id in self._live:
            # A RequestError would read as the end of the request that has this id.
            self._reject(request_id, command, failure)
        else:
            # Its id is taken until the client is told: else one that is used again would end twice.
            self._live[request_id] = _Live(with_prompt=False)
            self.outbox.put(Failed(request_id, failure))

    def _is_behind(self) -> bool:
        most_live = self._limits.requests_per_session + UNREAD_REFUSALS
        return self._rejections >= UNREAD_REFUSALS or len(self._live) >= most_live

    def _reject(self, request_id: str, command: str, failure: Failure) -> None:
        self._rejections += 1
        self.outbox.put(CommandRejected(request_id, command, failure))

    # Events.

    def _response(self, event: events.Notice | list[events.Delta]) -> SessionResponse:
        match event:
            case list():
                return SessionResponse(batch=convert.batch(event))
            case events.Admitted():
                with_prompt = self._live[event.request_id].with_prompt
                return SessionResponse(admitted=convert.admitted(event, with_prompt))
            case events.Progress():
                return SessionResponse(progress=convert.progress(event))
            case events.Finished():
                return SessionResponse(finished=convert.finished(event))
            case events.Failed():
                error = session_pb2.RequestError(request_id=event.request_id, status=event.failure.status())
                return SessionResponse(request_error=error)
            case events.CommandRejected():
                rejected = session_pb2.CommandRejected(
                    request_id=event.request_id, command=event.command, status=event.failure.status()
                )
                return SessionResponse(command_rejected=rejected)
            case events.GoAway():
                return SessionResponse(go_away=session_pb2.GoAway(grace=convert.duration(event.grace)))
            case events.Heartbeat():
                return SessionResponse(load=convert.load(self._hub.stats, self._hub.is_draining))

    def _written(self, event: events.Notice | list[events.Delta]) -> None:
        if isinstance(event, list):
            for delta in event:
                if generation := self._generation(delta.request_id):
                    generation.delivered(delta.choice, delta.end_offset)
            return
        if isinstance(event, events.Finished | events.Failed):
            del self._live[event.request_id]
            self._close_if_done()
        elif isinstance(event, events.CommandRejected):
            self._rejections -= 1
        self._was_written.set()

    def _close_if_done(self) -> None:
        if self._is_closing and not self._live:
            self.outbox.close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._limits.heartbeat_interval)
            self.outbox.put(Heartbeat())

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        # The loop itself holds tasks weakly.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _unsupported(command: str) -> Failure:
    return Failure("NOT_YET_SUPPORTED", f"{command} is not supported yet")
