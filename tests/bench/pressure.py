"""What the tier costs where it is not needed: the same work with it and without, room for everything.

    python -P tests/bench/pressure.py --model qwen-tiny [--pairs 20] [--json FILE]

Pairs in turn, in the one order and in the other; the ratio of each pair, and the 95% bootstrap interval of
their median. The work is checked to have caused no copy.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from stopwatch import Stopwatch, median_interval, prompt, request

from tidegate.engine.config import DTYPES
from tidegate.engine.logging import quiet_by_default


def measure(args: argparse.Namespace) -> dict[str, Any]:
    # For what earlier pairs have left as known prefixes too.
    room = (args.pairs + 2) * args.requests * (args.input_len + args.output_len + 64)
    options = {"model": args.model, "dtype": args.dtype, "device_kv_tokens": room, "max_step_tokens": 2048}
    pairs = []
    with (
        Stopwatch(host_kv_tokens=room, **options) as on,
        Stopwatch(host_kv_tokens=0, **options) as off,
    ):
        on.warm_up()
        off.warm_up()
        copied_before = on.stats()
        for pair in range(args.pairs + 1):
            order = (on, off) if pair % 2 else (off, on)
            figures = {engine: _once(engine, args, pair) for engine in order}
            if pair:  # the first pair pays for the rest of the warm-up
                pairs.append((figures[on], figures[off]))
        copied = on.stats()
    speed = [with_tier["tokens_per_s"] / without["tokens_per_s"] for with_tier, without in pairs]
    scheduling = [
        with_tier["scheduler_s_a_step"] / without["scheduler_s_a_step"] for with_tier, without in pairs
    ]
    return {
        "config": {name: value for name, value in vars(args).items() if name != "json"},
        "throughput_ratio": median_interval(speed),
        "scheduler_time_ratio": median_interval(scheduling),
        "copied_bytes": (copied.swap_out_bytes - copied_before.swap_out_bytes)
        + (copied.swap_in_bytes - copied_before.swap_in_bytes),
        "preemptions": copied.preemptions_swap + copied.preemptions_recompute,
        "pairs": [{"on": with_tier, "off": without} for with_tier, without in pairs],
    }


def _once(engine: Stopwatch, args: argparse.Namespace, number: int) -> dict[str, float]:
    rng = random.Random(f"pair {number}")
    requests = [
        request(f"{number}.{i}", prompt(rng, args.input_len), args.output_len) for i in range(args.requests)
    ]
    steps, scheduling = engine.stats().steps, engine.scheduling
    began = time.perf_counter()
    engine.run(requests)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_s": args.requests * args.output_len / seconds,
        "scheduler_s_a_step": (engine.scheduling - scheduling) / (engine.stats().steps - steps),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_by_default()
    figures = measure(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    for name in ("throughput_ratio", "scheduler_time_ratio"):
        median, low, high = figures[name]
        print(f"{name}, tier on to tier off: median {median:.4f}, 95% interval {low:.4f} to {high:.4f}")
    print(f"bytes copied: {figures['copied_bytes']}; preemptions: {figures['preemptions']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
