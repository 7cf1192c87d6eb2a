"""Client, feature, result: what was seen, held against what the README promises."""

import re
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
WORKS, NOT_YET = "works", "not yet"


class Table:
    def __init__(self) -> None:
        self._results: dict[tuple[str, str], str] = {}

    def note(self, client: str, feature: str, outcome: str) -> None:
        """``outcome`` as pytest says it; the worst of several is the row's."""
        result = WORKS if outcome == "passed" else outcome.upper()
        if self._results.get((client, feature), WORKS) == WORKS:
            self._results[client, feature] = result

    def compare(self) -> None:
        """A row for whatever the README promises and nothing has shown, and the other way round."""
        promises, limits = promised(README.read_text())
        for row in sorted(self._results.keys() - promises):
            self._results[row] = "NOT IN THE README"
        for row in sorted(promises - self._results.keys()):
            self._results[row] = "MISSING"
        self._results |= dict.fromkeys(limits, NOT_YET)

    @property
    def has_faults(self) -> bool:
        return not {WORKS, NOT_YET}.issuperset(self._results.values())

    def lines(self) -> Iterator[str]:
        last = ""
        for (client, feature), result in sorted(self._results.items(), key=lambda row: row[0][0]):
            yield f"{client if client != last else '':10} {feature:36} {result}"
            last = client


def promised(readme: str) -> tuple[set[tuple[str, str]], list[tuple[str, str]]]:
    """Client and feature of all that works and of all that does not yet.

    From the rows ``| `CLIENT`: … | through | FEATURE, FEATURE | FEATURE, FEATURE |``. What stands in
    parentheses explains a feature and is no part of its name.
    """
    works, limits = set(), []
    for client, can, cannot in re.findall(
        r"^\| `(\w+)`: [^|]*\|[^|]*\|([^|]*)\|([^|]*)\|$", readme, re.MULTILINE
    ):
        works |= {(client, feature) for feature in _listed(can)}
        limits += [(client, feature) for feature in _listed(cannot)]
    return works, limits


def _listed(cell: str) -> list[str]:
    return [feature.strip().replace("`", "") for feature in re.sub(r"\([^)]*\)", "", cell).split(",")]
