"""Prints what the policies make of each load on each simulated machine.

make simulate
python -P tests/simulation/lab.py [--machine NAME] [--load NAME] [--seed S]
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from laboratory.loads import LOADS, Load, Writer
from laboratory.machines import MACHINES, Machine
from laboratory.trial import Figures, Variant, trial
from rich.console import Console
from rich.table import Table

from tidegate.engine import policy
from tidegate.engine.logging import quiet_by_default

MODES = (
    Variant("auto"),
    Variant("swap", limits={"preemption": "swap"}),
    Variant("recompute", limits={"preemption": "recompute"}),
)


def latest_first(candidate: policy.Candidate) -> tuple[bool, int, int]:
    """A victim order by arrival alone: whatever is just back, and however much it frees."""
    return (not candidate.stalled, candidate.priority, -candidate.arrival)


def no_reserve(num_running: int, block_size: int, caution: float) -> int:
    return 0


def steady(caution: float, num_preempted: int) -> float:
    """The same room left for growth whatever happens."""
    return caution


RULES = (
    Variant("as shipped"),
    Variant("no host tier", host_tier=0),
    Variant("recompute", limits={"preemption": "recompute"}),
    Variant("no write-ahead", limits={"write_ahead": 0.0}),
    Variant("a quarter of the link", limits={"write_ahead": 0.25}),
    Variant("ahead from 0.85 on", rules={"WRITE_AHEAD_MARK": 0.85}),
    Variant("no demotion", rules={"DEMOTED_A_STEP": 0}),
    Variant("no immunity", rules={"IMMUNE_STEPS": 0}),
    Variant("latest is victim", rules={"victim_rank": latest_first}),
    Variant("no reserve", rules={"growth_reserve": no_reserve}),
    Variant("steady reserve", rules={"next_caution": steady}),
    Variant("no grace", limits={"park_grace": 0.0}),
)

COLUMNS: dict[str, Callable[[Figures], str]] = {
    "tok/s": lambda f: f"{f.tokens_per_second:,.0f}",
    "TTFT p50": lambda f: f"{f.ttft_p50 * 1e3:,.0f}",
    "p99 ms": lambda f: f"{f.ttft_p99 * 1e3:,.0f}",
    "ITL p50": lambda f: f"{f.itl_p50 * 1e3:,.1f}",
    "p99 ms ": lambda f: f"{f.itl_p99 * 1e3:,.1f}",
    "preempted": lambda f: f"{f.preemptions}",
    "thrash": lambda f: f"{f.thrash}",
    "clean": lambda f: "" if f.clean_ratio is None else f"{f.clean_ratio:.3f}",
    "GB out": lambda f: f"{f.bytes_out / 1e9:,.2f}",
    "GB in": lambda f: f"{f.bytes_in / 1e9:,.2f}",
    "recomputed": lambda f: f"{f.recomputed:,}",
}

Case = tuple[Machine, Callable[[Writer], Load], Variant]


def tables(cases: Sequence[Case], seed: int) -> Iterator[Table]:
    """One for each machine, in the order of the cases; trials run on all cores."""
    with ProcessPoolExecutor(os.cpu_count(), initializer=quiet_by_default) as pool:
        results = zip(cases, pool.map(partial(_run, seed=seed), cases), strict=True)
        table: Table | None = None
        for (machine, load, variant), figures in results:
            title = f"simulated: {machine.name}"
            if table is None or table.title != title:
                if table is not None:
                    yield table
                table = Table("load", "policy", title=title)
                for name in COLUMNS:
                    table.add_column(name, justify="right")
            name = load.__name__.replace("_", " ")
            table.add_row(name, variant.name, *(shown(figures) for shown in COLUMNS.values()))
        if table is not None:
            yield table


def _run(case: Case, seed: int) -> Figures:
    return trial(*case, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", choices=[m.name for m in MACHINES], help="this one alone")
    parser.add_argument("--ablate", action="store_true", help="rules of the policy, not ways to preempt")
    parser.add_argument("--load", choices=[load.__name__ for load in LOADS], help="this one alone")
    args = parser.parse_args()
    cases = [
        (machine, load, mode)
        for machine in MACHINES
        if args.machine in (None, machine.name)
        for load in LOADS
        if args.load in (None, load.__name__)
        for mode in (RULES if args.ablate else MODES)
    ]
    for table in tables(cases, args.seed):
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
