"""``AdminService``: what an operator may do to a running server."""

import asyncio
from collections.abc import Callable

from tidegate.engine.messages import Flush, Flushed, Profile, Profiled
from tidegate.engine.request import Violation
from tidegate.service.errors import Failure
from tidegate.service.hub import Hub
from tidegate.service.intake import seconds
from tidegate.v1 import admin_pb2, admin_pb2_grpc

MAX_PROFILED_STEPS = 1000


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, hub: Hub, drain: Callable[[float | None], None], max_grace: float) -> None:
        """``drain`` begins a drain with this grace, or the server's own, and does not wait for it."""
        self._hub = hub
        self._drain = drain
        self._max_grace = max_grace
        self._profiling: asyncio.Task[Profiled] | None = None

    async def Drain(self, request: admin_pb2.DrainRequest, context: object) -> admin_pb2.DrainResponse:
        grace = seconds(request.grace) if request.HasField("grace") else None
        if grace is not None and not 0 <= grace <= self._max_grace:
            raise Failure.invalid([Violation("grace", f"must be from 0 to {self._max_grace:.0f} seconds")])
        self._drain(grace)
        return admin_pb2.DrainResponse()

    async def Pause(self, request: admin_pb2.PauseRequest, context: object) -> admin_pb2.PauseResponse:
        self._hub.pause(True)
        return admin_pb2.PauseResponse()

    async def Resume(self, request: admin_pb2.ResumeRequest, context: object) -> admin_pb2.ResumeResponse:
        self._hub.pause(False)
        return admin_pb2.ResumeResponse()

    async def FlushCache(
        self, request: admin_pb2.FlushCacheRequest, context: object
    ) -> admin_pb2.FlushCacheResponse:
        device = request.device or not request.HasField("device")
        host = request.host or not request.HasField("host")
        freed = await self._hub.ask(Flush(device, host), Flushed)
        return admin_pb2.FlushCacheResponse(
            device_blocks_freed=freed.device_blocks, host_blocks_freed=freed.host_blocks
        )

    async def Profile(self, request: admin_pb2.ProfileRequest, context: object) -> admin_pb2.ProfileResponse:
        if not 1 <= request.steps <= MAX_PROFILED_STEPS:
            raise Failure.invalid([Violation("steps", f"must be from 1 to {MAX_PROFILED_STEPS}")])
        if self._profiling is not None and not self._profiling.done():
            raise Failure("PROFILE_RUNNING", "the engine is being profiled already")
        self._profiling = asyncio.create_task(self._hub.ask(Profile(request.steps), Profiled))
        profiled = await asyncio.shield(self._profiling)
        return admin_pb2.ProfileResponse(path=profiled.path)
