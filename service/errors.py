"""Every failure becomes one gRPC status with details: the table, and the guard that applies it.

Messages are for people and never hold text of a prompt. Programs switch on the reason.
"""

import asyncio
import contextlib
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from tidegate.engine.request import Violation

DOMAIN = "tidegate"
MAX_VIOLATIONS = 32
"""Of one status. gRPC drops the details of one that exceeds its 8 KB of trailers."""

CODES: Mapping[str, grpc.StatusCode] = {
    "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "UNDECODABLE_MESSAGE": grpc.StatusCode.INVALID_ARGUMENT,
    "UNKNOWN_COMMAND": grpc.StatusCode.INVALID_ARGUMENT,
    "OPEN_EXPECTED": grpc.StatusCode.INVALID_ARGUMENT,
    "ALREADY_OPEN": grpc.StatusCode.INVALID_ARGUMENT,
    "MODEL_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_LOST": grpc.StatusCode.NOT_FOUND,
    "SERVICE_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "REQUEST_ID_IN_USE": grpc.StatusCode.ALREADY_EXISTS,
    "NO_CHAT_TEMPLATE": grpc.StatusCode.FAILED_PRECONDITION,
    "TENANT_NOT_ALLOWED": grpc.StatusCode.PERMISSION_DENIED,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "SESSION_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "CLIENT_TOO_SLOW": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "TIME_LIMIT": grpc.StatusCode.DEADLINE_EXCEEDED,
    "OPEN_TIMEOUT": grpc.StatusCode.DEADLINE_EXCEEDED,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "ENGINE_GONE": grpc.StatusCode.UNAVAILABLE,
    "NOT_YET_SUPPORTED": grpc.StatusCode.UNIMPLEMENTED,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}
"""Reasons of the front. A reason that the engine gives for a fault of its own is INTERNAL."""

_log = structlog.get_logger(__name__)


class Failure(Exception):
    """A failure on its way to the client: raised by handlers, or carried by an event of a session."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        violations: Iterable[Violation] = (),
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """``retry_after`` in seconds: when it makes sense to try again; None where it does not."""
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.code = CODES.get(reason, grpc.StatusCode.INTERNAL)
        self.message = message
        self.violations = list(violations)
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})

    @classmethod
    def invalid(cls, violations: list[Violation]) -> "Failure":
        told = violations[:MAX_VIOLATIONS]
        fields = ", ".join(dict.fromkeys(violation.field for violation in told))
        if untold := len(violations) - len(told):
            fields += f" and {untold} more"
        return cls("INVALID_REQUEST", f"the request is invalid in: {fields}", violations=told)

    @classmethod
    def internal(cls) -> "Failure":
        return cls("INTERNAL", "an unexpected fault in the server; its log says more")

    def status(self) -> status_pb2.Status:
        """With exactly one ``ErrorInfo``, and each other detail type at most once."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        status.details.add().Pack(info)
        if self.violations:
            bad_request = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad_request.field_violations.add(field=violation.field, description=violation.description)
            status.details.add().Pack(bad_request)
        if self.retry_after is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_after * 1000))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        return status

    async def abort(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """End the RPC with this failure. Raises ``grpc.aio.AbortError``.

        gRPC's own retry policies obey the pushback trailer and ignore ``RetryInfo``.
        """
        pushback = -1 if self.retry_after is None else round(self.retry_after * 1000)
        trailers = (
            ("grpc-status-details-bin", self.status().SerializeToString()),
            ("grpc-retry-pushback-ms", str(pushback)),
        )
        await context.abort(self.code, self.message, trailers)


def log_unexpected(event: str, error: BaseException, **fields: object) -> None:
    """Log where an exception came from. Not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]]
    _log.error(event, error=type(error).__name__, where=where, **fields)


Handler = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Any]
Parse = Callable[[bytes], Message]


class Guard(grpc.aio.ServerInterceptor):
    """Stands around every handler: whatever it raises becomes a status that leaks nothing.

    grpc.aio itself would put an exception's text into the status, and answer bytes that it cannot
    decode before any handler is reached. So the guard takes messages as bytes and parses them inside.

    It also ends a stream whose client takes no message for ``stall_limit`` seconds. gRPC's keepalive does
    not notice a peer that is frozen with its buffers full: the ping waits behind what cannot be written.
    """

    def __init__(self, stall_limit: float) -> None:
        self._stall_limit = stall_limit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # an unknown method: UNIMPLEMENTED, by gRPC
            return None
        method, parse = handler_call_details.method, handler.request_deserializer
        if handler.request_streaming and handler.response_streaming:
            behavior = _guard(method, self._streaming(handler.stream_stream, _each(parse)))
            return grpc.stream_stream_rpc_method_handler(behavior, None, handler.response_serializer)
        if handler.response_streaming:
            behavior = _guard(method, self._streaming(handler.unary_stream, _one(parse)))
            return grpc.unary_stream_rpc_method_handler(behavior, None, handler.response_serializer)
        behavior = _guard(method, _unary(handler.unary_unary, _one(parse)))
        return grpc.unary_unary_rpc_method_handler(behavior, None, handler.response_serializer)

    def _streaming(self, behavior: Handler, read: Callable[[Any], Any]) -> Handler:
        """Both styles of grpc.aio: a coroutine that writes to the context, or a generator of messages.

        A generator goes on behind its ``yield`` when the message was written.
        """

        async def handle(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
            result = behavior(read(request), context)
            if not isinstance(result, AsyncGenerator):
                await result
                return
            # Closed at once when the client leaves, not when the collector comes by.
            async with contextlib.aclosing(result) as messages:
                async for message in messages:
                    try:
                        async with asyncio.timeout(self._stall_limit):
                            await context.write(message)
                    except TimeoutError:
                        raise Failure("CLIENT_TOO_SLOW", "the client took no message for too long") from None

        return handle


def _guard(method: str, behavior: Handler) -> Handler:
    async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        try:
            return await behavior(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Failure as failure:
            await failure.abort(context)
        except grpc.aio.InternalError:
            return None  # a write failed: the client left, and gRPC has not told us yet
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets a status
            log_unexpected("rpc failed", error, method=method)
            await Failure.internal().abort(context)

    return guarded


def _unary(behavior: Handler, read: Callable[[Any], Any]) -> Handler:
    async def handle(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        return await behavior(read(request), context)

    return handle


def _one(parse: Parse) -> Callable[[bytes], Message]:
    def read(data: bytes) -> Message:
        try:
            return parse(data)
        except DecodeError as error:
            raise Failure(
                "UNDECODABLE_MESSAGE", "the message is no valid protobuf of the method's request type"
            ) from error

    return read


def _each(parse: Parse) -> Callable[[AsyncIterator[bytes]], AsyncIterator[Message]]:
    read_one = _one(parse)

    async def read(stream: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for data in stream:
            yield read_one(data)

    return read
