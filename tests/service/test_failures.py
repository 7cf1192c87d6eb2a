"""The failure table, row by row, as two clients see it: grpcio and grpc-js. Code and details are asserted.

Rows that concern a device, or the engine's process, have their tests where those are.
"""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_engine import POISON
from front import Front, until
from wire_clients import (
    PROTOS,
    Call,
    GrpcioClient,
    NodeClient,
    NodeDriver,
    Outcome,
    WireClient,
    build_node_client,
)

from tidegate.service.admission import MEMORY_LIMIT, RETRY_SECONDS, AdmissionLimits
from tidegate.service.listener import MAX_MESSAGE_BYTES
from tidegate.service.security import SecurityConfig, load_security
from tidegate.service.session_limits import SessionLimits

Start = Callable[..., Any]
Connect = Callable[[Front], WireClient]

GENERATE, UNARY, SESSION = (f"InferenceService/{rpc}" for rpc in ("Generate", "GenerateUnary", "Session"))
CALLS = [GENERATE, UNARY]
TOKEN, ROUTER = "alice-0123456789", "router-0123456789"


@pytest.fixture(scope="session")
def node_folder() -> Path:
    if shutil.which("npm") is None:
        pytest.skip("needs Node with npm: install nodejs 18.3 or later")
    return build_node_client()


@pytest.fixture(scope="session")
def node_driver(node_folder: Path) -> Iterator[NodeDriver]:
    driver = NodeDriver(node_folder)
    yield driver
    driver.close()


@pytest.fixture(params=["grpcio", "grpc-js"])
async def connect(request: pytest.FixtureRequest) -> AsyncGenerator[Connect]:
    clients: list[WireClient] = []

    def made(front: Front) -> WireClient:
        address = front.server.addresses[0]
        if request.param == "grpcio":
            clients.append(GrpcioClient(address))
        else:
            clients.append(NodeClient(request.getfixturevalue("node_driver"), address))
        return clients[-1]

    yield made
    for client in clients:
        await client.close()


def content(text: str = "the tide", max_tokens: int = 2, **fields: Any) -> dict[str, Any]:
    return {"prompt": {"text": text}, "sampling": {"max_tokens": max_tokens}, **fields}


def told(outcome: Outcome) -> tuple[grpc.StatusCode, str]:
    return outcome.code, outcome.reason


async def open_session(client: WireClient, **options: Any) -> Call:
    session = await client.call(SESSION, **options)
    await session.write(open={})
    await session.until("opened")
    return session


async def close_session(session: Call) -> Outcome:
    await session.write(close={})
    outcome = await session.outcome()
    assert outcome.code == grpc.StatusCode.OK
    return outcome


# --- what works -------------------------------------------------------------------------------------------


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


# --- time -------------------------------------------------------------------------------------------------


async def test_at_the_deadline_what_there_is_is_delivered(start_front: Start, connect: Connect) -> None:
    front = await start_front(step_seconds=0.02)
    call = await connect(front).call(GENERATE, content(max_tokens=2000), timeout=3)
    outcome = await call.outcome()
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


# --- readers ----------------------------------------------------------------------------------------------


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


async def test_a_frozen_peer_is_noticed_by_ping(start_front: Start, node_folder: Path) -> None:
    """A half-open connection looks the same: nothing comes back. With nothing to write, the ping notices."""
    front = await start_front()
    driver = NodeDriver(node_folder)
    session = await NodeClient(driver, front.server.addresses[0]).call(SESSION)
    await session.write(open={})
    await session.until("opened")
    await session.write(start={"request_id": "r", **content(max_tokens=100), "credit": 1})
    await session.until("progress")
    os.kill(driver.process.pid, signal.SIGSTOP)
    async with asyncio.timeout(60):
        while front.engine.running:  # noqa: ASYNC110  there is no event for it
            await asyncio.sleep(0.1)
    driver.close()


# --- what is wrong with the request -----------------------------------------------------------------------


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


# --- room -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_waiting": 1}, "QUEUE_FULL"),
        ({"max_waiting_tokens": 1}, "QUEUE_FULL"),
        ({"tenant_requests": 1}, "TENANT_QUOTA"),
        ({"tenant_tokens": 15}, "TENANT_QUOTA"),
    ],
)
async def test_without_room_a_call_is_refused_before_headers(
    start_front: Start, connect: Connect, method: str, limits: dict[str, int], reason: str
) -> None:
    front = await start_front(admission=AdmissionLimits(**limits))
    client = connect(front)
    front.engine.admits = False
    first = await client.call(UNARY, content())
    await until(lambda: front.engine.waiting)
    outcome = await (await client.call(method, content())).outcome()
    assert told(outcome) == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
    assert outcome.retry_ms == RETRY_SECONDS[0] * 1000
    assert not outcome.had_headers
    if reason == "TENANT_QUOTA":
        (violation,) = outcome.details["QuotaFailure"]["violations"]
        assert violation["subject"] == "tenant:local"
    front.engine.admits = True
    front.engine.go_on()
    assert (await first.outcome()).code == grpc.StatusCode.OK


async def test_without_room_a_sessions_request_is_refused_and_the_session_goes_on(
    start_front: Start, connect: Connect
) -> None:
    front = await start_front(admission=AdmissionLimits(max_waiting=1))
    session = await open_session(connect(front))
    front.engine.admits = False
    await session.write(start={"request_id": "a", **content()})
    await until(lambda: front.engine.waiting)
    await session.write(start={"request_id": "b", **content()})
    error = await session.until("request_error")
    assert (error["request_id"], error["status"]["code"]) == (
        "b",
        grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
    )
    front.engine.admits = True
    front.engine.go_on()
    await session.until("finished")
    await close_session(session)


async def test_grpcs_own_retries_come_back_when_the_server_asked(
    start_front: Start, connect: Connect
) -> None:
    """Their own policy would try again within 10 ms."""
    arrivals: list[float] = []
    clock = asyncio.get_running_loop().time
    front = await start_front(
        admission=AdmissionLimits(max_waiting=1), memory=lambda: arrivals.append(clock()) or 0.0
    )
    client = connect(front)
    front.engine.admits = False
    first = await client.call(UNARY, content())
    await until(lambda: front.engine.waiting)
    arrivals.clear()
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
    outcome = await (await client.call(UNARY, content(), service_config=config)).outcome()
    assert told(outcome) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert len(arrivals) == 3
    pauses = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert all(pause >= RETRY_SECONDS[0] - 0.02 for pause in pauses)
    front.engine.admits = True
    front.engine.go_on()
    await first.outcome()


async def test_short_of_memory_new_calls_are_shed(start_front: Start, connect: Connect) -> None:
    front = await start_front(memory=lambda: MEMORY_LIMIT + 0.01)
    outcome = await (await connect(front).call(UNARY, content())).outcome()
    assert told(outcome) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_PRESSURE")
    assert outcome.retry_ms


async def test_a_full_session_takes_no_more(start_front: Start, connect: Connect) -> None:
    front = await start_front(limits=SessionLimits(MAX_MESSAGE_BYTES, requests_per_session=1))
    session = await open_session(connect(front))
    front.engine.admits = False
    await session.write(start={"request_id": "a", **content()})
    await session.write(start={"request_id": "b", **content()})
    error = await session.until("request_error")
    assert (error["request_id"], error["status"]["code"]) == (
        "b",
        grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
    )
    front.engine.admits = True
    front.engine.go_on()
    await session.until("finished")
    await close_session(session)


# --- who calls --------------------------------------------------------------------------------------------


@pytest.fixture
async def guarded(start_front: Start, tmp_path: Path) -> Front:
    """A front that asks for tokens."""
    path = tmp_path / "tokens"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN} alice\n{ROUTER} edge router\n")
    front: Front = await start_front(security=load_security(SecurityConfig(auth_tokens=path)))
    return front


@pytest.mark.parametrize("method", [*CALLS, SESSION, "ControlService/GetServerInfo"])
@pytest.mark.parametrize(
    ("metadata", "reason"),
    [({}, "CREDENTIALS_MISSING"), ({"authorization": "Bearer wrong-0123456789"}, "CREDENTIALS_INVALID")],
)
async def test_strangers_are_unauthenticated(
    guarded: Front, connect: Connect, method: str, metadata: dict[str, str], reason: str
) -> None:
    message = {GENERATE: content(), UNARY: content(), SESSION: None}.get(method, {})
    outcome = await (await connect(guarded).call(method, message, metadata=metadata)).outcome()
    assert told(outcome) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    assert outcome.retry_ms is None


async def test_another_tenants_requests_are_for_routers_alone(guarded: Front, connect: Connect) -> None:
    client = connect(guarded)
    abort = {"request_id": "r", "tenant": "bob"}
    denied = await client.call("ControlService/Abort", abort, metadata={"authorization": f"Bearer {TOKEN}"})
    assert told(await denied.outcome()) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_NOT_ALLOWED")
    allowed = await client.call("ControlService/Abort", abort, metadata={"authorization": f"Bearer {ROUTER}"})
    assert (await allowed.outcome()).code == grpc.StatusCode.OK


# --- faults of the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CALLS)
async def test_a_row_that_the_engine_cannot_compute_fails_alone(
    start_front: Start, connect: Connect, method: str
) -> None:
    front = await start_front()
    client = connect(front)
    poisoned = await (await client.call(method, content(f"x{POISON}"))).outcome()
    assert told(poisoned) == (grpc.StatusCode.INTERNAL, "NONFINITE_LOGITS")
    assert poisoned.retry_ms is None
    assert (await (await client.call(method, content())).outcome()).code == grpc.StatusCode.OK


@pytest.mark.parametrize("method", CALLS)
async def test_an_unexpected_fault_is_internal_and_quotes_nothing(
    start_front: Start, connect: Connect, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = await start_front()

    async def broken(text: str, add_special_tokens: bool = True) -> list[int]:
        raise RuntimeError(f"cannot read {text}")

    monkeypatch.setattr(front.text, "encode_async", broken)
    outcome = await (await connect(front).call(method, content())).outcome()
    assert told(outcome) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "the tide" not in str(outcome)


@pytest.mark.parametrize("method", CALLS)
async def test_a_draining_server_sends_elsewhere(start_front: Start, connect: Connect, method: str) -> None:
    front = await start_front(step_seconds=0.01)
    client = connect(front)
    running = await client.call(GENERATE, content(max_tokens=60))
    await until(lambda: front.engine.running)
    draining = asyncio.create_task(front.server.drain(30))
    await asyncio.sleep(0)
    outcome = await (await client.call(method, content())).outcome()
    assert told(outcome) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert outcome.retry_ms
    assert (await running.outcome()).messages[-1]["finished"]
    await draining


# --- the example ------------------------------------------------------------------------------------------


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
