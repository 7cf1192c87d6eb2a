"""A front on a Unix socket with a fake engine behind it, and the client's side of its RPCs."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_engine import FakeEngine, byte_text
from google.rpc import error_details_pb2, status_pb2

from tidegate.engine.client import EngineGone
from tidegate.engine.text import Text
from tidegate.service.admission import AdmissionLimits
from tidegate.service.compat.protocols import Compat
from tidegate.service.listener import open_listener
from tidegate.service.server import Server, start_server
from tidegate.v1 import control_pb2_grpc, inference_pb2_grpc, session_pb2

SECONDS = 30.0
"""No wait of a test takes longer, unless something hangs."""


@dataclass
class Front:
    """A running server, what stands behind it, and stubs to call it."""

    server: Server
    engine: FakeEngine
    text: Text
    channel: grpc.aio.Channel
    inference: Any
    control: Any


@asynccontextmanager
async def running_front(
    path: Path,
    *,
    step_seconds: float = 0.0,
    script: Callable[[list[int], int, int], str] | None = None,
    admission: AdmissionLimits | None = None,
    memory: Callable[[], float] = lambda: 0.0,
    restart: Callable[[EngineGone], Awaitable[None]] | None = None,
    compat: Compat | None = None,
    **options: Any,
) -> AsyncGenerator[Front]:
    """``options`` are those of ``open_listener``."""
    protocols = () if compat is None else compat.protocols
    listener = await open_listener(
        **{"addresses": [f"unix:{path / 'tidegate.sock'}"], "protocols": protocols, **options}
    )
    text = byte_text()
    engine = FakeEngine(text, step_seconds=step_seconds, script=script)
    server = await start_server(
        listener, engine, text, admission=admission, memory=memory, restart=restart, compat=compat
    )
    async with grpc.aio.insecure_channel(listener.addresses[0]) as channel:
        yield Front(
            server,
            engine,
            text,
            channel,
            inference_pb2_grpc.InferenceServiceStub(channel),
            control_pb2_grpc.ControlServiceStub(channel),
        )
    await server.stop()
    await engine.close()
    text.close()


@dataclass
class SessionClient:
    """The client's side of a session, in the words of the wire."""

    call: Any
    seen: list[session_pb2.SessionResponse] = field(default_factory=list)

    async def send(self, **command: Any) -> None:
        await self.call.write(session_pb2.SessionRequest(**command))

    async def next(self, *kinds: str) -> session_pb2.SessionResponse:
        """The next event of these kinds; the others before it are kept in ``seen``."""
        while True:
            response = await asyncio.wait_for(self.call.read(), SECONDS)
            assert response != grpc.aio.EOF, "the stream ended"
            self.seen.append(response)
            if response.WhichOneof("event") in kinds:
                return response

    async def rest(self) -> None:
        """Read to the end of the stream."""
        while (response := await asyncio.wait_for(self.call.read(), SECONDS)) != grpc.aio.EOF:
            self.seen.append(response)

    def text(self, request_id: str, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(request_id, choice))

    def deltas(self, request_id: str, choice: int = 0) -> list[Any]:
        return [
            delta
            for response in self.seen
            for delta in response.batch.deltas
            if (delta.request_id, delta.choice) == (request_id, choice)
        ]

    def ends(self, request_id: str) -> list[str]:
        """The terminal events of a request."""
        kinds = ("finished", "request_error")
        return [
            kind
            for response in self.seen
            for kind in kinds
            if response.WhichOneof("event") == kind and getattr(response, kind).request_id == request_id
        ]

    def progress(self, request_id: str) -> list[int]:
        return [r.progress.kind for r in self.seen if r.progress.request_id == request_id]


async def open_session(front: Front) -> SessionClient:
    session = SessionClient(front.inference.Session())
    await session.send(open={})
    await session.next("opened")
    return session


@dataclass
class Refusal:
    """A status with its details taken apart."""

    code: grpc.StatusCode
    reason: str
    message: str
    violations: dict[str, str]
    quota: dict[str, str]
    retry_seconds: float | None
    trailers: dict[str, Any]


def read_status(status: status_pb2.Status) -> Refusal:
    """Checks on the way that each kind of detail is there at most once, and ErrorInfo exactly once."""
    names = [detail.TypeName() for detail in status.details]
    assert names.count("google.rpc.ErrorInfo") == 1
    assert len(set(names)) == len(names)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    bad, quota = error_details_pb2.BadRequest(), error_details_pb2.QuotaFailure()
    retry_seconds = None
    for detail in status.details:
        if detail.Unpack(retry):
            retry_seconds = retry.retry_delay.ToTimedelta().total_seconds()
        assert any(detail.Is(kind.DESCRIPTOR) for kind in (info, retry, bad, quota))
        for kind in (info, bad, quota):
            detail.Unpack(kind)
    assert info.domain == "tidegate"
    return Refusal(
        next(code for code in grpc.StatusCode if code.value[0] == status.code),
        info.reason,
        status.message,
        {violation.field: violation.description for violation in bad.field_violations},
        {violation.subject: violation.description for violation in quota.violations},
        retry_seconds,
        {},
    )


def read_error(error: grpc.aio.AioRpcError) -> Refusal:
    trailers = dict(iter(error.trailing_metadata()))
    refusal = read_status(status_pb2.Status.FromString(trailers["grpc-status-details-bin"]))
    assert refusal.code == error.code()
    refusal.trailers = trailers
    return refusal


async def refusal_of(call: Any) -> Refusal:
    """The refusal with which an RPC ends, streaming or not."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _read_all(call)
    return read_error(caught.value)


async def _read_all(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110  what a test waits for has no event
            await asyncio.sleep(0.005)
