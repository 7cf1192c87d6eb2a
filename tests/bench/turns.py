"""Conversations that return: how long a turn waits for its first token, beside its history computed anew.

    python -P tests/bench/turns.py --model qwen-tiny [--conversations 64 --turns 6 --resident 16]

One turn at a time, round by round through all conversations, with KV on the device for ``--resident`` of
them: when a conversation returns, its KV lies in the host tier. A turn continues its parent's KV; with
``--resend`` it is sent as text would be, and only the prefix cache helps.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch, percentile, prompt, request

from tidegate.engine.config import DTYPES
from tidegate.engine.logging import quiet_by_default
from tidegate.engine.messages import Release

TENANT_SHARE = 1.0
"""All conversations are one tenant's here."""
SPARE = 128
"""Tokens of room beside the conversations: no tier lends its last block to one sequence."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(args.seed)
    first = args.first or args.new
    longest = first + (args.turns - 1) * args.new + args.turns * args.output_len
    transcripts: list[list[int]] = [[] for _ in range(args.conversations)]
    rounds = []
    with Stopwatch(
        model=args.model,
        dtype=args.dtype,
        device_kv_tokens=args.resident * longest + SPARE,
        host_kv_tokens=2 * args.conversations * longest + SPARE,
        tenant_host_share=TENANT_SHARE,
        park_grace=0.0,
        max_step_tokens=2048,
    ) as engine:
        engine.warm_up()
        for turn in range(args.turns):
            timed, again, on_host = [], 0, engine.stats().swap_in_bytes
            for i, transcript in enumerate(transcripts):
                name, parent = f"{i}, turn {turn}", f"{i}, turn {turn - 1}" if turn else None
                new = args.new if turn else first
                tokens = transcript + prompt(rng, new)
                history = max(0, len(transcript) - 1)  # the last token that was said has no KV
                lease = {} if args.resend else {"parent": parent, "leased": True}
                (one,) = engine.run([request(name, tokens, args.output_len, **lease)])
                if parent is not None:
                    engine.say(Release([parent]))
                again += max(0, history - one.cached_tokens)
                timed.append(one)
                transcripts[i] = tokens + one.tokens
            sent = len(transcripts[0]) - args.output_len
            samples = [request(f"fresh {turn}.{i}", prompt(rng, sent), 1) for i in range(args.fresh)]
            fresh = [engine.run([sample])[0].ttft for sample in samples]
            rounds.append(
                {
                    "turn": turn + 1,
                    "history_tokens": sent - (args.new if turn else first),
                    "ttft_p50_s": median(one.ttft for one in timed),
                    "ttft_p99_s": percentile((one.ttft for one in timed), 0.99),
                    "fresh_ttft_s": median(fresh),
                    "ratio": median(fresh) / median(one.ttft for one in timed),
                    "computed_again": again,
                    "loaded_bytes": engine.stats().swap_in_bytes - on_host,
                }
            )
    return {
        "config": {name: value for name, value in vars(args).items() if name != "json"},
        "rounds": rounds,
        "computed_again": sum(one["computed_again"] for one in rounds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--resident", type=int, default=16, help="conversations with room on the device")
    parser.add_argument("--new", type=int, default=64, help="tokens that each turn brings")
    parser.add_argument("--first", type=int, help="tokens of each first turn, where not the same")
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--fresh", type=int, default=3, help="histories computed anew in each round")
    parser.add_argument("--resend", action="store_true", help="without a parent, through the prefix cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_by_default()
    figures = measure(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2, default=str) + "\n")
    table = Table("turn", "history", "TTFT p50", "p99 ms", "history anew, ms", "ratio", "again", "MB loaded")
    for one in figures["rounds"]:
        table.add_row(
            f"{one['turn']}",
            f"{one['history_tokens']:,}",
            f"{one['ttft_p50_s'] * 1e3:,.1f}",
            f"{one['ttft_p99_s'] * 1e3:,.1f}",
            f"{one['fresh_ttft_s'] * 1e3:,.1f}",
            f"{one['ratio']:.1f}",
            f"{one['computed_again']:,}",
            f"{one['loaded_bytes'] / 1e6:,.1f}",
        )
    Console(width=110).print(table)
    print(f"positions computed again: {figures['computed_again']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
