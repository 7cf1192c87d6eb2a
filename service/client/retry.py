"""When to try again: UNAVAILABLE, before the first token, a few times, further and further apart."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from tidegate.service.client.errors import TidegateError, Unavailable, error_from_rpc

FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0

T = TypeVar("T")


class Attempts:
    """Counts the failures of one request, and its time.

    Exponential backoff with jitter, so that clients that failed together do not return together; a
    server's own ``retry_after`` is never undercut.
    """

    def __init__(self, retries: int, timeout: float | None) -> None:
        """``timeout``: seconds for all attempts together."""
        self._retries_left = retries
        self._next_delay = FIRST_DELAY
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout

    @property
    def remaining(self) -> float | None:
        """Seconds left of the time limit; None: no limit."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def delay(self, error: TidegateError) -> float:
        """Seconds to wait before trying again; raises ``error`` where that has no point."""
        if self._retries_left == 0 or not isinstance(error, Unavailable) or not error.may_retry:
            raise error
        delay = self._next_delay * random.uniform(0.5, 1)
        if error.retry_after is not None:
            delay = max(delay, error.retry_after)
        remaining = self.remaining
        if remaining is not None and delay >= remaining:
            raise error
        self._retries_left -= 1
        self._next_delay = min(self._next_delay * 2, LONGEST_DELAY)
        return delay


async def call_with_retries(
    call: Callable[[float | None], Awaitable[T]], retries: int, timeout: float | None
) -> T:
    """``await call(seconds left)``, again where it may help. Raises ``TidegateError``."""
    attempts = Attempts(retries, timeout)
    while True:
        try:
            return await call(attempts.remaining)
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
        await asyncio.sleep(attempts.delay(error))
