"""``grpc.health.v1``, with ``Watch``.

Not grpcio-health-checking's own asyncio servicer: in that one, all watchers of a service hold one
condition, which the first of them to leave throws away, so that the others hear nothing any more.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable

from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.service.errors import Failure
from tidegate.service.hub import draining

LIVENESS = "liveness"
"""Of this name the server says SERVING until it stops, while it drains too: a probe that restarts what is
not alive must ask for it. The others say whether to send requests here."""


class HealthService(health_pb2_grpc.HealthServicer):
    """One state for every service named, and for the server as a whole, whose name is empty."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", LIVENESS, *services))
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Condition()

    async def set_serving(self, is_serving: bool) -> None:
        async with self._changed:
            self._is_serving = is_serving
            self._changed.notify_all()

    async def close(self) -> None:
        """Not serving any more, and every watch ends behind that."""
        async with self._changed:
            self._is_serving, self._is_closed = False, True
            self._changed.notify_all()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            raise Failure("SERVICE_UNKNOWN", "this server has no service of that name")
        return self._state(request.service)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse]:
        state = self._state(request.service)
        while True:
            yield state
            async with self._changed:
                while self._state(request.service) == state:
                    if self._is_closed:
                        raise draining()
                    await self._changed.wait()
                state = self._state(request.service)

    def _state(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._services:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        if self._is_serving or (service == LIVENESS and not self._is_closed):
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
