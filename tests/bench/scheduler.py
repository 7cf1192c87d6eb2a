"""What the scheduler and the block manager cost a step, with neither model nor copies.

    python tests/bench/scheduler.py

Processor time of ``plan`` and ``apply`` a step, on requests of (64 in, 448 out) and blocks of 32; the best of
several turns.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import structlog
from world import FakeTiers, Faults

from tidegate.engine.constraints import Constraints
from tidegate.engine.memory.groups import KVGroup
from tidegate.engine.memory.prefix import BlockHasher
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.messages import Submit
from tidegate.engine.request import Request, SamplingParams
from tidegate.engine.scheduler import Limits, Scheduler
from tidegate.engine.step import StepResult

PROMPT, OUTPUT, BLOCK = 64, 448, 32
LOADS = [(64, 64 * 512), (256, 256 * 512), (64, 8192), (64, 4608)]
"""Requests, and tokens of KV in the device tier."""
GROUPS: dict[str, tuple[int | None, ...]] = {
    "full": (None,),
    "windowed": (128,),
    "full and windowed": (None, 128),
}


def run(requests: int, kv_tokens: int, windows: tuple[int | None, ...]) -> tuple[float, int]:
    """Seconds of processor time a step, and preemptions."""
    blocks = (kv_tokens // BLOCK + 1) * len(windows)
    copies_arrive_at_once = Faults(copy_delay=0, copy_haste=0, copy_repeats=0)
    tiers = FakeTiers(blocks, 2 * blocks, 1, random.Random(0), copies_arrive_at_once)
    manager = BlockManager(
        block_size=BLOCK,
        device_blocks=blocks,
        host_blocks=2 * blocks,
        transfer=tiers,
        hasher=BlockHasher("bench", BLOCK, secret=b"bench"),
        groups=[KVGroup(window) for window in windows],
        most_uncommitted=2048,
    )
    limits = Limits(
        max_model_len=1024,
        max_num_seqs=256,
        max_step_tokens=2048,
        park_grace=1.0,
        preemption="swap",
        block_bytes=1 << 20,
        write_ahead=0,
    )
    scheduler = Scheduler(
        limits,
        manager,
        Constraints(Path("nowhere"), 1000, ()),
        eos_token_ids=frozenset(),
        bytes_per_second=lambda: tiers.bytes_per_second,
    )
    rng = random.Random(1)
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    for i in range(requests):
        prompt = [rng.randrange(1000) for _ in range(PROMPT)]
        scheduler.submit(Submit(Request(id=f"r{i}", prompt_token_ids=prompt, params=params, seed=i)))
    steps, spent = 0, 0.0
    while scheduler.request_ids():
        began = time.process_time()
        step = scheduler.plan()
        spent += time.process_time() - began
        if step is None:
            continue
        count = sum(chunk.samples for chunk in step.plan.chunks)
        result = StepResult([7] * count, [True] * count, [None] * count, 0.001)
        began = time.process_time()
        scheduler.apply(step, result)
        scheduler.take_output()
        spent += time.process_time() - began
        steps += 1
    return spent / steps, scheduler.snapshot().preemptions_swap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    for name in arguments.groups:
        for requests, kv_tokens in LOADS:
            best, preemptions = min(run(requests, kv_tokens, GROUPS[name]) for _ in range(arguments.turns))
            print(f"{name}, {requests} sequences, KV for {kv_tokens}: {best * 1e6:.0f} µs, {preemptions}")


if __name__ == "__main__":
    main()
