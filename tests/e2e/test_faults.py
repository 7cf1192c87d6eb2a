"""What real processes do to each other: signals, deaths and clients that stop reading, all under load."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable

import grpc.aio
import psutil
from front import refusal_of
from served import Load, Served, Totals, is_empty, load_when
from wire import Seen, Session, client_process, connect, generate, generate_unary

from tidegate.v1 import inference_pb2, inference_pb2_grpc

PATIENCE = 100.0
"""Seconds. However busy the machine is, what takes longer hangs."""
TIERS = ("demo", "--block-size", "16", "--device-kv-tokens", "4096", "--host-kv-tokens", "8192")

Serve = Callable[..., Served]


def story(name: str, max_tokens: int, **sampling: object) -> Seen:
    """A request of a length that is known."""
    sampling = {"max_tokens": max_tokens, "ignore_eos": True, **sampling}
    return Seen(name, "", {"prompt": {"text": f"Tell me a story about {name}."}, "sampling": sampling})


@contextlib.asynccontextmanager
async def load_on(
    channel: grpc.aio.Channel, max_tokens: int
) -> AsyncGenerator[tuple[list[Session], list[Seen], "asyncio.Future[list[object]]"]]:
    """Requests through every door, each with a first token; and the future of their streams' ends."""
    sessions = [Session(channel) for _ in range(20)]
    readings = [await session.open() for session in sessions]
    requests = []
    for index, session in enumerate(sessions):
        for name in (f"cat {index}", f"dog {index}"):
            requests.append(story(name, max_tokens))
            await session.start(requests[-1], credit=max_tokens)
    singles = [story(f"kite {index}", max_tokens) for index in range(5)]
    unaries = [story(f"baker {index}", max_tokens) for index in range(5)]
    readings += [asyncio.create_task(generate(channel, request)) for request in singles]
    readings += [asyncio.create_task(generate_unary(channel, request)) for request in unaries]
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(request.has_tokens(1) for request in [*requests, *singles]))
        yield sessions, [*requests, *singles, *unaries], asyncio.gather(*readings, return_exceptions=True)


async def test_sigterm_under_load_cuts_no_stream(serve: Serve) -> None:
    """What runs is finished, sessions are told, what is new is refused, and the exit status is 0."""
    server = serve(*TIERS)
    async with connect(server.address) as channel, load_on(channel, 150) as (sessions, requests, ends):
        assert not all(request.ends for request in requests)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.wait_for_log, "draining")
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        late = inference_pb2.GenerateRequest(**story("late", 1).content)
        refusal = await refusal_of(stub.Generate(late))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refusal.retry_seconds
        await ends
    assert [request.ends for request in requests] == [["MAX_TOKENS"]] * len(requests)
    assert [len(request.tokens) for request in requests] == [150] * len(requests)
    assert all(session.was_told_to_go for session in sessions)
    assert await asyncio.to_thread(server.process.wait, PATIENCE) == 0
    assert server.faults == []


async def test_sigkill_of_the_engine_without_recovery_ends_every_stream_and_the_server(serve: Serve) -> None:
    server = serve(*TIERS, "--max-restarts", "0")
    async with connect(server.address) as channel, load_on(channel, 900) as (sessions, requests, ends):
        os.kill(server.engine_pid, signal.SIGKILL)
        errors = await ends
    assert [request.ends for request in requests] == [["ENGINE_RESTARTING"]] * len(requests)
    for error in errors[: len(sessions)]:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert await asyncio.to_thread(server.process.wait, PATIENCE) == 1
    assert server.wait_for_log("the engine has ended")["exit_code"] == -signal.SIGKILL


async def test_sigkill_of_the_server_takes_the_engine_along(serve: Serve) -> None:
    server = serve(*TIERS)
    async with connect(server.address) as channel, load_on(channel, 900) as (_, requests, ends):
        engine = psutil.Process(server.engine_pid)
        server.process.kill()
        await ends
        await asyncio.to_thread(engine.wait, PATIENCE)
    # Nobody was left to give a reason; past the first lost stream gRPC has codes of its own.
    assert all(len(request.ends) <= 1 for request in requests)


async def test_a_frozen_client_holds_nobody_up_and_is_forgotten(serve: Serve) -> None:
    """It neither reads nor answers; others go on, and in some seconds its requests are gone."""
    server = serve(*TIERS)
    async with connect(server.address) as channel:
        # With little credit, so that what it does not read fits into the socket's buffer. Where that is
        # full, gRPC notices nothing, and it takes the stall limit: see the tests of the service.
        with client_process(server.address, 4, 1900, credit=16) as frozen:
            await frozen.has_tokens()
            frozen.process.send_signal(signal.SIGSTOP)
            stopped = time.perf_counter()
            request = story("cat", 100)
            await asyncio.wait_for(generate(channel, request), PATIENCE)
            assert request.ends == ["MAX_TOKENS"]
            await load_when(channel, is_empty)
            print(f"forgotten {time.perf_counter() - stopped:.1f} s after it was stopped")
    assert server.faults == []


async def test_a_frozen_client_does_not_keep_the_server_from_stopping(serve: Serve) -> None:
    """Even where gRPC itself never gets done, since it cannot write to it."""
    server = serve(*TIERS, "--drain-grace", "0.5")
    async with connect(server.address) as channel:
        with client_process(server.address, 10, 1900) as frozen:
            await frozen.has_tokens()
            frozen.process.send_signal(signal.SIGSTOP)
            # All have used up their credit, and nobody has read it.
            await load_when(channel, lambda load, _: load.swapped == 10)
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.process.wait, PATIENCE) == 0


async def test_a_client_that_never_reads_stalls_its_own_request_alone(serve: Serve) -> None:
    """Its KV leaves the device, others go on, the server's memory stays; reading brings all of it."""
    server = serve(*TIERS)
    front = psutil.Process(server.process.pid)
    # A small window, so that the stall does not take the megabytes that gRPC's client would take in.
    async with (
        connect(server.address) as channel,
        connect(server.address, **{"http2.bdp_probe": 0, "http2.lookahead_bytes": 4096}) as lazy,
    ):
        await generate(channel, story("warm-up", 50))
        before = front.memory_info().rss
        wordy = story("lantern", 1900, logprobs=20)
        message = inference_pb2.GenerateRequest(request_id=wordy.id, **wordy.content)
        call = inference_pb2_grpc.InferenceServiceStub(lazy).Generate(message)
        await call.initial_metadata()
        await load_when(channel, is_parked, PATIENCE)
        request = story("cat", 100)
        await generate(channel, request)
        assert request.ends == ["MAX_TOKENS"]
        assert front.memory_info().rss - before < 50 * 2**20
        async for response in call:
            for delta in response.batch.deltas:
                wordy.on_delta(delta)
            if response.HasField("finished"):
                wordy.on_finished(response.finished)
        assert wordy.ends == ["MAX_TOKENS"]
        await load_when(channel, is_empty)
    assert server.faults == []


def is_parked(load: Load, totals: Totals) -> bool:
    """Whether the only request has left the device."""
    return load.swapped == 1 and load.running == 0 and totals.swap_out_bytes > 0
