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

from tidegate.engine.logging import quiet_by_default

MODES = (
    Variant("auto"),
    Variant("swap", limits={"preemption": "swap"}),
    Variant("recompute", limits={"preemption": "recompute"}),
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
    parser.add_argument("--load", choices=[load.__name__ for load in LOADS], help="this one alone")
    args = parser.parse_args()
    cases = [
        (machine, load, mode)
        for machine in MACHINES
        if args.machine in (None, machine.name)
        for load in LOADS
        if args.load in (None, load.__name__)
        for mode in MODES
    ]
    for table in tables(cases, args.seed):
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
