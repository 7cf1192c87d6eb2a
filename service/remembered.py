"""Finished requests that their clients may still ask for: to read the end again, or with a second start."""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from tidegate.service.generation import Generation

REMEMBER_SECONDS = 600.0
MOST_OF_A_TENANT = 20_000
LOG_BYTES = 64 * 2**20
"""Of all logs of a tenant. A client that has closed its half of the stream acknowledges nothing."""


class _Entry(NamedTuple):
    generation: Generation
    ended_at: float
    log_bytes: int
    """When it ended; an ``Ack`` behind that takes nothing off."""


@dataclass(slots=True)
class _Tenant:
    finished: dict[str, _Entry] = field(default_factory=dict)
    """The oldest first."""
    log_bytes: int = 0


class Remembered:
    """By tenant and request id, until they are acknowledged or ten minutes old.

    So many at the most, and so many bytes; beyond that the oldest go.
    """

    def __init__(self, seconds: float = REMEMBER_SECONDS, most: int = MOST_OF_A_TENANT) -> None:
        self._seconds = seconds
        self._most = most
        self._tenants: defaultdict[str, _Tenant] = defaultdict(_Tenant)
        self._timer: asyncio.TimerHandle | None = None

    def add(self, generation: Generation) -> None:
        tenant = self._tenants[generation.tenant]
        if known := tenant.finished.pop(generation.request_id, None):
            tenant.log_bytes -= known.log_bytes
        entry = _Entry(generation, time.monotonic(), generation.log_bytes)
        tenant.finished[generation.request_id] = entry
        tenant.log_bytes += entry.log_bytes
        if len(tenant.finished) > self._most:
            self.forget(next(iter(tenant.finished.values())).generation)
        if tenant.log_bytes > LOG_BYTES:
            self._shrink(tenant)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._sweep)

    def find(self, tenant: str, request_id: str) -> Generation | None:
        found = self._tenants[tenant].finished.get(request_id) if tenant in self._tenants else None
        return None if found is None else found.generation

    def forget(self, generation: Generation) -> None:
        """Its id is free again. Nothing where it is not remembered."""
        if self.find(generation.tenant, generation.request_id) is generation:
            tenant = self._tenants[generation.tenant]
            tenant.log_bytes -= tenant.finished.pop(generation.request_id).log_bytes
            if not tenant.finished:
                del self._tenants[generation.tenant]
        generation.forget()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _shrink(self, tenant: _Tenant) -> None:
        # Those whose end is still on its way would never be told of it.
        for entry in list(tenant.finished.values()):
            if tenant.log_bytes <= LOG_BYTES:
                return
            if not entry.generation.is_being_told:
                self.forget(entry.generation)

    def _sweep(self) -> None:
        self._timer = None
        now = time.monotonic()
        ends = []
        for tenant in list(self._tenants.values()):
            for entry in list(tenant.finished.values()):
                if now - entry.ended_at < self._seconds:
                    ends.append(entry.ended_at)
                    break
                self.forget(entry.generation)
        if ends:
            delay = min(ends) + self._seconds - now
            self._timer = asyncio.get_running_loop().call_later(delay, self._sweep)
