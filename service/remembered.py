"""Finished requests that their clients may still ask for: to read the end again, or with a second start."""

import asyncio
import time
from collections import defaultdict

from tidegate.service.generation import Generation

REMEMBER_SECONDS = 600.0
MOST_OF_A_TENANT = 20_000


class Remembered:
    """By tenant and request id, until they are acknowledged or ten minutes old, and so many at the most."""

    def __init__(self, seconds: float = REMEMBER_SECONDS, most: int = MOST_OF_A_TENANT) -> None:
        self._seconds = seconds
        self._most = most
        self._tenants: defaultdict[str, dict[str, tuple[Generation, float]]] = defaultdict(dict)
        """With the time of the end; the oldest first."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, generation: Generation) -> None:
        finished = self._tenants[generation.tenant]
        finished[generation.request_id] = (generation, time.monotonic())
        if len(finished) > self._most:
            oldest, _ = next(iter(finished.values()))
            self.forget(oldest)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._sweep)

    def find(self, tenant: str, request_id: str) -> Generation | None:
        found = self._tenants[tenant].get(request_id) if tenant in self._tenants else None
        return None if found is None else found[0]

    def forget(self, generation: Generation) -> None:
        """Its id is free again. Nothing where it is not remembered."""
        if self.find(generation.tenant, generation.request_id) is generation:
            finished = self._tenants[generation.tenant]
            del finished[generation.request_id]
            if not finished:
                del self._tenants[generation.tenant]
        generation.forget()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self) -> None:
        self._timer = None
        now = time.monotonic()
        ends = []
        for finished in list(self._tenants.values()):
            for generation, ended_at in list(finished.values()):
                if now - ended_at < self._seconds:
                    ends.append(ended_at)
                    break
                self.forget(generation)
        if ends:
            delay = min(ends) + self._seconds - now
            self._timer = asyncio.get_running_loop().call_later(delay, self._sweep)
