"""What a part of ``make gpu`` found: checks that hold or not, and figures with what they are held against."""

import argparse
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Check:
    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN is not


@dataclass
class Figure:
    name: str
    value: float
    unit: str
    goal: float | None = None
    """To be reached: from below where ``at_most``, from above otherwise."""
    at_most: bool = True
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass
class Report:
    """Printed line by line as it grows, so that a part cut short has said what it knew."""

    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def check(self, name: str, error: float, limit: float) -> None:
        check = Check(name, float(error), limit)
        self.checks.append(check)
        print(f"{'ok   ' if check.passed else 'WRONG'} {name:62} {error:.2e} of {limit:.0e}", flush=True)

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        goal: float | None = None,
        *,
        at_most: bool = True,
        note: str = "",
    ) -> None:
        figure = Figure(name, float(value), unit, goal, at_most, note)
        self.figures.append(figure)
        against = "" if goal is None else f"{'ok' if figure.reached else 'MISSED'} {goal:g}"
        print(f"{name:62} {value:10.4g} {unit:8} {against:14} {note}", flush=True)

    def attempt(self, name: str, step: Callable[[], object]) -> None:
        """What one step raises does not cost the others their turn."""
        try:
            step()
        except Exception:  # noqa: BLE001 - written down, and the part fails
            self.failures.append(name)
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)

    @property
    def passed(self) -> bool:
        return not self.failures and all(check.passed for check in self.checks)


def run_part(steps: Sequence[tuple[str, Callable[[Report], object]]]) -> int:
    """A part's main function: each step in turn, written to ``--json FILE``; 1 where a check did not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    report = Report()
    for name, step in steps:
        report.attempt(name, lambda step=step: step(report))
        # Written each time: the part may be cut short.
        arguments.json.write_text(json.dumps(asdict(report) | {"passed": report.passed}, indent=1))
    return 0 if report.passed else 1
