"""The addresses that a session can be carried from: replicas of one server, one of them in use."""

import asyncio
from collections.abc import Callable, Sequence

import grpc

from tidegate.service.client.errors import ServerFault, TidegateError, Unavailable, error_from_rpc
from tidegate.service.client.retry import Attempts
from tidegate.v1 import session_pb2

SessionCall = grpc.aio.StreamStreamCall[session_pb2.SessionRequest, session_pb2.SessionResponse]


class Addresses:
    def __init__(self, connects: Sequence[Callable[[], SessionCall]]) -> None:
        """``connects``: begins a stream, one for each address."""
        self.opened = session_pb2.Opened()
        """What the server that was reached last said at first."""
        self._connects = connects
        self._present = 0

    def __len__(self) -> int:
        return len(self._connects)

    async def first(self, retries: int) -> SessionCall:
        """A session at the first address that answers. Raises ``TidegateError``."""
        attempts = Attempts(retries, timeout=None)
        while True:
            try:
                return await self.open(session_pb2.Open())
            except TidegateError as error:
                delay = attempts.delay(error)
            self._present = (self._present + 1) % len(self._connects)
            await asyncio.sleep(delay)

    async def elsewhere(self, *, or_here: bool) -> SessionCall:
        """A new session at the next address that answers; at the present one last, and only if asked for.

        Raises ``TidegateError``, and the present address stays.
        """
        present = self._present
        failure: TidegateError = Unavailable("no server answers", code=grpc.StatusCode.UNAVAILABLE)
        for step in range(1, len(self._connects) + or_here):
            self._present = (present + step) % len(self._connects)
            try:
                return await self.open(session_pb2.Open())
            except TidegateError as error:
                failure = error
        self._present = present
        raise failure

    async def open(self, opening: session_pb2.Open) -> SessionCall:
        """A session at the present address, new or old. Raises ``TidegateError``."""
        call = self._connects[self._present]()
        try:
            await call.write(session_pb2.SessionRequest(open=opening))
            first = await call.read()
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from None
        except asyncio.CancelledError:
            call.cancel()
            raise
        if not isinstance(first, session_pb2.SessionResponse) or first.WhichOneof("event") != "opened":
            call.cancel()
            raise ServerFault("the server did not answer with Opened", code=grpc.StatusCode.INTERNAL)
        self.opened = first.opened
        return call
