"""Which request kills the engine: suspicion from what the steps held at its deaths.

A request is suspect when it was in the executing step at two deaths and did not get beyond that place in
between; suspects run alone. One that was alone in the step at two such deaths is not run again. Whoever
gets beyond the place where an engine died is cleared, so that kills from outside blame nobody.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tidegate.engine.messages import Place

SUSPECT_DEATHS = 2
POISON_DEATHS = 2


@dataclass(slots=True)
class _Record:
    """Deaths at which a choice of a request was in the step, since it last made progress."""

    end: int
    """How far the step would have taken it."""
    deaths: int = 0
    deaths_alone: int = 0


class Quarantine:
    """What is known of the requests that were executing when an engine died, by the engine's ids of them."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, int], _Record] = {}
        """By request and choice."""

    def __bool__(self) -> bool:
        """Whether anything is known of anybody."""
        return bool(self._records)

    def on_death(self, executing: Iterable[Place]) -> set[str]:
        """An engine died while it computed this. Returns the requests that must not run again."""
        spans: dict[tuple[str, int], tuple[int, int]] = {}
        for request_id, choice, start, end in executing:
            # Where two steps were under way, a choice may have a place in each.
            known_start, known_end = spans.get((request_id, choice), (start, end))
            spans[request_id, choice] = min(start, known_start), max(end, known_end)
        was_alone = len({request_id for request_id, _ in spans}) == 1
        for key, (start, end) in spans.items():
            record = self._records.get(key)
            if record is None or start >= record.end:
                record = self._records[key] = _Record(end)
            record.end = max(record.end, end)
            record.deaths += 1
            record.deaths_alone += was_alone
        return {key[0] for key in spans if self._records[key].deaths_alone >= POISON_DEATHS}

    def suspects(self) -> list[str]:
        """Requests that are to run alone, until they are cleared."""
        found = (key[0] for key, record in self._records.items() if record.deaths >= SUSPECT_DEATHS)
        return list(dict.fromkeys(found))

    def is_suspect(self, request_id: str) -> bool:
        return request_id in self.suspects()

    def clear(self, request_id: str, choice: int) -> None:
        """A step of this choice was completed."""
        self._records.pop((request_id, choice), None)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        for key in [key for key in self._records if key[0] == request_id]:
            del self._records[key]
