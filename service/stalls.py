"""Ends the streams whose client takes no message for too long.

gRPC's keepalive does not notice a peer that is frozen with its buffers full: the ping waits behind what
cannot be written.
"""

import asyncio
from typing import Any

import grpc.aio

from tidegate.service.errors import Failure


class Stalls:
    """All writes that are under way.

    They share one timer: one for each message (``asyncio.timeout``) takes five times as long.
    """

    def __init__(self, limit: float) -> None:
        """``limit``: seconds that one write may take."""
        self._limit = limit
        self._since: dict[asyncio.Task[Any], float] = {}
        """When each task began its write: the oldest first."""
        self._overdue: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, context: "grpc.aio.ServicerContext[Any, Any]", message: Any) -> None:
        """Raises ``Failure``: CLIENT_TOO_SLOW."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None:
            raise RuntimeError("must be called in a task, which can be cancelled")
        self._since[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._limit, self._look)
        try:
            await context.write(message)
        except asyncio.CancelledError:
            if task in self._overdue and task.uncancel() == 0:
                raise Failure("CLIENT_TOO_SLOW", "the client took no message for too long") from None
            raise
        finally:
            del self._since[task]
            self._overdue.discard(task)

    def _look(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        now = loop.time()
        for task, since in self._since.items():
            if since + self._limit > now:
                self._timer = loop.call_at(since + self._limit, self._look)
                return
            if task not in self._overdue:
                self._overdue.add(task)
                task.cancel()
