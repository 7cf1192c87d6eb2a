"""Runs the engine in one random world after another, and counts what they withstood.

    make soak REQUESTS=1000000 JOBS=16
    python -P tests/simulation/soak.py [--requests N | --seeds N] [--first SEED] [--jobs J] [--digests]

Every world comes from its seed alone: a violation names it, and `--first SEED --seeds 1` shows it again.
"""

import argparse
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice

import structlog
from chaos import Outcome, run_seed

SEEDS_A_JOB = 4
"""Handed out ahead, so that no process waits for a long world in another, and a run of so many requests ends
soon behind them."""
REPORT_SECONDS = 30.0
COUNTS = ("requests", "choices", "steps", "preemptions", "blocks_copied")


def outcomes(seeds: Iterator[int], jobs: int) -> Iterator[Outcome]:
    """In the order of the seeds."""
    with ProcessPoolExecutor(jobs, initializer=_hush) as pool:
        ahead = deque(pool.submit(run_seed, seed) for seed in islice(seeds, SEEDS_A_JOB * jobs))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(run_seed, seed) for seed in islice(seeds, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _hush() -> None:
    """Steps fail by the thousand here, on purpose."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--requests", type=int, default=20_000, help="stop behind so many")
    amount.add_argument("--seeds", type=int, help="instead: so many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--digests", action="store_true", help="print what identifies each run")
    args = parser.parse_args()

    seeds = count(args.first) if args.seeds is None else iter(range(args.first, args.first + args.seeds))
    totals: Counter[str] = Counter()
    started = reported = time.perf_counter()
    for seed, outcome in enumerate(outcomes(seeds, args.jobs), args.first):
        totals.update({name: getattr(outcome, name) for name in COUNTS}, worlds=1)
        totals["longest wait"] = max(totals["longest wait"], outcome.longest_wait)
        if args.digests:
            print(f"seed {seed} {outcome.digest.hex()}")
        if time.perf_counter() > reported + REPORT_SECONDS:
            reported = time.perf_counter()
            print(f"{reported - started:,.0f} s: {_shown(totals)}", flush=True)
        if args.seeds is None and totals["requests"] >= args.requests:
            break
    print(f"{_shown(totals)}; 0 violations, 0 unexplained stalls; {time.perf_counter() - started:,.0f} s")
    return 0


def _shown(totals: Counter[str]) -> str:
    named = ", ".join(f"{totals[name]:,} {name.replace('_', ' ')}" for name in ("worlds", *COUNTS))
    return f"{named}, longest wait {totals['longest wait']} beats"


if __name__ == "__main__":
    sys.exit(main())
