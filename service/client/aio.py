"""The asyncio client: a channel to a server, or to each of its replicas."""

import functools
import weakref
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from tidegate.service.client import messages
from tidegate.service.client.errors import error_from_rpc
from tidegate.service.client.messages import Options, PromptInput, Response
from tidegate.service.client.retry import call_with_retries
from tidegate.service.client.session import Session
from tidegate.service.client.stream import GenerateCall, GenerateStream
from tidegate.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50051"

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # Two clients of one process do not share a TCP connection, and with it a bottleneck.
    ("grpc.use_local_subchannel_pool", 1),
    # A frozen peer is noticed within 17 s. Servers allow a ping every 10 s.
    ("grpc.keepalive_time_ms", 12_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # The client's own retries decide when to connect again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def _channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)


class AsyncClient:
    """A client of one Tidegate server, for asyncio.

        async with AsyncClient("unix:/run/tidegate.sock") as client:
            async for chunk in client.generate("Once upon a time", max_tokens=64):
                print(chunk, end="", flush=True)

    Every prompt is a string, a list of token ids or a list of chat messages. ``timeout`` is in seconds and
    bounds all attempts together; a stream at its limit ends with what there is, reason ``deadline``.
    Failures are ``TidegateError``. UNAVAILABLE is tried again up to ``retries`` times, while no token has
    come.
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        retries: int = 3,
    ) -> None:
        """``target``: ``host:port`` or ``unix:/path``. Made in the event loop that uses it.

        Several are replicas of one server: calls go to the first, and sessions go on at another one when
        theirs is lost or about to stop.

        ``credentials``: of ``grpc.ssl_channel_credentials``, for a server that speaks TLS; with a certificate
        of the client's own where it asks for one. ``token``: goes with every call as
        ``authorization: Bearer``, readable to whoever listens on a network without TLS.
        """
        targets = [target] if isinstance(target, str) else list(target)
        if not targets:
            raise ValueError("target must name at least one address")
        self._retries = retries
        self._channels = [_channel(one, credentials) for one in targets]
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._channel = self._channels[0]
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)
        self._open: weakref.WeakSet[GenerateStream | Session] = weakref.WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the channel; what still runs on it is cancelled."""
        # The channel's own close overlooks a stream that nobody reads at that moment.
        for stream in list(self._open):
            await stream.aclose()
        for channel in self._channels:
            await channel.close()

    def generate(
        self, prompt: PromptInput, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> GenerateStream:
        """One request, streamed. It starts with the first read; ``session`` is the way for many."""
        request = inference_pb2.GenerateRequest(**messages.request_fields(prompt, options))

        def start(seconds_left: float | None) -> GenerateCall:
            return self._inference.Generate(request, timeout=seconds_left, metadata=self._metadata)

        stream = GenerateStream(request.request_id, start, self._retries, timeout)
        self._open.add(stream)
        return stream

    async def generate_unary(
        self, prompt: PromptInput, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Response:
        """One request, one answer."""
        request = inference_pb2.GenerateUnaryRequest(**messages.request_fields(prompt, options))
        answer = await call_with_retries(
            lambda left: self._inference.GenerateUnary(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )
        return messages.response(answer)

    def session(self) -> Session:
        """Many requests on one stream: ``async with client.session() as session``."""
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        connects = [functools.partial(stub.Session, metadata=self._metadata) for stub in stubs]
        session = Session(connects, self._retries)
        self._open.add(session)
        return session

    async def tokenize(self, prompt: PromptInput, *, timeout: float | None = None) -> list[int]:
        """The token ids that a prompt becomes."""
        request = inference_pb2.TokenizeRequest(prompt=messages.prompt_message(prompt))
        answer = await call_with_retries(
            lambda left: self._inference.Tokenize(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )
        return list(answer.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        answer = await call_with_retries(
            lambda left: self._inference.Detokenize(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )
        return answer.text

    async def count_tokens(self, prompt: PromptInput, *, timeout: float | None = None) -> int:
        """How many tokens a prompt becomes."""
        request = inference_pb2.CountTokensRequest(prompt=messages.prompt_message(prompt))
        answer = await call_with_retries(
            lambda left: self._inference.CountTokens(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )
        return answer.tokens

    async def server_info(self, *, timeout: float | None = None) -> control_pb2.GetServerInfoResponse:
        request = control_pb2.GetServerInfoRequest()
        return await call_with_retries(
            lambda left: self._control.GetServerInfo(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )

    async def model_info(self, *, timeout: float | None = None) -> control_pb2.GetModelInfoResponse:
        request = control_pb2.GetModelInfoRequest()
        return await call_with_retries(
            lambda left: self._control.GetModelInfo(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )

    async def inspect(self, *, timeout: float | None = None) -> control_pb2.InspectResponse:
        """What the two tiers hold at this moment, and the sequences in the engine."""
        request = control_pb2.InspectRequest()
        return await call_with_retries(
            lambda left: self._control.Inspect(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )

    async def watch_load(self, min_interval: float = 1.0) -> AsyncIterator[control_pb2.WatchLoadResponse]:
        """The load and the running totals: at once, then at changes, ``min_interval`` seconds apart."""
        request = control_pb2.WatchLoadRequest(min_interval=messages.duration(min_interval))
        try:
            async for response in self._control.WatchLoad(request, metadata=self._metadata):
                yield response
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from None

    async def list_sessions(self, *, timeout: float | None = None) -> list[control_pb2.SessionState]:
        """The caller's sessions at the server, the oldest first, also those that wait to be resumed."""
        request = control_pb2.ListSessionsRequest()
        answer = await call_with_retries(
            lambda left: self._control.ListSessions(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )
        return list(answer.sessions)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End one of the caller's requests, whatever started it; whether it was under way."""
        request = control_pb2.AbortRequest(request_id=request_id)
        answer = await call_with_retries(
            lambda left: self._control.Abort(request, timeout=left, metadata=self._metadata),
            self._retries,
            timeout,
        )
        return answer.aborted
