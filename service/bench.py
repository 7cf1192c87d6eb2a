"""``tidegate bench``: how fast, and how evenly, tokens come.

*TTFT* is the time from sending a request to its first token; *ITL* the time between two arrivals of
tokens of one request; *TPOT* a request's time behind its first token, divided by the tokens behind it.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tidegate
from tidegate.engine.config import DTYPES, PREEMPTIONS
from tidegate.engine.logging import configure_logging
from tidegate.service import connection
from tidegate.service.client import AsyncClient, Session, TidegateError

WARM_UP_TOKENS = 8
PERCENTILES = (50, 90, 99)
TIMES = ("ttft_s", "itl_s", "tpot_s", "latency_s")

_console = Console()


def add_offline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a checkpoint, as for serve")
    _add_work(parser)
    parser.add_argument("--device-kv-tokens", type=int, metavar="K", help="size of the device tier")
    parser.add_argument("--host-kv-tokens", type=int, metavar="H", help="size of the host tier")
    parser.add_argument(
        "--preemption",
        choices=PREEMPTIONS,
        default="auto",
        help="what to do with KV that must go (default: auto)",
    )
    parser.add_argument("--max-num-seqs", type=_count, default=256, metavar="N", help="sequences in one step")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: what the checkpoint says")
    parser.set_defaults(run=offline)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    connection.add_server_argument(parser)
    _add_work(parser)
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=_count, default=8, metavar="C", help="requests under way at once (default: 8)"
    )
    load.add_argument(
        "--rate", type=_rate, metavar="R", help="instead: Poisson arrivals, R requests a second"
    )
    parser.set_defaults(run=serve)


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=_count, required=True, metavar="N", help="requests in all")
    parser.add_argument(
        "--input-len", type=_count, required=True, metavar="P", help="random prompt tokens of each"
    )
    parser.add_argument("--output-len", type=_count, required=True, metavar="O", help="output tokens of each")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the prompts (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def offline(args: argparse.Namespace) -> int:
    """Random token prompts, greedy, to the full length, through ``LLM`` in this process."""
    configure_logging("console")
    started = time.perf_counter()
    with tidegate.LLM(
        args.model,
        dtype=args.dtype,
        device_kv_tokens=args.device_kv_tokens,
        host_kv_tokens=args.host_kv_tokens,
        preemption=args.preemption,
        max_num_seqs=args.max_num_seqs,
    ) as llm:
        load_s = time.perf_counter() - started
        prompts = _prompts(args, llm.info.vocab_size)
        # The first steps pay for things that a long run does not: not what is measured.
        llm.generate(prompts[:2], _greedy(WARM_UP_TOKENS), use_tqdm=False)
        before = llm.stats()
        started = time.perf_counter()
        outputs = llm.generate(prompts, _greedy(args.output_len))
        wall_s = time.perf_counter() - started
        after = llm.stats()
    output_tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    figures = {
        "config": _config(args),
        "load_s": load_s,
        "wall_s": wall_s,
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / wall_s,
        "total_tokens_per_s": (output_tokens + args.requests * args.input_len) / wall_s,
        "preemptions": {
            "swap": after.preemptions_swap - before.preemptions_swap,
            "recompute": after.preemptions_recompute - before.preemptions_recompute,
        },
        "swapped_bytes": {
            "out": after.swap_out_bytes - before.swap_out_bytes,
            "in": after.swap_in_bytes - before.swap_in_bytes,
        },
        "recomputed_tokens": after.recomputed_tokens - before.recomputed_tokens,
        "steps": after.steps - before.steps,
    }
    _report("bench offline", figures, args.json)
    return 0


def serve(args: argparse.Namespace) -> int:
    """The same work against a running server, all requests on one session."""
    return asyncio.run(_serve(args))


async def _serve(args: argparse.Namespace) -> int:
    async with AsyncClient(args.server, **connection.credentials(args)) as client:
        model = await client.model_info()
        prompts = _prompts(args, model.vocab_size)
        async with client.session() as session:
            await _measure(session, prompts[0], WARM_UP_TOKENS)
            started = time.perf_counter()
            runs = await _run_all(session, prompts, args)
            wall_s = time.perf_counter() - started
    done = [run for run in runs if run.error is None]
    errors: dict[str, int] = {}
    for run in runs:
        if run.error is not None:
            errors[run.error] = errors.get(run.error, 0) + 1
    output_tokens = sum(run.tokens for run in done)
    figures = {
        "config": _config(args) | {"model": model.model},
        "wall_s": wall_s,
        "completed": len(done),
        "errors": errors,
        "requests_per_s": len(done) / wall_s,
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / wall_s,
        "ttft_s": _percentiles(run.arrivals[0] - run.sent for run in done),
        "itl_s": _percentiles(gap for run in done for gap in run.gaps()),
        "tpot_s": _percentiles(
            (run.arrivals[-1] - run.arrivals[0]) / (run.tokens - 1) for run in done if run.tokens > 1
        ),
        "latency_s": _percentiles(run.arrivals[-1] - run.sent for run in done),
    }
    _report("bench serve", figures, args.json)
    return 0 if not errors else 1


@dataclass
class _Run:
    """One request: when it was sent and when tokens came, in seconds."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    def gaps(self) -> Iterable[float]:
        return (later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False))


async def _run_all(session: Session, prompts: list[list[int]], args: argparse.Namespace) -> list[_Run]:
    """Send each request when its time has come: when another has ended, or at a random moment."""
    limit = asyncio.Semaphore(args.concurrency if args.rate is None else len(prompts))

    async def run(prompt: list[int]) -> _Run:
        try:
            return await _measure(session, prompt, args.output_len)
        finally:
            limit.release()

    tasks = []
    async for prompt in _arriving(prompts, args):
        await limit.acquire()
        tasks.append(asyncio.create_task(run(prompt)))
    return await asyncio.gather(*tasks)


async def _arriving(prompts: list[list[int]], args: argparse.Namespace) -> AsyncIterator[list[int]]:
    rng = random.Random(args.seed)
    due = time.perf_counter()
    for prompt in prompts:
        if args.rate is not None:
            due += rng.expovariate(args.rate)
            await asyncio.sleep(due - time.perf_counter())
        yield prompt


async def _measure(session: Session, prompt: list[int], output_len: int) -> _Run:
    run = _Run(sent=time.perf_counter())
    try:
        stream = await session.start(prompt, max_tokens=output_len, temperature=0, ignore_eos=True)
        async for chunk in stream:
            if chunk.token_ids:
                run.arrivals.append(time.perf_counter())
                run.tokens += len(chunk.token_ids)
        if stream.finished is not None and run.tokens < output_len:
            run.error = stream.finished.reason
    except TidegateError as error:
        run.error = error.reason or error.code.name
    return run


def _prompts(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    rng = random.Random(args.seed)
    return [[rng.randrange(vocab_size) for _ in range(args.input_len)] for _ in range(args.requests)]


def _greedy(max_tokens: int) -> tidegate.SamplingParams:
    return tidegate.SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, without how to run and where to write."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "json", "prog")}


def _percentiles(samples: Iterable[float]) -> dict[str, float]:
    """Seconds; empty where nothing was measured."""
    values = sorted(samples)
    if not values:
        return {}
    # `quantiles` needs two points; one value is each of its own percentiles.
    cuts = statistics.quantiles(values if len(values) > 1 else values * 2, n=100, method="inclusive")
    return {"mean": statistics.fmean(values)} | {f"p{p}": cuts[p - 1] for p in PERCENTILES}


def _report(title: str, figures: dict[str, Any], path: Path | None) -> None:
    """Two tables: single figures, and times with their percentiles in milliseconds."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table(title=title, title_justify="left", show_header=False)
    times = Table("ms", *("mean", *(f"p{p}" for p in PERCENTILES)))
    for name, value in figures.items():
        if name in TIMES:
            times.add_row(name.removesuffix("_s"), *(f"{seconds * 1000:,.1f}" for seconds in value.values()))
        elif name != "config":
            table.add_row(name, _shown(value))
    _console.print(table)
    if times.rows:
        _console.print(times)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items()) or "none"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
