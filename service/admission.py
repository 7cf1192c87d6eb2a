"""Which requests may come in: room in the queue, quotas of tenants, the time that they have, memory.

A request is weighed twice: at its arrival, when it counts as one, and once its prompt's tokens are known.
What is refused here never reaches the engine, so what runs there never fails for want of room.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tidegate.engine.config import ConfigError
from tidegate.service.errors import Failure
from tidegate.service.memory import MemoryGauge

RETRY_SECONDS = (0.5, 30.0)
"""The shortest and the longest time after which a refused client is told to come back."""
RETRY_SHARE = 0.1
"""A refused client comes back when this part of the queue has gone: with less, others were faster."""
MEMORY_LIMIT = 0.95
"""Of the memory that the kernel gives us: beyond it, new requests are shed."""
HALF_LIFE = 10.0
"""Seconds after which a measured pace counts half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """None is without limit."""

    max_waiting: int = 20_000
    """Requests in the queue."""
    max_waiting_tokens: int | None = None
    """Their tokens to prefill, all together."""
    tenant_requests: int | None = None
    """Requests of one tenant under way at once."""
    tenant_tokens: int | None = None
    """Their prompts and the output that they may grow to, all together."""

    def __post_init__(self) -> None:
        """Raises ``ConfigError``."""
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")


class DrainRate:
    """How fast a queue empties, measured over the time in which there was something in it.

    A queue that is hardly ever there looks faster than it is, so estimates err to the short side.
    """

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        """Counted up to here; None while the queue is empty."""

    def began(self, now: float) -> None:
        """Something stands in the queue now."""
        if self._since is None:
            self._since = now

    def ended(self, now: float) -> None:
        """Nothing does any more."""
        self.drained(0, now)
        self._since = None

    def drained(self, units: float, now: float) -> None:
        if self._since is None:
            return
        passed = now - self._since
        fade = _fade(passed)
        self._units = self._units * fade + units
        self._seconds = self._seconds * fade + passed
        self._since = now

    def seconds_for(self, units: float, now: float) -> float | None:
        """In which so much would drain; None where nothing was measured."""
        passed = 0.0 if self._since is None else now - self._since
        fade = _fade(passed)
        if self._units == 0:
            return None
        return units * (self._seconds * fade + passed) / (self._units * fade)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place in the queue and in its tenant's quota."""

    tenant: str
    priority: int = 0
    queue_tokens: int = 0
    quota_tokens: int = 0
    waits: bool = True
    is_over: bool = False


class _Tenant:
    """What one tenant has under way, and how fast it ends."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.ends = DrainRate()


class Admission:
    def __init__(
        self,
        limits: AdmissionLimits,
        memory: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``memory`` gives the part in use, from 0 to 1; by default it looks."""
        self.limits = limits
        self.waiting = 0
        """Requests in the queue."""
        self._memory = memory or MemoryGauge()
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}
        self._queued_tokens: Counter[int] = Counter()
        """By priority."""
        self._request_rate = DrainRate()
        self._token_rate = DrainRate()

    @property
    def waiting_tokens(self) -> int:
        return self._queued_tokens.total()

    def enter(self, tenant: str) -> Ticket:
        """Take a request in. Raises ``Failure``: MEMORY_PRESSURE, QUEUE_FULL, TENANT_QUOTA."""
        if self._memory() > MEMORY_LIMIT:
            raise Failure("MEMORY_PRESSURE", "the server is short of memory", retry_after=self._retry_after())
        if self.waiting >= self.limits.max_waiting:
            raise Failure("QUEUE_FULL", "too many requests wait already", retry_after=self._retry_after())
        use = self._tenants.get(tenant)
        most = self.limits.tenant_requests
        if use is not None and most is not None and use.requests >= most:
            raise self._over_quota(tenant, use, f"{most} requests under way at once")
        use = self._tenants.setdefault(tenant, _Tenant())
        now = self._clock()
        use.ends.began(now)
        use.requests += 1
        self._request_rate.began(now)
        self.waiting += 1
        return Ticket(tenant)

    def weigh(
        self, ticket: Ticket, *, queue_tokens: int, quota_tokens: int, priority: int, time_left: float | None
    ) -> None:
        """The request's size is known: ``queue_tokens`` to prefill, ``quota_tokens`` that it may grow to.

        Raises ``Failure``, and the ticket stays as it was: QUEUE_FULL, TENANT_QUOTA, WAIT_TOO_LONG (its
        ``time_left``, in seconds, would be over before the queue before it is).
        """
        most = self.limits.max_waiting_tokens
        waiting = self.waiting_tokens
        # An empty queue takes a request of any size: it would never find more room.
        if most is not None and waiting and waiting + queue_tokens > most:
            raise Failure("QUEUE_FULL", "too many tokens wait already", retry_after=self._retry_after())
        use, most = self._tenants[ticket.tenant], self.limits.tenant_tokens
        if most is not None and use.tokens + quota_tokens > most:
            is_hopeless = quota_tokens > most
            raise self._over_quota(ticket.tenant, use, f"{most} tokens under way at once", is_hopeless)
        now = self._clock()
        if time_left is not None:
            ahead = sum(tokens for other, tokens in self._queued_tokens.items() if other >= priority)
            wait = self._token_rate.seconds_for(ahead, now)
            if wait is not None and wait > time_left:
                raise Failure(
                    "WAIT_TOO_LONG",
                    "the queue is longer than the request's time limit",
                    retry_after=_bounded(wait - time_left),
                    metadata={"wait_ms": str(round(wait * 1000))},
                )
        ticket.priority, ticket.queue_tokens, ticket.quota_tokens = priority, queue_tokens, quota_tokens
        use.tokens += quota_tokens
        self._token_rate.began(now)
        self._queued_tokens[priority] += queue_tokens

    def admit(self, ticket: Ticket) -> None:
        """The request left the queue and runs."""
        if ticket.waits:
            now = self._clock()
            self._request_rate.drained(1, now)
            self._token_rate.drained(ticket.queue_tokens, now)
            self._leave_queue(ticket, now)

    def end(self, ticket: Ticket) -> None:
        """The request is over, however far it came; only the first time counts."""
        if ticket.is_over:
            return
        ticket.is_over = True
        now = self._clock()
        self._leave_queue(ticket, now)
        use = self._tenants[ticket.tenant]
        use.requests -= 1
        use.tokens -= ticket.quota_tokens
        use.ends.drained(1, now)
        if use.requests == 0:
            del self._tenants[ticket.tenant]

    def _leave_queue(self, ticket: Ticket, now: float) -> None:
        if not ticket.waits:
            return
        ticket.waits = False
        self.waiting -= 1
        self._queued_tokens[ticket.priority] -= ticket.queue_tokens
        if not self._queued_tokens[ticket.priority]:
            del self._queued_tokens[ticket.priority]
        if self.waiting == 0:
            self._request_rate.ended(now)
        if not self._queued_tokens:
            self._token_rate.ended(now)

    def _over_quota(self, tenant: str, use: _Tenant, quota: str, is_hopeless: bool = False) -> Failure:
        retry_after = None if is_hopeless else _bounded(use.ends.seconds_for(1, self._clock()))
        return Failure(
            "TENANT_QUOTA",
            f"a tenant may have {quota}",
            retry_after=retry_after,
            quota=(f"tenant:{tenant}", quota),
        )

    def _retry_after(self) -> float:
        units = max(1.0, self.waiting * RETRY_SHARE)
        return _bounded(self._request_rate.seconds_for(units, self._clock()))


def _fade(seconds: float) -> float:
    """What is left of a measurement after so long."""
    return math.exp(-math.log(2) * seconds / HALF_LIFE)


def _bounded(seconds: float | None) -> float:
    shortest, longest = RETRY_SECONDS
    return shortest if seconds is None else min(max(seconds, shortest), longest)
