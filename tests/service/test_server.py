"""The server around the RPCs: bytes, faults, health, drain, addresses, the engine's end."""

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from front import Front, open_session, read_status, refusal_of, running_front, until
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tidegate.engine import text_stream
from tidegate.engine.client import EngineGone
from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.text import Text
from tidegate.service.config import ServerConfig
from tidegate.service.listener import open_listener
from tidegate.v1 import control_pb2, inference_pb2, session_pb2

Start = Callable[..., Any]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt={"text": "the tide"}, **fields)


def raw(front: Front, kind: str, method: str) -> Any:
    """A call of any method with bytes of our choice."""
    call = getattr(front.channel, kind)
    return call(f"/tidegate.v1.{method}", request_serializer=bytes, response_deserializer=bytes)


async def health_of(front: Front, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(front.channel)
    status: int = (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
    return status


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("unary_unary", "InferenceService/GenerateUnary"),
        ("unary_unary", "InferenceService/Tokenize"),
        ("unary_unary", "ControlService/Abort"),
        ("unary_stream", "InferenceService/Generate"),
    ],
)
async def test_undecodable_bytes_are_an_invalid_argument(
    front: Front, kind: str, method: str, garbage: bytes
) -> None:
    """Broken framing, and text that is no UTF-8."""
    refusal = await refusal_of(raw(front, kind, method)(garbage))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE_MESSAGE")


async def test_undecodable_bytes_in_a_session_end_it(front: Front) -> None:
    async def messages() -> Any:
        yield b"\xff\xff"

    refusal = await refusal_of(raw(front, "stream_stream", "InferenceService/Session")(messages()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNDECODABLE_MESSAGE")


@pytest.mark.parametrize("rpc", ["Generate", "Tokenize"])
async def test_an_unexpected_fault_is_internal_and_leaks_nothing(
    front: Front, rpc: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(text: str, add_special_tokens: bool = True) -> list[int]:
        raise RuntimeError(f"cannot read {text}")

    monkeypatch.setattr(front.text, "encode_async", broken)
    message = {"Generate": request(), "Tokenize": inference_pb2.TokenizeRequest(prompt={"text": "the tide"})}
    refusal = await refusal_of(getattr(front.inference, rpc)(message[rpc]))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    captured = capsys.readouterr()
    assert "the tide" not in refusal.message + captured.out + captured.err
    assert "RuntimeError" in captured.out + captured.err
    assert await health_of(front) == SERVING


async def test_a_fault_in_one_requests_output_leaves_the_others(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    detokenizer = text_stream.detokenizer
    made: list[Any] = []

    def broken_once(text: Text, skip_special_tokens: bool) -> Any:
        made.append(detokenizer(text, skip_special_tokens))
        if len(made) == 1:
            monkeypatch.setattr(made[0], "push", lambda token_id: 1 / 0)
        return made[-1]

    monkeypatch.setattr(text_stream, "detokenizer", broken_once)
    session = await open_session(front)
    for request_id in ("broken", "whole"):
        start = {"request_id": request_id, "prompt": {"text": "x"}, "sampling": {"max_tokens": 5}}
        await session.send(start=start)
        # Prompts are read in threads: the second must not overtake the first.
        await until(lambda: len(made) >= 1)
    await session.send(close={})
    await session.rest()
    assert session.ends("broken") == ["request_error"]
    assert session.ends("whole") == ["finished"]
    await until(lambda: not front.engine.running)


async def test_health_is_told_by_service_and_for_the_whole(front: Front) -> None:
    for service in ("", "tidegate.v1.InferenceService", "tidegate.v1.ControlService"):
        assert await health_of(front, service) == SERVING
    refusal = await refusal_of(
        health_pb2_grpc.HealthStub(front.channel).Check(health_pb2.HealthCheckRequest(service="other"))
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "SERVICE_UNKNOWN")


async def test_watchers_of_health_hear_of_the_end_also_when_one_of_them_left(front: Front) -> None:
    stub = health_pb2_grpc.HealthStub(front.channel)
    leaves, stays = (stub.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(2))
    assert (await leaves.read()).status == (await stays.read()).status == SERVING
    leaves.cancel()
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(front.server.drain(1))
    assert (await asyncio.wait_for(stays.read(), 30)).status == NOT_SERVING
    stays.cancel()
    await draining


async def test_reflection_is_off_unless_asked_for(start_front: Start) -> None:
    async def services(front: Front) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(front.channel)
        call = stub.ServerReflectionInfo()
        try:
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await call.done_writing()
            response = await call.read()
        except grpc.aio.AioRpcError as error:
            return {error.code().name}
        finally:
            call.cancel()
        return {service.name for service in response.list_services_response.service}

    front = await start_front()
    assert await services(front) == {"UNIMPLEMENTED"}
    await front.server.stop()
    front = await start_front(reflection_on=True)
    assert await services(front) >= {"tidegate.v1.InferenceService", "grpc.health.v1.Health"}


async def test_drain_finishes_what_runs_and_refuses_what_is_new(start_front: Start) -> None:
    front = await start_front(step_seconds=0.01)
    session = await open_session(front)
    await session.send(
        start={"request_id": "r", "prompt": {"text": "x"}, "sampling": {"max_tokens": 40}, "credit": 40}
    )
    stream = front.inference.Generate(request(sampling={"max_tokens": 40}))
    await until(lambda: len(front.engine.running) == 2)
    draining = asyncio.create_task(front.server.drain(10))
    assert (await session.next("go_away")).go_away.grace.seconds == 10
    assert await health_of(front) == NOT_SERVING
    info = await front.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert info.draining

    refusal = await refusal_of(front.inference.Generate(request()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refusal.retry_seconds is not None
    await session.send(start={"request_id": "late", "prompt": {"text": "x"}})
    error = (await session.next("request_error")).request_error
    assert (error.request_id, read_status(error.status).reason) == ("late", "DRAINING")
    late = front.inference.Session()
    await late.write(session_pb2.SessionRequest(open={}))
    assert (await refusal_of(late)).reason == "DRAINING"

    assert [r.WhichOneof("event") async for r in stream][-1] == "finished"
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await session.rest()
    assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
    assert session.ends("r") == ["finished"]
    await draining


async def test_a_drain_does_not_wait_for_who_gives_no_credit(start_front: Start) -> None:
    """Such a request cannot finish here: another server goes on with it. One that can is waited for."""
    front = await start_front(step_seconds=0.05)
    session = await open_session(front)
    for request_id, credit in (("stuck", 1), ("runs", 100)):
        await session.send(
            start={
                "request_id": request_id,
                "prompt": {"text": "x"},
                "sampling": {"max_tokens": 100},
                "credit": credit,
            }
        )
    await until(lambda: len(front.engine.running) == 2)
    began = asyncio.get_running_loop().time()
    await front.server.drain(600)
    assert asyncio.get_running_loop().time() - began < 300
    with pytest.raises(grpc.aio.AioRpcError):
        await session.rest()
    assert (session.ends("stuck"), session.ends("runs")) == (["request_error"], ["finished"])
    errors = [r.request_error for r in session.seen if r.HasField("request_error")]
    assert [read_status(error.status).reason for error in errors] == ["DRAINING"]


async def test_what_does_not_finish_within_the_grace_ends_unavailable(start_front: Start) -> None:
    front = await start_front()
    session = await open_session(front)
    await session.send(
        start={"request_id": "r", "prompt": {"text": "x"}, "sampling": {"max_tokens": 40}, "credit": 1}
    )
    await session.next("progress")
    await front.server.drain(0.05)
    with pytest.raises(grpc.aio.AioRpcError):
        await session.rest()
    assert session.ends("r") == ["request_error"]
    assert read_status(session.seen[-1].request_error.status).reason == "DRAINING"


async def test_when_the_engine_is_gone_every_request_is_told(front: Front) -> None:
    front.engine.admits = False
    session = await open_session(front)
    await session.send(start={"request_id": "r", "prompt": {"text": "x"}})
    stream = front.inference.Generate(request())
    await until(lambda: len(front.engine.waiting) == 2)
    front.engine.kill()
    refusal = await refusal_of(stream)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
    assert refusal.retry_seconds is not None
    error = (await session.next("request_error")).request_error
    assert read_status(error.status).reason == "ENGINE_RESTARTING"
    assert (await refusal_of(front.inference.Generate(request()))).reason == "ENGINE_RESTARTING"
    with pytest.raises(EngineGone):
        await front.server.engine_ended


async def test_control_tells_of_server_model_and_load(front: Front) -> None:
    info = await front.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert info.version
    assert info.max_waiting == 20_000
    assert info.session_limits.default_credit == 256
    model = await front.control.GetModelInfo(control_pb2.GetModelInfoRequest())
    assert (model.model, model.vocab_size) == ("fake", front.engine.info.vocab_size)
    assert model.has_chat_template
    watch = front.control.WatchLoad(control_pb2.WatchLoadRequest(min_interval=Duration(nanos=10**7)))
    first = await watch.read()
    assert first.totals.steps == 0
    await front.inference.GenerateUnary(
        inference_pb2.GenerateUnaryRequest(prompt={"text": "x"}, sampling={"max_tokens": 3})
    )
    later = await asyncio.wait_for(watch.read(), 30)
    assert later.totals.steps > 0
    assert later.load.device.total == 64
    watch.cancel()
    refusal = await refusal_of(
        front.control.WatchLoad(control_pb2.WatchLoadRequest(min_interval=Duration(nanos=1)))
    )
    assert list(refusal.violations) == ["min_interval"]
    refusal = await refusal_of(front.control.Abort(control_pb2.AbortRequest(request_id="r", tenant="other")))
    assert refusal.code == grpc.StatusCode.PERMISSION_DENIED


async def test_a_unix_socket_is_for_owner_and_group_and_for_one_server(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.sock"
    async with running_front(tmp_path) as front:
        assert stat.S_IMODE(path.stat().st_mode) == 0o770
        with pytest.raises(ConfigError, match="another server listens there"):
            async with running_front(tmp_path):
                pass
        assert await health_of(front) == SERVING
    assert not path.exists()


async def test_a_socket_that_a_killed_server_left_behind_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(tmp_path / "tidegate.sock"))
    async with running_front(tmp_path) as front:
        assert await health_of(front) == SERVING


async def test_a_file_in_the_way_of_a_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "tidegate.sock").write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        async with running_front(tmp_path):
            pass
    assert (tmp_path / "tidegate.sock").read_text() == "precious"


async def test_tcp_tells_the_port_and_does_not_share_it() -> None:
    first = await open_listener(["127.0.0.1:0"])
    (address,) = first.addresses
    assert int(address.rpartition(":")[2]) > 0
    with pytest.raises(ConfigError, match="in use"):
        await open_listener([address])
    await first.close()


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.1.2.3:1", "example.org:1"])
def test_an_address_that_strangers_reach_needs_insecure(address: str) -> None:
    engine = EngineConfig(model="demo")
    with pytest.raises(ConfigError, match="--insecure"):
        ServerConfig(engine=engine, addresses=(address,))
    assert ServerConfig(engine=engine, addresses=(address,), insecure=True)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/x.sock"])
def test_a_local_address_is_fine(address: str) -> None:
    assert ServerConfig(engine=EngineConfig(model="demo"), addresses=(address,))


@pytest.mark.parametrize("address", ["", "50051", "unix:", ":50051", "127.0.0.1:", "127.0.0.1:99999"])
def test_an_address_that_cannot_be_read_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        ServerConfig(engine=EngineConfig(model="demo"), addresses=(address,), insecure=True)
