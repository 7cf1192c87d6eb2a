"""Sends blocks out to the host tier and back while steps write and read, and compares every byte.

    make integrity ROUND_TRIPS=1000000 JOBS=16
    python -P tests/simulation/integrity.py [--round-trips N] [--first SEED] [--jobs J]

Each process has tiers, a copy thread and a step thread of its own, and a seed.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from round_trips import make_round_trips


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--round-trips", type=int, default=20_000, help="blocks, of all processes together")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    started = time.perf_counter()
    share = -(-args.round_trips // args.jobs)
    with ProcessPoolExecutor(args.jobs, initializer=partial(torch.set_num_threads, 1)) as pool:
        done = list(pool.map(partial(make_round_trips, share), range(args.first, args.first + args.jobs)))
    mismatches = sum(one.mismatches for one in done)
    print(
        f"{sum(one.blocks for one in done):,} blocks went out and came back beside "
        f"{sum(one.steps for one in done):,} steps in {args.jobs} processes; "
        f"{sum(one.bytes_compared for one in done) / 1e9:,.1f} GB compared, {mismatches} mismatches; "
        f"{time.perf_counter() - started:,.0f} s"
    )
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
