"""What a client sees of admission: refusals before headers, quotas, and when to come back."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest
from front import Front, open_session, read_status, refusal_of, until

from tidegate.service.admission import MEMORY_LIMIT, RETRY_SECONDS, AdmissionLimits
from tidegate.v1 import inference_pb2, inference_pb2_grpc

Start = Callable[..., Any]

CLOCK_TOLERANCE = 0.02
"""gRPC counts in milliseconds and on a clock of its own."""


def unary(max_tokens: int = 1, **fields: Any) -> inference_pb2.GenerateUnaryRequest:
    return inference_pb2.GenerateUnaryRequest(
        prompt={"text": "the tide"}, sampling={"max_tokens": max_tokens}, **fields
    )


def stream(max_tokens: int = 1, **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt={"text": "the tide"}, sampling={"max_tokens": max_tokens}, **fields
    )


class Arrivals:
    """When requests asked to come in. Given to a front as its memory gauge, which each of them reads."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> float:
        self.times.append(time.monotonic())
        return 0.0

    @property
    def pauses(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


def retrying_channel(front: Front, attempts: int) -> grpc.aio.Channel:
    """With gRPC's own retry policy, which would try again within 10 ms."""
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED", "UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
    options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(front.server.addresses[0], options=options)


@pytest.mark.parametrize("method", ["Generate", "GenerateUnary"])
async def test_grpcs_own_retries_wait_as_long_as_the_server_asked(start_front: Start, method: str) -> None:
    arrivals = Arrivals()
    front = await start_front(admission=AdmissionLimits(max_waiting=1), memory=arrivals)
    front.engine.admits = False
    waiting = front.inference.GenerateUnary(unary())
    await until(lambda: front.engine.waiting)
    arrivals.times.clear()
    async with retrying_channel(front, attempts=3) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(stream()) if method == "Generate" else stub.GenerateUnary(unary())
        refusal = await refusal_of(call)
    assert refusal.reason == "QUEUE_FULL"
    assert refusal.retry_seconds == RETRY_SECONDS[0]
    assert len(arrivals.times) == 3
    assert all(pause >= RETRY_SECONDS[0] - CLOCK_TOLERANCE for pause in arrivals.pauses)
    front.engine.admits = True
    front.engine.go_on()
    await waiting


async def test_a_retry_that_finds_room_is_served(start_front: Start) -> None:
    arrivals = Arrivals()
    front = await start_front(admission=AdmissionLimits(max_waiting=1), memory=arrivals)
    front.engine.admits = False
    waiting = front.inference.GenerateUnary(unary())
    await until(lambda: front.engine.waiting)
    arrivals.times.clear()
    async with retrying_channel(front, attempts=5) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateUnary(unary())
        answer = asyncio.ensure_future(call)
        await until(lambda: arrivals.times)
        front.engine.admits = True
        front.engine.go_on()
        assert (await answer).finished.choices[0].output_tokens == 1
    assert len(arrivals.times) >= 2
    assert arrivals.pauses[0] >= RETRY_SECONDS[0] - CLOCK_TOLERANCE
    await waiting


async def test_where_a_retry_is_pointless_gRPC_does_not_try(start_front: Start) -> None:
    arrivals = Arrivals()
    front = await start_front(admission=AdmissionLimits(tenant_tokens=20), memory=arrivals)
    async with retrying_channel(front, attempts=5) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateUnary(unary(max_tokens=100))
        refusal = await refusal_of(call)
    assert (refusal.reason, refusal.retry_seconds) == ("TENANT_QUOTA", None)
    assert refusal.trailers["grpc-retry-pushback-ms"] == "-1"
    assert len(arrivals.times) == 1


async def test_a_quota_refuses_one_tenants_requests_before_headers(start_front: Start) -> None:
    front = await start_front(admission=AdmissionLimits(tenant_requests=1))
    front.engine.admits = False
    waiting = front.inference.GenerateUnary(unary())
    await until(lambda: front.engine.waiting)
    call = front.inference.Generate(stream())
    refusal = await refusal_of(call)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_QUOTA")
    assert refusal.quota == {"tenant:local": "1 requests under way at once"}
    assert int(refusal.trailers["grpc-retry-pushback-ms"]) == round((refusal.retry_seconds or 0) * 1000) > 0
    assert not await call.initial_metadata()
    front.engine.admits = True
    front.engine.go_on()
    await waiting
    await front.inference.GenerateUnary(unary())


async def test_inside_a_session_a_refusal_is_an_error_of_its_request(start_front: Start) -> None:
    front = await start_front(admission=AdmissionLimits(tenant_tokens=20, tenant_requests=2))
    session = await open_session(front)

    async def start(request_id: str, max_tokens: int, **fields: Any) -> None:
        sampling = {"max_tokens": max_tokens}
        await session.send(
            start={"request_id": request_id, "prompt": {"text": "x"}, "sampling": sampling, **fields}
        )

    await start("too-much", max_tokens=100)
    error = read_status((await session.next("request_error")).request_error.status)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_QUOTA")
    front.engine.admits = False
    for request_id in ("a", "b"):
        await start(request_id, max_tokens=2)
    await until(lambda: len(front.engine.waiting) == 2)
    await start("third", max_tokens=2)
    error = read_status((await session.next("request_error")).request_error.status)
    assert (error.reason, error.retry_seconds) == ("TENANT_QUOTA", RETRY_SECONDS[0])
    front.engine.admits = True
    front.engine.go_on()
    await session.send(close={})
    await session.rest()
    assert session.ends("a") == session.ends("b") == ["finished"]


async def test_no_prefill_for_who_cannot_make_it(start_front: Start) -> None:
    """One request took 0.3 s to get in; ten of them stand before one that has a second."""
    front = await start_front()
    front.engine.admits = False
    calls = [front.inference.GenerateUnary(unary())]
    await until(lambda: front.engine.waiting)
    await asyncio.sleep(0.3)
    front.engine.admits = True
    front.engine.go_on()
    await calls[0]
    front.engine.admits = False
    calls += [front.inference.GenerateUnary(unary()) for _ in range(10)]
    await until(lambda: len(front.engine.waiting) == 10)
    commands = len(front.engine.commands)
    refusal = await refusal_of(front.inference.Generate(stream(time_limit={"seconds": 1})))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WAIT_TOO_LONG")
    assert refusal.retry_seconds is not None
    assert len(front.engine.commands) == commands
    front.engine.admits = True
    front.engine.go_on()
    await asyncio.gather(*calls)


async def test_short_of_memory_the_server_sheds_what_is_new_and_keeps_what_runs(start_front: Start) -> None:
    in_use = [0.0]
    front = await start_front(memory=lambda: in_use[0], step_seconds=0.005)
    running = front.inference.Generate(stream(max_tokens=20))
    await until(lambda: front.engine.running)
    in_use[0] = MEMORY_LIMIT + 0.01
    refusal = await refusal_of(front.inference.GenerateUnary(unary()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_PRESSURE")
    assert refusal.retry_seconds is not None
    assert [r.WhichOneof("event") async for r in running][-1] == "finished"
    in_use[0] = 0.0
    await front.inference.GenerateUnary(unary())
