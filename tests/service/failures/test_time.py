"""Deadlines, cancels, slow readers and peers that are gone, as two clients see them."""

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest
from calls import CALLS, GENERATE, SESSION, UNARY, Connect, Start, content, open_session, told
from front import until
from wire import Cable
from wire_clients import NodeClient

from tidegate.service import listener
from tidegate.service.listener import GRPC_OPTIONS, KEEPALIVE_MS, MAX_MESSAGE_BYTES, PING_TIMEOUT_MS
from tidegate.service.session_limits import SessionLimits


async def test_at_the_deadline_what_there_is_is_delivered(
    start_front: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It ends after 3 s: a slow machine, too, delivers that in the rest. All the tokens would take 40 s.
    monkeypatch.setattr("tidegate.service.call.DEADLINE_MARGIN", 27.0)
    front = await start_front(step_seconds=0.02)
    client = connect(front)
    await (await client.call(UNARY, content())).outcome()  # connecting would count
    running = await client.call(GENERATE, content(max_tokens=2000), timeout=30)
    outcome = await running.outcome()
    assert outcome.code == grpc.StatusCode.OK
    assert outcome.messages[-1]["finished"]["choices"][0]["reason"] == "FINISH_REASON_DEADLINE"


@pytest.mark.parametrize("method", CALLS)
async def test_a_time_limit_in_the_queue_means_that_nothing_ran(
    start_front: Start, connect: Connect, method: str
) -> None:
    front = await start_front()
    front.engine.admits = False
    call = await connect(front).call(method, content(time_limit={"nanos": 50_000_000}))
    outcome = await call.outcome()
    assert told(outcome) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_LIMIT")


async def test_a_queue_that_outlasts_the_time_limit_is_not_entered(
    start_front: Start, connect: Connect
) -> None:
    front = await start_front()
    client = connect(front)
    front.engine.admits = False
    waiting = [await client.call(UNARY, content())]
    await until(lambda: front.engine.waiting)
    await asyncio.sleep(0.3)
    front.engine.admits = True
    front.engine.go_on()
    await waiting[0].outcome()
    front.engine.admits = False
    waiting = [await client.call(UNARY, content()) for _ in range(10)]
    await until(lambda: len(front.engine.waiting) == 10)
    outcome = await (await client.call(GENERATE, content(time_limit={"seconds": 1}))).outcome()
    assert told(outcome) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WAIT_TOO_LONG")
    assert outcome.retry_ms
    front.engine.admits = True
    front.engine.go_on()
    for call in waiting:
        await call.outcome()


async def test_a_session_that_is_not_opened_in_time_ends(start_front: Start, connect: Connect) -> None:
    front = await start_front(limits=SessionLimits(MAX_MESSAGE_BYTES, open_timeout=0.1))
    outcome = await (await connect(front).call(SESSION)).outcome()
    assert told(outcome) == (grpc.StatusCode.DEADLINE_EXCEEDED, "OPEN_TIMEOUT")


async def test_a_reader_that_takes_nothing_loses_its_stream(start_front: Start, connect: Connect) -> None:
    front = await start_front(limits=SessionLimits(MAX_MESSAGE_BYTES, stall_limit=0.5))
    request = content(max_tokens=2000)
    request["sampling"] |= {"logprobs": 20, "n": 8}
    client = connect(front)
    call = await client.call(GENERATE, request, is_paused=True)
    await until(lambda: front.engine.running)
    if isinstance(client, NodeClient):
        # It would take sixteen messages unread, each of a megabyte.
        os.kill(client.driver.process.pid, signal.SIGSTOP)
    try:
        await until(lambda: not front.engine.running)
    finally:
        if isinstance(client, NodeClient):
            os.kill(client.driver.process.pid, signal.SIGCONT)
    outcome = await call.outcome()
    assert told(outcome) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_TOO_SLOW")


@pytest.mark.parametrize("method", [UNARY, SESSION])
async def test_a_half_open_connection_is_noticed_and_its_request_freed(
    start_front: Start, connect: Connect, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is to be written, and nobody says goodbye: the ping alone notices. It is sent sooner here."""
    assert KEEPALIVE_MS + PING_TIMEOUT_MS <= 15_000
    # The answer still has time, on a machine that stalls.
    sooner_ms = {KEEPALIVE_MS: 500, PING_TIMEOUT_MS: 2000}
    sooner = {name: sooner_ms[value] for name, value in GRPC_OPTIONS if value in sooner_ms}
    monkeypatch.setattr(listener, "GRPC_OPTIONS", tuple({**dict(GRPC_OPTIONS), **sooner}.items()))
    front = await start_front(limits=SessionLimits(MAX_MESSAGE_BYTES, resume_timeout=0.1))
    front.engine.admits = False
    async with Cable(front.server.addresses[0], tmp_path / "cable") as cable:
        client = connect(cable.address)
        if method == SESSION:
            call = await open_session(client)
            await call.write(start={"request_id": "r", **content()})
        else:
            call = await client.call(method, content())
        await until(lambda: front.engine.waiting)
        cable.is_dead = True
        await until(lambda: not front.engine.waiting)
        await call.cancel()
