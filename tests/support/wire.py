"""Clients in the words of the wire, which check what they are sent, and ways for them to fail."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc.aio
from front import read_error, read_status

from tidegate.v1 import events_pb2, inference_pb2, inference_pb2_grpc, session_pb2

ACK_TOKENS = 4000
"""Fewer than half of what a server keeps."""


@contextlib.asynccontextmanager
async def connect(address: str, **options: int) -> AsyncGenerator[grpc.aio.Channel]:
    """A connection of its own; ``options`` are gRPC's, without their prefix."""
    every = {"use_local_subchannel_pool": 1, **options}
    async with grpc.aio.insecure_channel(
        address, options=[(f"grpc.{name}", value) for name, value in every.items()]
    ) as channel:
        yield channel


@dataclass(eq=False)
class Seen:
    """One request, of one choice, as its client sees it. Whatever is done to it, what comes must add up."""

    id: str
    fate: str
    content: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    progress: list["events_pb2.ProgressKind.ValueType"] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    """Finish reasons, reasons of refusals, and codes of RPCs that gRPC itself ended."""
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def on_delta(self, delta: events_pb2.Delta) -> None:
        assert not self.ends, f"{self.id}: tokens behind the end"
        assert delta.offset == len(self.tokens), f"{self.id}: a gap, or tokens twice"
        self.tokens += delta.token_ids
        self._news.set()

    def on_progress(self, progress: events_pb2.Progress) -> None:
        assert not self.ends, f"{self.id}: progress behind the end"
        self.progress.append(progress.kind)
        self._news.set()

    def on_finished(self, finished: events_pb2.Finished) -> None:
        (end,) = finished.choices
        assert end.output_tokens == finished.usage.output_tokens == len(self.tokens), self.id
        self.on_end(events_pb2.FinishReason.Name(end.reason).removeprefix("FINISH_REASON_"))

    def on_end(self, end: str) -> None:
        self.ends.append(end)
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is true, or the request has ended."""
        while not holds() and not self.ends:
            self._news.clear()
            await self._news.wait()

    async def has_ended(self) -> None:
        await self.until(lambda: False)

    async def has_tokens(self, number: int) -> None:
        await self.until(lambda: len(self.tokens) >= number)


class Session:
    """One session and the requests on it."""

    def __init__(self, channel: grpc.aio.Channel, ack_tokens: int = ACK_TOKENS) -> None:
        self.call = inference_pb2_grpc.InferenceServiceStub(channel).Session()
        self.requests: dict[str, Seen] = {}
        self.rejections: list[str] = []
        self.was_told_to_go = False
        self._one_at_a_time = asyncio.Lock()
        self._is_done = False
        """The last command was sent."""
        self._ack_tokens = ack_tokens
        self._unacked: dict[str, int] = {}
        self._num_unacked = 0

    async def send(self, **command: Any) -> None:
        self._is_done = self._is_done or "close" in command
        async with self._one_at_a_time:
            await self.call.write(session_pb2.SessionRequest(**command))

    async def open(self) -> "asyncio.Task[None]":
        """The task reads until the stream ends, and raises where it does not end well."""
        await self.send(open={})
        return asyncio.create_task(self.read())

    async def start(self, request: Seen, **fields: Any) -> None:
        self.requests[request.id] = request
        await self.send(start={"request_id": request.id, **request.content, **fields})

    async def read(self) -> None:
        while isinstance(response := await self.call.read(), session_pb2.SessionResponse):
            await self._take(response)
        assert await self.call.code() == grpc.StatusCode.OK

    async def done_writing(self) -> None:
        """Close the client's half of the stream."""
        async with self._one_at_a_time:
            self._is_done = True
            await self.call.done_writing()

    async def _ack(self, batch: events_pb2.Batch) -> None:
        """What arrived is held. Said now and then, and not behind the last word: a write to a stream that
        the server has just ended would make gRPC forget how it ended.
        """
        for delta in batch.deltas:
            self._unacked[delta.request_id] = delta.offset + len(delta.token_ids)
        self._num_unacked += sum(len(delta.token_ids) for delta in batch.deltas)
        if self._num_unacked < self._ack_tokens or self._is_done:
            return
        acks = [{"ack": {"request_id": name, "upto": upto}} for name, upto in self._unacked.items()]
        self._unacked.clear()
        self._num_unacked = 0
        await self.send(commands={"commands": acks})

    async def _take(self, response: session_pb2.SessionResponse) -> None:
        match response.WhichOneof("event"):
            case "batch":
                for delta in response.batch.deltas:
                    self.requests[delta.request_id].on_delta(delta)
                await self._ack(response.batch)
            case "progress":
                self.requests[response.progress.request_id].on_progress(response.progress)
            case "finished":
                self.requests[response.finished.request_id].on_finished(response.finished)
            case "request_error":
                reason = read_status(response.request_error.status).reason
                self.requests[response.request_error.request_id].on_end(reason)
            case "command_rejected":
                self.rejections.append(read_status(response.command_rejected.status).reason)
            case "go_away":
                self.was_told_to_go = True
            case _:
                pass


async def generate(
    channel: grpc.aio.Channel, request: Seen, timeout: float | None = None, leave_at: int | None = None
) -> None:
    """``Generate`` to its end, or until the client has so many tokens and leaves."""
    message = inference_pb2.GenerateRequest(request_id=request.id, **request.content)
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(message, timeout=timeout)
    with _end_of_rpc(request):
        async for response in call:
            match response.WhichOneof("event"):
                case "batch":
                    for delta in response.batch.deltas:
                        request.on_delta(delta)
                case "progress":
                    request.on_progress(response.progress)
                case "finished":
                    request.on_finished(response.finished)
                case _:
                    pass
            if leave_at is not None and len(request.tokens) >= leave_at:
                call.cancel()


async def generate_unary(
    channel: grpc.aio.Channel, request: Seen, timeout: float | None = None, leave_after: float | None = None
) -> None:
    """``GenerateUnary`` to its end, or until the client leaves after so many seconds."""
    message = inference_pb2.GenerateUnaryRequest(request_id=request.id, **request.content)
    call = inference_pb2_grpc.InferenceServiceStub(channel).GenerateUnary(message, timeout=timeout)
    if leave_after is not None:
        asyncio.get_running_loop().call_later(leave_after, call.cancel)
    with _end_of_rpc(request):
        response = await call
        (completion,) = response.completions
        request.tokens += completion.token_ids
        request.on_finished(response.finished)


@contextlib.contextmanager
def _end_of_rpc(request: Seen) -> Iterator[None]:
    """How an RPC failed is the end of its request."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        trailers = error.trailing_metadata()
        by_server = trailers is not None and "grpc-status-details-bin" in trailers
        request.on_end(read_error(error).reason if by_server else error.code().name)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        request.on_end("CANCELLED")


class Cable:
    """A connection that can be cut, in the middle of a message, or die without a word."""

    def __init__(self, address: str, path: Path) -> None:
        self.address = f"unix:{path}"
        self.is_dead = False
        """Nothing passes any more, and neither end is told: a router forgot the connection."""
        self._path = path
        self._to = address.removeprefix("unix:")
        self._ends: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(self._join, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        self._listener.close()
        for end in self._ends:
            end.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._to)
        self._ends += [writer, server_writer]
        for pump in (self._pump(reader, server_writer), self._pump(server_reader, writer)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if not self.is_dead:
                    writer.write(data)
                    await writer.drain()
            if not self.is_dead:
                writer.close()


CLIENT = """
import asyncio, sys
from tidegate import AsyncClient

async def main(address, num_sessions, max_tokens, credit):
    async with AsyncClient(address) as client:
        async def one(number):
            async with client.session() as session:
                prompt = f"Tell me a story about number {number}. " * 4
                stream = await session.start(prompt, max_tokens=max_tokens, ignore_eos=True, credit=credit)
                async for chunk in stream:
                    print(number, flush=True)
        await asyncio.gather(*(one(number) for number in range(num_sessions)))

asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
"""


@dataclass
class ClientProcess:
    """A client in a process of its own, with one request in each of its sessions."""

    process: "subprocess.Popen[bytes]"

    async def has_tokens(self) -> None:
        """Wait until one of its requests has one."""
        assert self.process.stdout is not None
        assert await asyncio.to_thread(self.process.stdout.readline)


@contextlib.contextmanager
def client_process(
    address: str, num_sessions: int, max_tokens: int, credit: int = 256
) -> Iterator[ClientProcess]:
    """Killed at the end."""
    numbers = map(str, (num_sessions, max_tokens, credit))
    command = [sys.executable, "-P", "-c", CLIENT, address, *numbers]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield ClientProcess(process)
    finally:
        process.kill()
        process.communicate()
