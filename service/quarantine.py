"""Which request kills the engine: suspicion from what the steps held at its deaths.

A request is suspect when it was in the executing step at two deaths and did not get beyond that place in
between; suspects run alone. One that was alone in the step at two such deaths is not run again. Whoever
gets beyond the place where an engine died is cleared, so that kills from outside blame nobody.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tidegate.engine.flight import Place

SUSPECT_DEATHS = 2
POISON_DEATHS = 2


@dataclass(slots=True)
class _Record:
    """Deaths at which the request was in the step, since it last made progress."""

    end: int
    """How far the step would have taken it."""
    deaths: int = 0
    deaths_alone: int = 0


class Quarantine:
    """What is known of the requests that were executing when an engine died, by the engine's ids of them."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def on_death(self, executing: Iterable[Place]) -> set[str]:
        """An engine died while it computed this. Returns the requests that must not run again."""
        places: dict[str, tuple[int, int]] = {}
        for name, start, end in executing:
            known_start, known_end = places.get(name, (start, end))
            places[name] = min(start, known_start), max(end, known_end)
        for name, (start, end) in places.items():
            record = self._records.get(name)
            if record is None or start >= record.end:
                record = self._records[name] = _Record(end)
            record.end = max(record.end, end)
            record.deaths += 1
            record.deaths_alone += len(places) == 1
        return {name for name in places if self._records[name].deaths_alone >= POISON_DEATHS}

    def __bool__(self) -> bool:
        """Whether there is anybody to clear."""
        return bool(self._records)

    def is_suspect(self, request_id: str) -> bool:
        """Whether it is to run alone, until it is cleared."""
        record = self._records.get(request_id)
        return record is not None and record.deaths >= SUSPECT_DEATHS

    def suspects(self) -> list[str]:
        return [name for name in self._records if self.is_suspect(name)]

    def clear(self, request_id: str) -> None:
        """It got beyond the place, or has ended."""
        self._records.pop(request_id, None)
