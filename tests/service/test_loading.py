"""A server that listens and has no model yet: what it says to probes, to clients, and to strangers."""

import asyncio
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_engine import FakeEngine, byte_text
from front import SECONDS, refusal_of
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.compat.kserve import grpc_service_pb2, grpc_service_pb2_grpc
from tidegate.service.client import AsyncClient, Unavailable
from tidegate.service.listener import LOADING_SECONDS, Listener, open_listener
from tidegate.service.security import SecurityConfig, load_security
from tidegate.service.server import Server, start_server
from tidegate.v1 import admin_pb2, admin_pb2_grpc, control_pb2, control_pb2_grpc, inference_pb2
from tidegate.v1.inference_pb2_grpc import InferenceServiceStub

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST: dict[str, Any] = {"prompt": {"text": "the tide"}, "sampling": {"max_tokens": 3}}


@pytest.fixture
async def listener(tmp_path: Path) -> AsyncGenerator[Listener]:
    opened = await open_listener(
        [f"unix:{tmp_path}/socket"],
        health_addresses=[f"unix:{tmp_path}/health"],
        admin_addresses=[f"unix:{tmp_path}/admin"],
        metrics_address="127.0.0.1:0",
        protocols=["kserve"],
    )
    yield opened
    await opened.close()


@asynccontextmanager
async def loaded(listener: Listener) -> AsyncGenerator[Server]:
    """The model has come."""
    text = byte_text()
    engine = FakeEngine(text)
    server = await start_server(listener, engine, text, memory=lambda: 0.0)
    yield server
    await server.stop()
    await engine.close()
    text.close()


def raw(channel: grpc.aio.Channel, method: str) -> Any:
    """A call whose message nobody reads."""
    return channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)(b"")


@pytest.mark.parametrize("port", ["addresses", "health_addresses"])
async def test_probes_hear_that_it_lives_and_is_not_ready_and_watchers_when_it_is(
    listener: Listener, port: str
) -> None:
    (address,) = getattr(listener, port)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = {
            service: (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
            for service in ("", "liveness", "tidegate.v1.InferenceService", "inference.GRPCInferenceService")
        }
        assert answers == {
            "": NOT_SERVING,
            "liveness": SERVING,
            "tidegate.v1.InferenceService": NOT_SERVING,
            "inference.GRPCInferenceService": NOT_SERVING,
        }
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == NOT_SERVING
        async with loaded(listener):
            assert (await asyncio.wait_for(watch.read(), SECONDS)).status == SERVING
            watch.cancel()


async def test_every_kind_of_rpc_is_refused_and_served_once_the_model_is_there(listener: Listener) -> None:
    async with (
        grpc.aio.insecure_channel(listener.addresses[0]) as channel,
        grpc.aio.insecure_channel(listener.admin_addresses[0]) as admin_channel,
    ):
        inference, control = InferenceServiceStub(channel), control_pb2_grpc.ControlServiceStub(channel)
        kserve = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        admin = admin_pb2_grpc.AdminServiceStub(admin_channel)
        calls = (
            inference.Generate(inference_pb2.GenerateRequest(**REQUEST)),
            inference.GenerateUnary(inference_pb2.GenerateUnaryRequest(**REQUEST)),
            inference.Session(),
            control.GetServerInfo(control_pb2.GetServerInfoRequest()),
            control.WatchLoad(control_pb2.WatchLoadRequest()),
            kserve.ServerReady(grpc_service_pb2.ServerReadyRequest()),
            admin.Pause(admin_pb2.PauseRequest()),
        )
        for call in calls:
            refusal = await refusal_of(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
            assert refusal.retry_seconds == LOADING_SECONDS
            assert refusal.trailers["grpc-retry-pushback-ms"] == str(round(LOADING_SECONDS * 1000))
            assert not await call.initial_metadata()
        async with loaded(listener):
            answer = await inference.GenerateUnary(inference_pb2.GenerateUnaryRequest(**REQUEST))
            assert len(answer.completions[0].token_ids) == 3
            await control.GetServerInfo(control_pb2.GetServerInfoRequest())
            await admin.Pause(admin_pb2.PauseRequest())


async def test_what_there_will_never_be_is_unimplemented_at_once(listener: Listener) -> None:
    """A gateway asks so which of many protocols a server speaks."""

    async def code(method: str) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(channel, method)
        return caught.value.code()

    async with grpc.aio.insecure_channel(listener.addresses[0]) as channel:
        assert await code("/vllm.grpc.engine.VllmEngine/HealthCheck") == grpc.StatusCode.UNIMPLEMENTED
        assert await code("/tidegate.v1.AdminService/Pause") == grpc.StatusCode.UNIMPLEMENTED
        assert await code("/nothing") == grpc.StatusCode.UNIMPLEMENTED
        assert await code("/a/b/c") == grpc.StatusCode.UNIMPLEMENTED
        assert await code("/tidegate.v1.ControlService/Nothing") == grpc.StatusCode.UNIMPLEMENTED
        async with loaded(listener):
            assert await code("/tidegate.v1.ControlService/Nothing") == grpc.StatusCode.UNIMPLEMENTED


async def test_names_that_a_stranger_makes_up_are_not_kept(listener: Listener) -> None:
    async with grpc.aio.insecure_channel(listener.addresses[0]) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await raw(channel, "/tidegate.v1.InferenceService/MadeUp")
        await refusal_of(raw(channel, "/tidegate.v1.InferenceService/GenerateUnary"))
    await refused(listener, "GenerateUnary")
    assert "MadeUp" not in await scrape(listener)


async def test_a_stranger_is_not_told_that_it_loads(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text("alice-0123456789 alice\n")
    security = load_security(SecurityConfig(auth_tokens=tokens))
    listener = await open_listener([f"unix:{tmp_path}/socket"], security=security)
    async with grpc.aio.insecure_channel(listener.addresses[0]) as channel:
        method = "/tidegate.v1.ControlService/GetServerInfo"
        assert (await refusal_of(raw(channel, method))).reason == "CREDENTIALS_MISSING"
        call = channel.unary_unary(method)(
            empty_pb2.Empty().SerializeToString(), metadata=[("authorization", "Bearer alice-0123456789")]
        )
        assert (await refusal_of(call)).reason == "MODEL_LOADING"
    await listener.close()


async def test_our_client_waits_for_the_model(listener: Listener) -> None:
    async with AsyncClient(listener.addresses[0], retries=0) as client:
        with pytest.raises(Unavailable) as caught:
            await client.generate_unary("the tide", max_tokens=3)
        assert (caught.value.reason, caught.value.retry_after) == ("MODEL_LOADING", LOADING_SECONDS)
    async with AsyncClient(listener.addresses[0], retries=20) as client:

        async def in_a_session() -> str:
            async with client.session() as session:
                stream = await session.start("the tide", max_tokens=3)
                return await stream.text()

        answer = asyncio.create_task(client.generate_unary("the tide", max_tokens=3))
        text = asyncio.create_task(in_a_session())
        await refused(listener, "GenerateUnary")
        await refused(listener, "Session")
        async with loaded(listener):
            assert (await answer).text == await text != ""


async def test_generated_stubs_wait_for_the_model_by_the_examples_configuration(listener: Listener) -> None:
    """gRPC itself tries again, when our trailer says."""
    service_config = (ROOT / "protos" / "examples" / "service_config.json").read_text()
    options = [("grpc.service_config", service_config)]
    async with grpc.aio.insecure_channel(listener.addresses[0], options=options) as channel:
        call = InferenceServiceStub(channel).GenerateUnary(inference_pb2.GenerateUnaryRequest(**REQUEST))
        answer = asyncio.ensure_future(call)
        await refused(listener, "GenerateUnary")
        async with loaded(listener):
            assert (await answer).finished.usage.output_tokens == 3


async def test_metrics_can_be_scraped_before_there_is_anything_to_tell(listener: Listener) -> None:
    assert "tidegate_engine_steps" not in await scrape(listener)
    async with loaded(listener):
        assert "tidegate_engine_steps_total" in await scrape(listener)


async def refused(listener: Listener, rpc: str) -> None:
    """Wait until one was."""
    counted = f'{{code="UNAVAILABLE",method="/tidegate.v1.InferenceService/{rpc}"}}'
    async with asyncio.timeout(SECONDS):
        while counted not in await scrape(listener):  # noqa: ASYNC110  a count is no event
            await asyncio.sleep(0.05)


async def scrape(listener: Listener) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://{listener.metrics_address}/metrics") as response:
            text: str = response.read().decode()
        return text

    return await asyncio.to_thread(read)
