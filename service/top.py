"""``tidegate top``: both tiers block by block, the sequences, and the link between the tiers, live."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidegate.service import connection
from tidegate.service.client import DEFAULT_TARGET, Client
from tidegate.v1 import control_pb2

PLAIN_WIDTH = 100
"""Columns where the output is no terminal."""
MAP_ROWS = 8
"""Of one tier's map: a larger tier shows several blocks as one cell."""
CALL_SECONDS = 5.0

STATES = {
    "d": ("dirty", "red"),
    "w": ("going out", "yellow"),
    "c": ("in both tiers", "green"),
    "l": ("coming in", "cyan"),
    "h": ("host only", "blue"),
    "r": ("reserved", "magenta"),
    "p": ("cached prefix", "white"),
    ".": ("free", "bright_black"),
}
"""Letters of ``InspectResponse``, in the order in which one is told from a tie."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "server", nargs="?", default=DEFAULT_TARGET, metavar="ADDRESS", help=connection.ADDRESS_HELP
    )
    connection.add_credentials_arguments(parser)
    parser.add_argument("--once", action="store_true", help="show it once, as plain text")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two looks (default: 1)"
    )
    parser.set_defaults(run=top)


def top(args: argparse.Namespace) -> int:
    """Until Ctrl-C; once where the output is no terminal. Raises ``TidegateError``."""
    with Client(args.server, **connection.credentials(args)) as client:
        if args.once or not sys.stdout.isatty():
            screen = render(client.inspect(timeout=CALL_SECONDS), None, 0.0, PLAIN_WIDTH)
            Console(width=PLAIN_WIDTH, color_system=None, highlight=False).print(screen)
            return 0
        console = Console()
        with Live(console=console, screen=True, auto_refresh=False) as live:
            before, before_at = None, 0.0
            while True:
                seen, now = client.inspect(timeout=CALL_SECONDS), time.monotonic()
                live.update(render(seen, before, now - before_at, console.width), refresh=True)
                before, before_at = seen, now
                time.sleep(args.interval)


def render(
    seen: control_pb2.InspectResponse,
    before: control_pb2.InspectResponse | None,
    seconds: float,
    width: int,
) -> RenderableType:
    """One screen. ``before`` was seen ``seconds`` earlier: rates are the difference; None: none are shown."""
    load, totals = seen.load, seen.totals
    rate = None if before is None or seconds <= 0 else (totals.output_tokens - before.totals.output_tokens)
    head = Text(
        f"running {load.running}  waiting {load.waiting}  stalled {load.stalled}  swapped {load.swapped}"
        f"  steps {totals.steps}"
        + ("" if rate is None else f"  tokens/s {rate / seconds:.0f}")
        + ("  DRAINING" if load.draining else "")
    )
    counts = Text(
        f"preemptions: {totals.preemptions_swap} by swap, {totals.preemptions_recompute} by recompute"
        f"   recomputed tokens: {totals.recomputed_tokens}   parked and dropped: {totals.parked_dropped}"
    )
    return Group(
        head,
        Text(),
        *_tier("device", seen.device_slots.decode(), width),
        *_tier("host", seen.host_slots.decode(), width),
        _legend(),
        Text(),
        _link("out", seen.swap_out, None if before is None else before.swap_out, seconds),
        _link("in", seen.swap_in, None if before is None else before.swap_in, seconds),
        counts,
        Text(),
        _sequences(seen),
    )


def _tier(name: str, slots: str, width: int) -> Iterator[Text]:
    """The tier's map, a letter for each cell, in the colour of its state."""
    per_cell = max(1, -(-len(slots) // (width * MAP_ROWS)))
    free = slots.count(".")
    share = 0.0 if not slots else 100 * (1 - free / len(slots))
    scale = "" if per_cell == 1 else f", {per_cell} to a cell"
    yield Text(f"{name} tier: {len(slots) - free} of {len(slots)} blocks in use ({share:.0f}%){scale}")
    cells = [_cell(slots[start : start + per_cell]) for start in range(0, len(slots), per_cell)]
    for start in range(0, len(cells), width):
        row = Text()
        for letter in cells[start : start + width]:
            row.append(letter, style=STATES[letter][1])
        yield row
    yield Text()


def _cell(slots: str) -> str:
    """The most frequent state; of equals, the one that stands first in ``STATES``."""
    counts = Counter(slots)
    return max(STATES, key=lambda letter: counts[letter])


def _legend() -> Text:
    legend = Text()
    for letter, (name, style) in STATES.items():
        legend.append(letter, style=style).append(f" {name}  ")
    return legend


def _link(direction: str, link: control_pb2.Link, before: control_pb2.Link | None, seconds: float) -> Text:
    text = f"link {direction:>3}: {_size(link.bytes)} so far, {_size(link.queue_bytes)} to go"
    text += f", busy {100 * link.utilization:.0f}%"
    if before is not None and seconds > 0:
        text += f", {_size((link.bytes - before.bytes) / seconds)}/s"
    return Text(text)


def _sequences(seen: control_pb2.InspectResponse) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("request", "choice", "status", "prompt", "output", "with KV", "device", "host", "age"):
        table.add_column(heading, justify="left" if heading in ("request", "status") else "right")
    for sequence in seen.sequences:
        length = max(1, sequence.prompt_tokens + sequence.output_tokens)
        table.add_row(
            # Plain text: an id may hold what rich would read as markup.
            Text(sequence.request_id if sequence.HasField("request_id") else "(another tenant's)"),
            str(sequence.choice),
            sequence.status,
            str(sequence.prompt_tokens),
            str(sequence.output_tokens),
            f"{100 * sequence.computed_tokens / length:.0f}%",
            str(sequence.device_blocks),
            str(sequence.host_blocks),
            f"{sequence.seconds:.1f} s",
        )
    return table


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
