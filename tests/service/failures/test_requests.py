"""Requests as two clients make them: what works, and what is wrong with the others."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from calls import CALLS, GENERATE, SESSION, UNARY, Connect, Start, close_session, content, open_session, told
from front import until
from wire_clients import PROTOS


async def test_a_stream_brings_its_tokens(start_front: Start, connect: Connect) -> None:
    front = await start_front()
    outcome = await (await connect(front).call(GENERATE, content(max_tokens=20))).outcome()
    assert outcome.code == grpc.StatusCode.OK
    deltas = [delta for message in outcome.messages for delta in message.get("batch", {}).get("deltas", [])]
    assert "".join(delta.get("text", "") for delta in deltas) == front.engine.expected("the tide", 20)
    assert outcome.messages[-1]["finished"]["choices"][0]["reason"] == "FINISH_REASON_MAX_TOKENS"


async def test_a_session_runs_requests_side_by_side(start_front: Start, connect: Connect) -> None:
    front = await start_front()
    session = await open_session(connect(front))
    texts = {"a": "the tide", "b": "the ebb"}
    for request_id, text in texts.items():
        await session.write(start={"request_id": request_id, **content(text, max_tokens=12), "credit": 4})
        # Beyond what it has credit for; absolute, so it matters not when it arrives.
        await session.write(credit={"request_id": request_id, "upto": 12})
    outcome = await close_session(session)
    for request_id, text in texts.items():
        deltas = [
            delta
            for message in outcome.messages
            for delta in message.get("batch", {}).get("deltas", [])
            if delta["request_id"] == request_id
        ]
        assert "".join(delta.get("text", "") for delta in deltas) == front.engine.expected(text, 12)


async def test_a_cancelled_call_frees_its_request(start_front: Start, connect: Connect) -> None:
    front = await start_front(step_seconds=0.005)
    call = await connect(front).call(GENERATE, content(max_tokens=2000))
    await call.until("batch")
    await call.cancel()
    assert (await call.outcome()).code == grpc.StatusCode.CANCELLED
    await until(lambda: not front.engine.running)


async def test_a_request_cancelled_in_a_session_ends_finished(start_front: Start, connect: Connect) -> None:
    front = await start_front(step_seconds=0.005)
    session = await open_session(connect(front))
    await session.write(start={"request_id": "r", **content(max_tokens=2000), "credit": 2000})
    await session.until("batch")
    await session.write(cancel={"request_id": "r"})
    finished = await session.until("finished")
    assert finished["choices"][0]["reason"] == "FINISH_REASON_CANCELLED"
    await close_session(session)


async def test_the_typescript_example_streams_an_answer(start_front: Start, node_folder: Path) -> None:
    front = await start_front()
    process = await asyncio.create_subprocess_exec(
        "node",
        node_folder / "build" / "generate.js",
        front.server.addresses[0],
        "the tide",
        *PROTOS,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out.decode()) == (0, front.engine.expected("the tide", 32) + "\n")


@pytest.mark.parametrize("method", CALLS)
async def test_all_that_is_wrong_is_told_at_once(start_front: Start, connect: Connect, method: str) -> None:
    front = await start_front()
    request = content(generated_token_ids=[10**6], time_limit={"seconds": -1})
    request["sampling"] |= {"temperature": -1, "top_p": 7, "stop_token_ids": [10**6]}
    outcome = await (await connect(front).call(method, request)).outcome()
    assert told(outcome) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert {
        "sampling.temperature",
        "sampling.top_p",
        "sampling.stop_token_ids[0]",
        "generated_token_ids[0]",
        "time_limit",
    } <= set(outcome.violations)
    assert outcome.retry_ms is None
    assert not outcome.had_headers


@pytest.mark.parametrize("method", CALLS)
async def test_what_can_never_fit_is_refused_before_it_waits(
    start_front: Start, connect: Connect, method: str
) -> None:
    front = await start_front()
    outcome = await (await connect(front).call(method, content(max_tokens=10**6))).outcome()
    assert told(outcome) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert outcome.violations == ["sampling.max_tokens"]
    assert front.engine.commands == []


@pytest.mark.parametrize("method", [*CALLS, SESSION])
@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    start_front: Start, connect: Connect, method: str, garbage: bytes
) -> None:
    """Broken framing, and text that is no UTF-8."""
    front = await start_front()
    call = await connect(front).call(method, None if method == SESSION else garbage)
    if method == SESSION:
        await call.write_bytes(garbage)
    outcome = await call.outcome()
    assert told(outcome) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE_MESSAGE")


@pytest.mark.parametrize("method", CALLS)
async def test_another_model_is_not_found(start_front: Start, connect: Connect, method: str) -> None:
    front = await start_front()
    outcome = await (await connect(front).call(method, content(model="another"))).outcome()
    assert told(outcome) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert outcome.details["ErrorInfo"]["metadata"] == {"model": "fake"}


async def test_an_id_under_way_exists_already(start_front: Start, connect: Connect) -> None:
    front = await start_front()
    client = connect(front)
    front.engine.admits = False
    first = await client.call(UNARY, content(request_id="same"))
    await until(lambda: front.engine.waiting)
    outcome = await (await client.call(UNARY, content("another", request_id="same"))).outcome()
    assert told(outcome) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    front.engine.admits = True
    front.engine.go_on()
    await first.outcome()


@pytest.mark.parametrize(("command", "reason"), [({"open": {}}, "ALREADY_OPEN"), ({}, "UNKNOWN_COMMAND")])
async def test_what_breaks_the_protocol_ends_a_session(
    start_front: Start, connect: Connect, command: dict[str, Any], reason: str
) -> None:
    front = await start_front()
    session = await open_session(connect(front))
    await session.write(**command)
    assert told(await session.outcome()) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_a_session_takes_no_request_behind_its_close(start_front: Start, connect: Connect) -> None:
    front = await start_front()
    front.engine.admits = False
    session = await open_session(connect(front))
    await session.write(start={"request_id": "a", **content()})
    await session.write(close={})
    await session.write(start={"request_id": "b", **content()})
    assert told(await session.outcome()) == (grpc.StatusCode.INVALID_ARGUMENT, "SESSION_CLOSED")


async def test_a_session_that_begins_with_something_else_ends(start_front: Start, connect: Connect) -> None:
    front = await start_front()
    session = await connect(front).call(SESSION)
    await session.write(start={"request_id": "r", **content()})
    assert told(await session.outcome()) == (grpc.StatusCode.INVALID_ARGUMENT, "OPEN_EXPECTED")


async def test_a_session_that_is_not_here_is_lost(start_front: Start, connect: Connect) -> None:
    front = await start_front()
    session = await connect(front).call(SESSION)
    await session.write(open={"resume_token": "of another server"})
    assert told(await session.outcome()) == (grpc.StatusCode.NOT_FOUND, "SESSION_LOST")
