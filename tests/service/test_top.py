"""``tidegate top``: what it draws of a server's two tiers, and how it ends."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from front import until
from rich.console import Console

from tidegate.service.top import render
from tidegate.v1 import control_pb2, inference_pb2

Start = Callable[..., Any]


def shown(
    seen: control_pb2.InspectResponse, before: Any = None, seconds: float = 0.0, width: int = 60
) -> str:
    console = Console(width=120, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(render(seen, before, seconds, width))
    text: str = captured.get()
    return text


def response(**fields: Any) -> control_pb2.InspectResponse:
    return control_pb2.InspectResponse(**{"device_slots": b"dcc.", "host_slots": b"cch.", **fields})


def test_each_block_of_a_small_tier_is_a_cell() -> None:
    lines = [line.rstrip() for line in shown(response()).splitlines()]
    assert lines[lines.index("device tier: 3 of 4 blocks in use (75%)") + 1] == "dcc."
    assert lines[lines.index("host tier: 3 of 4 blocks in use (75%)") + 1] == "cch."


def test_a_large_tier_is_shown_by_the_most_frequent_state_of_each_cell() -> None:
    """Ten blocks a cell, in eight rows at the most."""
    slots = (b"d" * 10 + b"." * 6 + b"c" * 4) * 240
    lines = [line.rstrip() for line in shown(response(device_slots=slots)).splitlines()]
    start = lines.index("device tier: 3360 of 4800 blocks in use (70%), 10 to a cell")
    rows = lines[start + 1 : start + 9]
    assert rows == ["d." * 30] * 8
    assert lines[start + 9] == ""


def test_rates_are_the_difference_between_two_looks() -> None:
    before = response(totals={"output_tokens": 100}, swap_out={"bytes": 1_000_000})
    now = response(totals={"output_tokens": 400}, swap_out={"bytes": 4_000_000, "utilization": 0.5})
    text = shown(now, before, seconds=2.0)
    assert "tokens/s 150" in text
    assert "link out: 4.0 MB so far, 0 B to go, busy 50%, 1.5 MB/s" in text
    assert "tokens/s" not in shown(now)


def test_sequences_are_listed_with_progress_and_place_and_others_without_a_name() -> None:
    mine = {
        "request_id": "[bold]r1",
        "status": "parked",
        "prompt_tokens": 30,
        "output_tokens": 10,
        "computed_tokens": 20,
        "device_blocks": 2,
        "host_blocks": 5,
        "seconds": 3.25,
    }
    text = shown(response(sequences=[mine, {"status": "running"}]))
    (row,) = [line for line in text.splitlines() if "r1" in line]
    assert row.split() == ["[bold]r1", "0", "parked", "30", "10", "50%", "2", "5", "3.2", "s"]
    assert "(another tenant's)" in text


def test_every_state_of_a_block_is_explained() -> None:
    text = shown(response(device_slots=b"rdwclhp."))
    for name in ("reserved", "dirty", "going out", "in both tiers", "coming in", "host only", "cached"):
        assert name in text


@pytest.mark.parametrize("flags", [[], ["--once"]])
async def test_where_the_output_is_no_terminal_it_is_shown_once(start_front: Start, flags: list[str]) -> None:
    front = await start_front()
    front.engine.preempted = {0}
    call = front.inference.GenerateUnary(
        inference_pb2.GenerateUnaryRequest(
            request_id="mine", prompt={"text": "the tide"}, sampling={"max_tokens": 2}
        )
    )
    await until(lambda: front.engine.running)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tidegate.service.cli", "top", front.server.addresses[0], *flags),
        stdout=subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert b"mine" in out
    assert b"device tier: 1 of 64 blocks in use" in out
    assert b"\x1b[" not in out
    front.engine.preempted = set()
    front.engine.go_on()
    await call
