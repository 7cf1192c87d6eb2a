"""Takes one rule of the policy away at a time, and prints what each load loses by it on each machine.

    make ablate SEEDS=4
    python -P tests/simulation/ablate.py [--machine NAME] [--load NAME] [--seeds N]

A cell is the change against the policy as shipped, in percent, of tokens a second and of two percentiles:
means over the seeds, and the standard error of the first. Seeds change lengths and arrivals: what does not
show over several of them is no gain.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import fmean, stdev

from laboratory.loads import LOADS, Load, Writer
from laboratory.machines import MACHINES, Machine
from laboratory.trial import Figures, Variant, trial
from rich.console import Console
from rich.table import Table

from tidegate.engine import policy
from tidegate.engine.logging import quiet_by_default

SHIPPED = Variant("as shipped")


def latest_first(candidate: policy.Candidate) -> tuple[bool, int, int]:
    """A victim order by arrival alone: whatever is just back, and however much it frees."""
    return (not candidate.stalled, candidate.priority, -candidate.arrival)


def no_reserve(num_running: int, block_size: int) -> int:
    return 0


RULES = (
    Variant("no host tier", host_tier=0),
    Variant("recompute", limits={"preemption": "recompute"}),
    Variant("no write-ahead", limits={"write_ahead": 0.0}),
    Variant("ahead, a quarter of the link", limits={"write_ahead": 0.25}),
    Variant("ahead, all of the link", limits={"write_ahead": 1.0}),
    Variant("ahead from 0.85 on", rules={"WRITE_AHEAD_MARK": 0.85}),
    Variant("no demotion", rules={"DEMOTED_A_STEP": 0}),
    Variant("no immunity", rules={"IMMUNE_STEPS": 0}),
    Variant("latest is victim", rules={"victim_rank": latest_first}),
    Variant("no growth reserve", rules={"growth_reserve": no_reserve}),
    Variant("reserve of 32 tokens", rules={"GROWTH_ROOM": 32}),
    Variant("no grace", limits={"park_grace": 0.0}),
)

PERCENTILES: dict[str, Callable[[Figures], float]] = {
    "TTFT p99": lambda figures: figures.ttft_p99,
    "ITL p99": lambda figures: figures.itl_p99,
}

Case = tuple[Machine, Callable[[Writer], Load], Variant, int]


def _run(case: Case) -> Figures:
    return trial(*case)


def _change(variant: Sequence[float], shipped: Sequence[float]) -> list[float]:
    """In percent, seed by seed."""
    return [100 * (ours / theirs - 1) for ours, theirs in zip(variant, shipped, strict=True)]


def _cell(variant: Sequence[Figures], shipped: Sequence[Figures]) -> str:
    def changes(figure: Callable[[Figures], float]) -> list[float]:
        return _change([figure(one) for one in variant], [figure(one) for one in shipped])

    speed = changes(lambda figures: figures.tokens_per_second)
    error = stdev(speed) / len(speed) ** 0.5 if len(speed) > 1 else 0.0
    percentiles = " ".join(f"{fmean(changes(figure)):+.0f}" for figure in PERCENTILES.values())
    return f"{fmean(speed):+.1f} ±{error:.1f}; {percentiles}"


def tables(
    machines: Sequence[Machine], loads: Sequence[Callable[[Writer], Load]], seeds: int
) -> Iterator[Table]:
    """One for each machine; trials run on all cores."""
    cases = [
        (machine, load, variant, seed)
        for machine in machines
        for variant in (SHIPPED, *RULES)
        for load in loads
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(os.cpu_count(), initializer=quiet_by_default) as pool:
        results = pool.map(_run, cases)
        for machine in machines:
            table = Table(
                "", title=f"simulated: {machine.name}, {seeds} seeds; tok/s; {', '.join(PERCENTILES)}"
            )
            for load in loads:
                table.add_column(load.__name__.replace("_", " "), justify="right")
            shipped = [[next(results) for _ in range(seeds)] for _ in loads]
            table.add_row(
                SHIPPED.name, *(f"{fmean(one.tokens_per_second for one in of_it):,.0f}" for of_it in shipped)
            )
            for variant in RULES:
                figures = [[next(results) for _ in range(seeds)] for _ in loads]
                table.add_row(variant.name, *map(_cell, figures, shipped))
            yield table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--machine", choices=[m.name for m in MACHINES], help="this one alone")
    parser.add_argument("--load", choices=[load.__name__ for load in LOADS], help="this one alone")
    args = parser.parse_args()
    machines = [machine for machine in MACHINES if args.machine in (None, machine.name)]
    loads = [load for load in LOADS if args.load in (None, load.__name__)]
    for table in tables(machines, loads, args.seeds):
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
