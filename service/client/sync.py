"""The blocking client: the asyncio one, on an event loop in a thread of its own."""

import asyncio
import atexit
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import cache
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from tidegate.service.client.aio import DEFAULT_TARGET, AsyncClient
from tidegate.service.client.messages import (
    Admitted,
    Chunk,
    Event,
    Finished,
    Options,
    PositionLogprobs,
    Progress,
    PromptInput,
    Response,
)
from tidegate.service.client.session import Session
from tidegate.service.client.session_stream import SessionStream
from tidegate.service.client.stream import Stream
from tidegate.v1 import control_pb2, session_pb2

T = TypeVar("T")


SETTLE_SECONDS = 2.0


class _Loop:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tidegate-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the coroutine; an exception here (Ctrl-C) cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self.run(_settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()


async def _settle() -> None:
    """Let gRPC finish with calls that were cancelled: it has tasks of its own, and asyncio tells on them."""
    if own := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(own, timeout=SETTLE_SECONDS)


@cache
def _shared_loop() -> _Loop:
    """One for all clients, until the interpreter ends: gRPC still calls into a loop that was closed."""
    loop = _Loop()
    atexit.register(loop.close)
    return loop


class BlockingStream:
    """One request's output: iterate over it for its chunks, once. See ``Stream``."""

    def __init__(self, loop: _Loop, stream: Stream) -> None:
        self._loop = loop
        self._stream = stream

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self._loop.run(_next_or_none(self._stream))
        if chunk is None:
            raise StopIteration
        return chunk

    def events(self) -> Iterator[Event]:
        """Everything that happens, in order, instead of the chunks alone."""
        events = self._stream.events()
        while True:
            event = self._loop.run(_next_or_none(events))
            if event is None:
                return
            yield event

    def text(self) -> str:
        """Read to the end; the text of the first choice from here on."""
        return self._loop.run(self._stream.text())

    def cancel(self) -> None:
        """Stop the request now; does nothing once it ended."""
        self._loop.run(self._stream.aclose())

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    @property
    def admitted(self) -> Admitted | None:
        return self._stream.admitted

    @property
    def finished(self) -> Finished | None:
        return self._stream.finished

    @property
    def prompt_logprobs(self) -> list[PositionLogprobs]:
        return self._stream.prompt_logprobs

    @property
    def progress(self) -> list[Progress]:
        return self._stream.progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class BlockingSessionStream(BlockingStream):
    """One request of a session. See ``SessionStream``."""

    def __init__(self, loop: _Loop, stream: SessionStream) -> None:
        super().__init__(loop, stream)
        self.session_stream = stream

    def grant(self, upto: int) -> None:
        """Let each choice generate up to output offset ``upto``."""

        async def grant() -> None:
            self.session_stream.grant(upto)

        self._loop.run(grant())


class BlockingSession:
    """Many requests on one stream. See ``Session``."""

    def __init__(self, loop: _Loop, session: Session) -> None:
        self._loop = loop
        self._session = session

    @property
    def opened(self) -> session_pb2.Opened:
        return self._session.opened

    def start(
        self,
        prompt: PromptInput,
        *,
        timeout: float | None = None,
        credit: int | None = None,
        auto_credit: bool = True,
        lease: float | None = None,
        **options: Unpack[Options],
    ) -> BlockingSessionStream:
        """Start a request; as ``Session.start``."""
        starting = self._session.start(
            prompt, timeout=timeout, credit=credit, auto_credit=auto_credit, lease=lease, **options
        )
        return BlockingSessionStream(self._loop, self._loop.run(starting))

    def append(
        self,
        parent: str | BlockingSessionStream,
        prompt: PromptInput,
        *,
        choice: int = 0,
        timeout: float | None = None,
        credit: int | None = None,
        auto_credit: bool = True,
        lease: float | None = None,
        **options: Unpack[Options],
    ) -> BlockingSessionStream:
        """Continue a finished, leased request; as ``Session.append``."""
        starting = self._session.append(
            _id_of(parent),
            prompt,
            choice=choice,
            timeout=timeout,
            credit=credit,
            auto_credit=auto_credit,
            lease=lease,
            **options,
        )
        return BlockingSessionStream(self._loop, self._loop.run(starting))

    def fork(
        self,
        parent: str | BlockingSessionStream,
        prompt: PromptInput | None = None,
        *,
        choice: int = 0,
        at_offset: int | None = None,
        timeout: float | None = None,
        credit: int | None = None,
        auto_credit: bool = True,
        lease: float | None = None,
        **options: Unpack[Options],
    ) -> BlockingSessionStream:
        """Branch a request that runs or was leased; as ``Session.fork``."""
        starting = self._session.fork(
            _id_of(parent),
            prompt,
            choice=choice,
            at_offset=at_offset,
            timeout=timeout,
            credit=credit,
            auto_credit=auto_credit,
            lease=lease,
            **options,
        )
        return BlockingSessionStream(self._loop, self._loop.run(starting))

    def update(
        self,
        stream: BlockingSessionStream,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Change a running request; as ``Session.update``."""

        async def update() -> None:
            self._session.update(
                stream.session_stream, max_tokens=max_tokens, stop=stop, stop_token_ids=stop_token_ids
            )

        self._loop.run(update())

    def __enter__(self) -> Self:
        self._loop.run(self._session.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.run(self._session.aclose())


class Client:
    """A client of one Tidegate server, that blocks; the calls are those of ``AsyncClient``.

    with Client("127.0.0.1:50051") as client:
        for chunk in client.generate("Once upon a time", max_tokens=64):
            print(chunk, end="", flush=True)
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        retries: int = 3,
    ) -> None:
        """``target``: ``host:port`` or ``unix:/path``; the arguments are those of ``AsyncClient``."""

        async def connect() -> AsyncClient:  # in the loop that uses it
            client = AsyncClient(target, credentials=credentials, token=token, retries=retries)
            return await self._stack.enter_async_context(client)

        self._loop = _shared_loop()
        self._stack = AsyncExitStack()
        self._client = self._loop.run(connect())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; what still runs on it is cancelled."""
        self._loop.run(self._stack.aclose())

    def generate(
        self, prompt: PromptInput, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> BlockingStream:
        return BlockingStream(self._loop, self._client.generate(prompt, timeout=timeout, **options))

    def generate_unary(
        self, prompt: PromptInput, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Response:
        return self._loop.run(self._client.generate_unary(prompt, timeout=timeout, **options))

    def session(self) -> BlockingSession:
        return BlockingSession(self._loop, self._client.session())

    def tokenize(self, prompt: PromptInput, *, timeout: float | None = None) -> list[int]:
        return self._loop.run(self._client.tokenize(prompt, timeout=timeout))

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        return self._loop.run(
            self._client.detokenize(token_ids, skip_special_tokens=skip_special_tokens, timeout=timeout)
        )

    def count_tokens(self, prompt: PromptInput, *, timeout: float | None = None) -> int:
        return self._loop.run(self._client.count_tokens(prompt, timeout=timeout))

    def server_info(self, *, timeout: float | None = None) -> control_pb2.GetServerInfoResponse:
        return self._loop.run(self._client.server_info(timeout=timeout))

    def model_info(self, *, timeout: float | None = None) -> control_pb2.GetModelInfoResponse:
        return self._loop.run(self._client.model_info(timeout=timeout))

    def inspect(self, *, timeout: float | None = None) -> control_pb2.InspectResponse:
        """What the two tiers hold at this moment, and the sequences in the engine."""
        return self._loop.run(self._client.inspect(timeout=timeout))

    def list_sessions(self, *, timeout: float | None = None) -> list[control_pb2.SessionState]:
        """The caller's sessions at the server, the oldest first, also those that wait to be resumed."""
        return self._loop.run(self._client.list_sessions(timeout=timeout))

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        return self._loop.run(self._client.abort(request_id, timeout=timeout))


def _id_of(parent: str | BlockingSessionStream) -> str:
    return parent if isinstance(parent, str) else parent.request_id


async def _next_or_none(iterator: AsyncIterator[T]) -> T | None:
    """``StopAsyncIteration`` cannot leave a coroutine: None stands for the end."""
    return await anext(iterator, None)
