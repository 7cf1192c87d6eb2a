"""Things to do at a time to come, for as long as they concern somebody."""

import heapq
from collections.abc import Callable, Container
from itertools import count

FEW = 1000


class Timers:
    """A heap of actions, each on behalf of an owner. Times are those of one monotonic clock, in seconds.

    Most owners end long before their timers are due: when the heap has doubled, the timers of those that
    are no longer in ``alive`` are forgotten.
    """

    def __init__(self, alive: Container[str]) -> None:
        self._alive = alive
        self._heap: list[tuple[float, int, str, Callable[[], None]]] = []
        self._numbers = count()
        self._most = FEW

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next(self) -> float | None:
        """When the earliest one is due."""
        return self._heap[0][0] if self._heap else None

    def at(self, when: float, owner: str, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._numbers), owner, action))
        if len(self._heap) > self._most:
            self._heap = [timer for timer in self._heap if timer[2] in self._alive]
            heapq.heapify(self._heap)
            self._most = max(FEW, 2 * len(self._heap))

    def run_due(self, now: float) -> None:
        """Do, in order, what is due. An action finds out for itself whether it still applies."""
        while self._heap and self._heap[0][0] <= now:
            *_, action = heapq.heappop(self._heap)
            action()
