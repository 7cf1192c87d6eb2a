"""No room: queue, quotas, memory, as two clients see them."""

import asyncio
import itertools

import grpc
import pytest
from calls import CALLS, GENERATE, UNARY, Connect, Start, close_session, content, open_session, told
from front import until

from tidegate.service.admission import MEMORY_LIMIT, RETRY_SECONDS, AdmissionLimits
from tidegate.service.listener import MAX_MESSAGE_BYTES
from tidegate.service.session_limits import SessionLimits

BURST, ROOM = 500, 100
"""Streams at once, and how many of them may wait. ``tests/bench/streams.py`` opens ten thousand."""


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


async def test_of_many_streams_at_once_each_is_admitted_or_refused_with_a_reason(
    start_front: Start, connect: Connect
) -> None:
    """gRPC itself would cancel a part of them without a word."""
    arrivals: list[None] = []
    front = await start_front(
        admission=AdmissionLimits(max_waiting=ROOM), memory=lambda: arrivals.append(None) or 0.0
    )
    front.engine.admits = False
    client = connect(front)
    calls = [await client.call(GENERATE, content()) for _ in range(BURST)]
    await until(lambda: len(arrivals) == BURST)
    front.engine.admits = True
    front.engine.go_on()
    outcomes = [await call.outcome() for call in calls]
    refused = [outcome for outcome in outcomes if outcome.code != grpc.StatusCode.OK]
    assert len(refused) == BURST - ROOM
    assert {told(outcome) for outcome in refused} == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")}
    assert all(outcome.retry_ms and not outcome.had_headers for outcome in refused)
