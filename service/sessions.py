"""All sessions of the server: opened, carried by a stream, taken up again, ended."""

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator

from tidegate.service.delivery import Delivery
from tidegate.service.errors import Failure, log_unexpected
from tidegate.service.events import GoAway, Heartbeat
from tidegate.service.hub import Hub, draining
from tidegate.service.identity import caller
from tidegate.service.intake import Intake
from tidegate.service.session import Session, resume_points
from tidegate.service.session_limits import SessionLimits
from tidegate.v1 import session_pb2
from tidegate.v1.session_pb2 import SessionRequest, SessionResponse

TOKEN_BYTES = 24
"""Of a resume token's random part: whoever has it, of the same tenant, has the session."""


class Sessions:
    """Serves session streams. A session that loses its stream waits for another one."""

    def __init__(self, hub: Hub, intake: Intake, limits: SessionLimits, fingerprint: str) -> None:
        self.limits = limits
        self._hub = hub
        self._intake = intake
        self._fingerprint = fingerprint
        self._incarnation = secrets.token_hex(8)
        """Stands in every token: no other server, nor this one started again, knows the session."""
        self._sessions: dict[str, Session] = {}
        self._num_of_tenant: Counter[str] = Counter()
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        """When sessions without a stream end, by token."""
        self._grace: float | None = None

    async def serve(self, commands: AsyncIterator[SessionRequest]) -> AsyncGenerator[SessionResponse]:
        """Carry one session until its stream ends: its messages, each asked for when the one before was
        written.

        Raises ``Failure``, for the stream as a whole.
        """
        opening = await self._expect_open(commands)
        session = self._open(opening)
        delivery = session.attach(resume_points(opening.resume_points))
        try:
            yield self._opened(session)
            if self._grace is not None:
                delivery.put(GoAway(self._grace))
            async with contextlib.aclosing(self._carry(session, delivery, commands)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._part(session, delivery)

    def of(self, tenant: str) -> list[Session]:
        """The oldest first."""
        return [session for session in self._sessions.values() if session.tenant == tenant]

    def go_away(self, grace: float) -> None:
        """Tell every session that the server will stop in so many seconds."""
        self._grace = grace
        for session in self._sessions.values():
            if session.delivery is not None:
                session.delivery.put(GoAway(grace))

    def close(self) -> None:
        """End every session, behind the events that it still has to write."""
        for session in list(self._sessions.values()):
            if session.delivery is None:
                self._end(session)
            else:
                session.delivery.close(draining())

    async def _expect_open(self, commands: AsyncIterator[SessionRequest]) -> session_pb2.Open:
        try:
            first = await asyncio.wait_for(anext(commands, None), self.limits.open_timeout)
        except TimeoutError:
            raise Failure("OPEN_TIMEOUT", "no Open came in time") from None
        if first is None or first.WhichOneof("command") != "open":
            raise Failure("OPEN_EXPECTED", "the first message of a session must be Open")
        return first.open

    def _open(self, opening: session_pb2.Open) -> Session:
        """The session that is asked for, old or new."""
        tenant = caller().tenant
        if opening.HasField("resume_token"):
            known = self._sessions.get(opening.resume_token)
            if known is None or known.tenant != tenant:
                raise Failure("SESSION_LOST", "this server does not hold that session")
            if expiry := self._expiries.pop(known.token, None):
                expiry.cancel()
            return known
        if self._hub.is_draining:
            raise draining()
        if self._num_of_tenant[tenant] >= self.limits.sessions_per_tenant:
            raise Failure("TOO_MANY_SESSIONS", f"{self.limits.sessions_per_tenant} sessions are open already")
        token = f"{self._incarnation}.{secrets.token_urlsafe(TOKEN_BYTES)}"
        session = self._sessions[token] = Session(token, self._hub, self._intake, self.limits)
        self._num_of_tenant[tenant] += 1
        return session

    def _opened(self, session: Session) -> SessionResponse:
        opened = session_pb2.Opened(
            limits=self.limits.message(),
            resume_token=session.token,
            fingerprint=self._fingerprint,
            model=self._hub.info.model,
        )
        return SessionResponse(opened=opened)

    async def _carry(
        self, session: Session, delivery: Delivery, commands: AsyncIterator[SessionRequest]
    ) -> AsyncGenerator[SessionResponse]:
        """Read commands and write events, until the stream or the session ends."""
        tasks = [
            asyncio.create_task(self._read(session, delivery, commands)),
            asyncio.create_task(self._beat(session, delivery)),
        ]
        try:
            if session.is_done:
                delivery.close()
            while taken := await delivery.take():
                for event in taken:
                    yield session.response(event)
                    if session.delivery is not delivery:
                        break  # the stream that took the session over says it again
                    session.written(event)
                    if session.is_done:
                        delivery.close()
        finally:
            for task in tasks:
                task.cancel()

    async def _read(
        self, session: Session, delivery: Delivery, commands: AsyncIterator[SessionRequest]
    ) -> None:
        try:
            async for command in commands:
                if session.delivery is not delivery:
                    return
                session.heard_at = time.monotonic()
                session.obey(command)
                if session.is_done:
                    delivery.close()
                await session.caught_up()
        except Failure as failure:
            # A client that breaks the protocol does not know what it has here: nothing is kept for it.
            delivery.close(failure)
            if session.delivery is delivery:
                self._end(session)
        except Exception as error:  # noqa: BLE001  in a task of its own, nobody else would see it
            log_unexpected("a session's command failed", error)
            delivery.close(Failure.internal())
        else:
            if session.delivery is delivery:  # a stream that was superseded may hear its end much later
                session.commands_ended()
                if session.is_done:
                    delivery.close()

    async def _beat(self, session: Session, delivery: Delivery) -> None:
        """Say something now and then, since proxies cut idle streams; end a session that nobody uses."""
        while True:
            await asyncio.sleep(min(self.limits.heartbeat_interval, self.limits.idle_timeout))
            if session.delivery is not delivery:
                return
            if session.is_idle and time.monotonic() - session.heard_at >= self.limits.idle_timeout:
                session.is_closing = True
                delivery.close()
                return
            delivery.put(Heartbeat())

    def _part(self, session: Session, delivery: Delivery) -> None:
        """The stream has ended."""
        if session.delivery is not delivery or session.token not in self._sessions:
            return
        session.detach()
        if session.is_over or self._hub.stopping.is_set():
            self._end(session)
        else:
            loop = asyncio.get_running_loop()
            self._expiries[session.token] = loop.call_later(self.limits.resume_timeout, self._end, session)

    def _end(self, session: Session) -> None:
        if expiry := self._expiries.pop(session.token, None):
            expiry.cancel()
        if self._sessions.pop(session.token, None) is not None:
            self._num_of_tenant[session.tenant] -= 1
            if not self._num_of_tenant[session.tenant]:
                del self._num_of_tenant[session.tenant]
            session.end()
