"""A storm: more requests at once than KV on the device, under each way of making room, in one sitting.

    python -P tests/bench/storm.py --model qwen-tiny --device-kv-tokens 8192 [--rounds 8] [--json FILE]
        [--vllm PYTHON]

``batch`` is the engine that never preempts: the largest batch whose full lengths fit. ``late`` writes nobody
to the host in advance. ``vllm`` is the same work in vLLM, where ``PYTHON`` has it. Rounds are
interleaved; a figure is the median of its rounds. A file of the same work is added to, so that a long
sitting may be cut into pieces.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import structlog
from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch, prompt, request
from structlog.testing import capture_logs

from tidegate.engine.config import DTYPES

VARIANTS = ("auto", "swap", "recompute", "batch", "late", "vllm")
VLLM_ENV = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""GiB, of which it uses as many blocks as it is told to."""
VLLM_FIGURES = "figures: "
"""What its processes say stands around the line that begins so."""
RATIOS = {
    "auto to the largest batch that never preempts": ("auto", ("batch",)),
    "auto to the better of swap and recompute": ("auto", ("swap", "recompute")),
    "auto to vLLM": ("auto", ("vllm",)),
}

Runs = dict[str, list[dict[str, Any]]]


def measure(args: argparse.Namespace, runs: Runs) -> None:
    """Add so many rounds of each variant to ``runs``."""
    variants = [name for name in args.variants if name != "vllm" or args.vllm]
    done = min((len(runs.get(name, ())) for name in variants), default=0)
    if any(name != "vllm" for name in variants):
        # The first engine of a process pays for things that the others find done.
        _tidegate(args, "auto")
    for round_number in range(done, done + args.rounds):
        # In any order, so that neither the place in a round nor the one before it nor a machine that slows
        # down tells.
        for name in random.Random(round_number).sample(variants, len(variants)):
            once = _vllm if name == "vllm" else _tidegate
            runs.setdefault(name, []).append(once(args, name))


def _tidegate(args: argparse.Namespace, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"preemption": name if name in ("swap", "recompute") else "auto"}
    if name == "batch":
        options["max_num_seqs"] = max(1, args.device_kv_tokens // (args.input_len + args.output_len))
    if name == "late":
        options["write_ahead"] = 0.0
    with Stopwatch(
        model=args.model,
        dtype=args.dtype,
        device_kv_tokens=args.device_kv_tokens,
        host_kv_tokens=args.host_kv_tokens,
        **options,
    ) as engine:
        engine.warm_up()
        requests = [request(f"r{i}", tokens, args.output_len) for i, tokens in enumerate(prompts(args))]
        with capture_logs() as logs:
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
        # What `auto` weighed, of each that it had computed again.
        "recompute_chosen": [line for line in logs if line["event"] == "recompute_chosen"],
    }


def _vllm(args: argparse.Namespace, name: str) -> dict[str, Any]:
    work = {
        "model": args.model,
        "dtype": args.dtype,
        "device_kv_tokens": args.device_kv_tokens,
        "prompts": prompts(args),
        "output_len": args.output_len,
    }
    script = Path(__file__).with_name("vllm_storm.py")
    # Its environment is its own: not what leads Python to our sources.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | VLLM_ENV
    done = subprocess.run(
        [args.vllm, script], input=json.dumps(work), env=env, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"vLLM failed: {done.stderr[-2000:]}")
    figures = [line for line in done.stdout.splitlines() if line.startswith(VLLM_FIGURES)]
    return dict(json.loads(figures[0].removeprefix(VLLM_FIGURES)))


def prompts(args: argparse.Namespace) -> list[list[int]]:
    rng = random.Random(args.seed)
    return [prompt(rng, args.input_len) for _ in range(args.requests)]


def medians(runs: Runs) -> dict[str, dict[str, float]]:
    numbers = {
        name: {key: [run[key] for run in of_it] for key in of_it[0] if key != "recompute_chosen"}
        for name, of_it in runs.items()
    }
    return {name: {key: median(values) for key, values in of_it.items()} for name, of_it in numbers.items()}


def show(args: argparse.Namespace, runs: Runs) -> None:
    title = (
        f"{args.model}, {args.requests} x ({args.input_len} in, {args.output_len} out), "
        f"{args.device_kv_tokens:,} tokens of KV"
    )
    columns = ("tok/s", "of rounds", "TTFT s", "swapped", "dropped", "MB out / in", "recomputed", "clean")
    table = Table("variant", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for name, one in medians(runs).items():
        speeds = [run["tokens_per_s"] for run in runs[name]]
        table.add_row(
            name,
            f"{one['tokens_per_s']:,.1f}",
            f"{min(speeds):,.1f} to {max(speeds):,.1f}",
            *(f"{one[key]:,.2f}" if key in one else "" for key in ("ttft_p50_s",)),
            *(f"{one[key]:,.0f}" if key in one else "" for key in ("swapped", "dropped")),
            f"{one['bytes_out'] / 1e6:,.1f} / {one['bytes_in'] / 1e6:,.1f}" if "bytes_out" in one else "",
            f"{one['recomputed']:,.0f}" if "recomputed" in one else "",
            f"{one['clean_at_preemption']:.2f}" if "clean_at_preemption" in one else "",
        )
    console = Console(width=130)
    console.print(table)
    speed = {name: one["tokens_per_s"] for name, one in medians(runs).items()}
    for text, (ours, others) in RATIOS.items():
        if ours in speed and all(name in speed for name in others):
            console.print(f"{text}: {speed[ours] / max(speed[name] for name in others):.3f}")
    for line in (line for run in runs.get("auto", ()) for line in run["recompute_chosen"]):
        console.print("auto chose to recompute:", line)


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
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="an interpreter that has vLLM; without it, no `vllm`"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    work = {
        name: value
        for name, value in vars(args).items()
        if name not in ("json", "rounds", "variants", "vllm")
    }
    runs: Runs = {}
    if args.json and args.json.exists():
        earlier = json.loads(args.json.read_text())
        if earlier["work"] != work:
            parser.error(f"{args.json} holds other work: {earlier['work']}")
        runs = earlier["runs"]
    with capture_logs():  # of the start of each engine
        measure(args, runs)
    if args.json:
        args.json.write_text(
            json.dumps({"work": work, "runs": runs, "median": medians(runs)}, indent=2) + "\n"
        )
    show(args, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
