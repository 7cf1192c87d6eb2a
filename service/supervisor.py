"""Puts another engine in the place of one that died, as often as that may happen.

What the new engine is to be told, the hub knows; who may have killed the old one, ``quarantine.py``.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import structlog

from tidegate.engine.client import EngineClient, EngineGone
from tidegate.engine.config import ConfigError
from tidegate.engine.messages import Command, EngineInfo, StepOutput

WINDOW_SECONDS = 300.0
"""Restarts are counted over this time."""
BACKOFF_SECONDS = (0.5, 10.0)
"""Between starts that fail: the first wait, doubled each time, and the longest one."""

_log = structlog.get_logger(__name__)


class Supervisor:
    """The engine's client for as long as the server runs, whichever engine serves at present."""

    def __init__(
        self,
        engine: EngineClient,
        start: Callable[[], Awaitable[EngineClient]],
        max_restarts: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start`` gives an engine like the first one. ``max_restarts`` in the last ``WINDOW_SECONDS``."""
        self.info: EngineInfo = engine.info
        self._engine = engine
        self._start = start
        self._starts: deque[float] = deque(maxlen=max(1, max_restarts))
        self._max_restarts = max_restarts
        self._now = now

    def send(self, commands: Iterable[Command]) -> None:
        self._engine.send(commands)

    async def receive(self) -> StepOutput:
        return await self._engine.receive()

    async def close(self) -> None:
        await self._engine.close()

    async def restart(self, gone: EngineGone) -> None:
        """Start another engine. Raises ``EngineGone`` where that was tried too often lately."""
        began = self._now()
        _log.warning("the engine died", reason=str(gone), exit_code=gone.exit_code)
        await self._engine.close()
        wait, longest = BACKOFF_SECONDS
        while True:
            self._count(gone)
            try:
                self._engine = await self._start()
                break
            except (EngineGone, ConfigError) as error:
                _log.warning("the engine does not start", reason=str(error), retry_s=wait)
            await asyncio.sleep(wait)
            wait = min(2 * wait, longest)
        _log.info("the engine serves again", after_s=round(self._now() - began, 2))

    def _count(self, gone: EngineGone) -> None:
        now, starts = self._now(), self._starts
        is_full = len(starts) >= self._max_restarts
        if self._max_restarts == 0 or (is_full and now - starts[0] < WINDOW_SECONDS):
            raise gone
        starts.append(now)
