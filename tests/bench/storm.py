"""A storm: more requests at once than KV on the device, under each way of making room, in one sitting.

    python -P tests/bench/storm.py --model qwen-tiny --device-kv-tokens 8192 [--json FILE]

``batch`` is the engine that never preempts: the largest batch whose full lengths fit. ``eager`` writes
likely victims to the host in advance. Rounds are interleaved; a figure is the median of its rounds.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch, prompt, request

from tidegate.engine.config import DTYPES
from tidegate.engine.logging import quiet_by_default

VARIANTS = ("auto", "swap", "recompute", "batch", "eager")
EAGER_SHARE = 0.25
"""Of the link's time; see ``Limits.write_ahead``."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.variants}
    for round_number in range(args.rounds):
        # In turn from the front and from the back, so that a machine that slows down slows all alike.
        for name in args.variants[:: -1 if round_number % 2 else 1]:
            runs[name].append(_once(args, name))
    return {
        "config": {name: value for name, value in vars(args).items() if name != "json"},
        "runs": runs,
        "median": {
            name: {key: median(run[key] for run in of_it) for key in of_it[0]} for name, of_it in runs.items()
        },
    }


def _once(args: argparse.Namespace, name: str) -> dict[str, float]:
    length = args.input_len + args.output_len
    options: dict[str, Any] = {"preemption": name if name in ("swap", "recompute") else "auto"}
    if name == "batch":
        options["max_num_seqs"] = max(1, args.device_kv_tokens // length)
    if name == "eager":
        options["write_ahead"] = EAGER_SHARE
    rng = random.Random(args.seed)
    with Stopwatch(
        model=args.model,
        dtype=args.dtype,
        device_kv_tokens=args.device_kv_tokens,
        host_kv_tokens=args.host_kv_tokens,
        max_step_tokens=2048,
        **options,
    ) as engine:
        engine.warm_up()
        requests = [
            request(f"r{i}", prompt(rng, args.input_len), args.output_len) for i in range(args.requests)
        ]
        began = time.perf_counter()
        timed = engine.run(requests)
        seconds = time.perf_counter() - began
        stats = engine.stats()
    return {
        "tokens_per_s": args.requests * args.output_len / seconds,
        "ttft_p50_s": median(one.ttft for one in timed),
        "swapped": stats.preemptions_swap,
        "dropped": stats.preemptions_recompute,
        "bytes_out": stats.swap_out_bytes,
        "bytes_in": stats.swap_in_bytes,
        "recomputed": stats.recomputed_tokens,
        "clean_at_preemption": stats.preempted_clean_blocks / max(1, stats.preempted_blocks),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=448)
    parser.add_argument("--device-kv-tokens", type=int, required=True)
    parser.add_argument("--host-kv-tokens", type=int, default=65_536)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_by_default()
    figures = measure(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table("variant", "tok/s", "TTFT p50 s", "swap / drop", "MB out / in", "recomputed", "clean")
    for name, one in figures["median"].items():
        table.add_row(
            name,
            f"{one['tokens_per_s']:,.0f}",
            f"{one['ttft_p50_s']:,.2f}",
            f"{one['swapped']:,.0f} / {one['dropped']:,.0f}",
            f"{one['bytes_out'] / 1e6:,.1f} / {one['bytes_in'] / 1e6:,.1f}",
            f"{one['recomputed']:,.0f}",
            f"{one['clean_at_preemption']:.2f}",
        )
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
