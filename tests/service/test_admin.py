"""What an operator does to a running server: drain, pause, flush, profile; and what ``Inspect`` shows."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from front import Front, refusal_of, until

from tidegate.engine.messages import Flush, Pause, Profile
from tidegate.service.admission import AdmissionLimits
from tidegate.service.security import SecurityConfig, load_security
from tidegate.v1 import admin_pb2, admin_pb2_grpc, control_pb2, inference_pb2

Start = Callable[..., Any]

ALICE, ADMIN = "alice-0123456789", "admin-0123456789"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def unary(max_tokens: int = 2, **fields: Any) -> inference_pb2.GenerateUnaryRequest:
    return inference_pb2.GenerateUnaryRequest(
        prompt={"text": "the tide"}, sampling={"max_tokens": max_tokens}, **fields
    )


@pytest.fixture
async def front(start_front: Start, tmp_path: Path) -> Front:
    started: Front = await start_front(admin_addresses=[f"unix:{tmp_path}/admin"])
    return started


@pytest.fixture
async def admin(front: Front) -> Any:
    async with grpc.aio.insecure_channel(front.server.listener.admin_addresses[0]) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


async def test_admin_is_served_on_an_address_of_its_own_alone(front: Front, admin: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin_pb2_grpc.AdminServiceStub(front.channel).Pause(admin_pb2.PauseRequest())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    await admin.Pause(admin_pb2.PauseRequest())


async def test_by_default_there_is_no_admin(start_front: Start) -> None:
    front = await start_front()
    assert front.server.listener.admin_addresses == []


async def test_where_callers_are_known_admin_needs_the_role(start_front: Start, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.touch(mode=0o600)
    path.write_text(f"{ALICE} alice\n{ADMIN} ops admin\n")
    front = await start_front(
        admin_addresses=[f"unix:{tmp_path}/admin"], security=load_security(SecurityConfig(auth_tokens=path))
    )
    async with grpc.aio.insecure_channel(front.server.listener.admin_addresses[0]) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        refusal = await refusal_of(stub.Pause(admin_pb2.PauseRequest()))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING")
        refusal = await refusal_of(stub.Pause(admin_pb2.PauseRequest(), metadata=bearer(ALICE)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
        assert front.engine.commands == []
        await stub.Pause(admin_pb2.PauseRequest(), metadata=bearer(ADMIN))
    assert front.engine.sent(Pause)


async def test_paused_nothing_is_computed_and_requests_wait(front: Front, admin: Any) -> None:
    await admin.Pause(admin_pb2.PauseRequest())
    calls = [front.inference.GenerateUnary(unary()) for _ in range(3)]
    await until(lambda: len(front.engine.waiting) == 3)
    assert not front.engine.running
    await admin.Resume(admin_pb2.ResumeRequest())
    for answer in await asyncio.gather(*calls):
        assert answer.finished.choices[0].output_tokens == 2


async def test_a_flush_says_what_it_freed(front: Front, admin: Any) -> None:
    """Both tiers, unless one is named."""
    freed = await admin.FlushCache(admin_pb2.FlushCacheRequest())
    assert (freed.device_blocks_freed, freed.host_blocks_freed) == (3, 5)
    freed = await admin.FlushCache(admin_pb2.FlushCacheRequest(device=False))
    assert (freed.device_blocks_freed, freed.host_blocks_freed) == (0, 5)
    assert front.engine.sent(Flush) == [Flush(True, True), Flush(False, True)]


async def test_flushes_side_by_side_each_get_their_answer(admin: Any) -> None:
    wanted = [(3, 5), (3, 0), (0, 5)]
    calls = [
        admin.FlushCache(admin_pb2.FlushCacheRequest(device=device > 0, host=host > 0))
        for device, host in wanted
    ]
    freed = await asyncio.gather(*calls)
    assert [(one.device_blocks_freed, one.host_blocks_freed) for one in freed] == wanted


async def test_a_profile_says_where_it_lies(front: Front, admin: Any) -> None:
    assert (await admin.Profile(admin_pb2.ProfileRequest(steps=7))).path == "/traces/7"
    assert front.engine.sent(Profile) == [Profile(7)]


@pytest.mark.parametrize("steps", [0, 1001])
async def test_a_profile_of_no_steps_or_too_many_is_refused(admin: Any, steps: int) -> None:
    refusal = await refusal_of(admin.Profile(admin_pb2.ProfileRequest(steps=steps)))
    assert list(refusal.violations) == ["steps"]


async def test_one_profile_at_a_time_also_when_who_asked_has_left(start_front: Start, tmp_path: Path) -> None:
    front = await start_front(admin_addresses=[f"unix:{tmp_path}/admin"], step_seconds=0.3)
    async with grpc.aio.insecure_channel(front.server.listener.admin_addresses[0]) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        first = stub.Profile(admin_pb2.ProfileRequest(steps=7))
        await until(lambda: front.engine.sent(Profile))
        first.cancel()
        refusal = await refusal_of(stub.Profile(admin_pb2.ProfileRequest(steps=8)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROFILE_RUNNING")


async def test_who_asks_an_engine_that_dies_is_told(start_front: Start, tmp_path: Path) -> None:
    front = await start_front(admin_addresses=[f"unix:{tmp_path}/admin"], step_seconds=3600)
    async with grpc.aio.insecure_channel(front.server.listener.admin_addresses[0]) as channel:
        call = admin_pb2_grpc.AdminServiceStub(channel).FlushCache(admin_pb2.FlushCacheRequest())
        await until(lambda: front.engine.sent(Flush))
        front.engine.kill()
        refusal = await refusal_of(call)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
    assert refusal.retry_seconds is not None


async def test_a_drain_is_asked_for_once_with_a_grace_that_a_clock_can_measure(
    front: Front, admin: Any
) -> None:
    for seconds in (-1, 10**6):
        refusal = await refusal_of(admin.Drain(admin_pb2.DrainRequest(grace={"seconds": seconds})))
        assert list(refusal.violations) == ["grace"]
    assert not front.server.drain_asked.done()
    await admin.Drain(admin_pb2.DrainRequest(grace={"seconds": 3}))
    await admin.Drain(admin_pb2.DrainRequest())
    assert front.server.drain_asked.result() == 3


# --- what a watcher sees ----------------------------------------------------------------------------------


async def test_inspect_shows_both_tiers_and_names_the_callers_own_requests_alone(
    start_front: Start, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.touch(mode=0o600)
    path.write_text(f"{ALICE} alice\n{ADMIN} ops admin\n")
    front = await start_front(security=load_security(SecurityConfig(auth_tokens=path)))
    front.engine.preempted = {0}
    calls = [
        front.inference.GenerateUnary(unary(request_id=f"of-{token}"), metadata=bearer(token))
        for token in (ALICE, ADMIN)
    ]
    await until(lambda: len(front.engine.running) == 2)
    seen = await front.control.Inspect(control_pb2.InspectRequest(), metadata=bearer(ALICE))
    assert (seen.device_slots[:3], len(seen.device_slots)) == (b"dd.", 64)
    assert (seen.host_slots[:3], len(seen.host_slots)) == (b"hh.", 128)
    named = [s.request_id for s in seen.sequences if s.HasField("request_id")]
    assert named == [f"of-{ALICE}"]
    assert len(seen.sequences) == 2
    assert {s.prompt_tokens for s in seen.sequences} == {len("the tide")}
    assert seen.load.device.total == 64
    request = control_pb2.InspectRequest(max_sequences=1)
    assert len((await front.control.Inspect(request, metadata=bearer(ALICE))).sequences) == 1
    front.engine.preempted = set()
    front.engine.go_on()
    await asyncio.gather(*calls)


async def test_server_info_tells_the_limits_that_are_set(start_front: Start) -> None:
    front = await start_front(admission=AdmissionLimits(max_waiting=9, tenant_tokens=500))
    info = await front.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (info.max_waiting, info.tenant_tokens) == (9, 500)
    assert not info.HasField("max_waiting_tokens")
    assert not info.HasField("tenant_requests")
