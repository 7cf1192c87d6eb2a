"""Stands around every handler: who calls, whether the message can be read, how a failure is told."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from tidegate.service import identity
from tidegate.service.credentials import Authentication
from tidegate.service.errors import Failure, log_unexpected
from tidegate.service.identity import Role
from tidegate.service.logging import CALLERS_ID, bind_callers_id, callers_id
from tidegate.service.metrics import RpcMetrics
from tidegate.service.observe import Tracer
from tidegate.service.stalls import Stalls

Handler = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Any]
Parse = Callable[[bytes], Message]


class Guard(grpc.aio.ServerInterceptor):
    """Whatever a handler raises becomes a status that leaks nothing.

    grpc.aio itself would put an exception's text into the status, and answer bytes that it cannot
    decode before any handler is reached. So the guard takes messages as bytes and parses them inside,
    behind the question who calls: nothing that a stranger sends is read.

    It also ends a stream whose client takes no message for ``stall_limit`` seconds.
    """

    def __init__(
        self,
        stall_limit: float,
        authentication: Authentication | None = None,
        *,
        role: Role | None = None,
        metrics: RpcMetrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """``authentication`` None: every caller is ``identity.LOCAL``. ``role``: what callers need beside."""
        self._writes = Stalls(stall_limit)
        self._authentication = authentication
        self._role = role
        self._metrics = metrics
        self._tracer = tracer
        self._guarded: dict[str, tuple[object, object]] = {}
        """What was made of a method's handler: it stays the same, but for the one that a model's replaces."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # an unknown method: UNIMPLEMENTED, by gRPC
            return None
        method = handler_call_details.method
        known, guarded = self._guarded.get(method, (None, None))
        if known is not handler:
            guarded = self._guard_handler(method, handler)
            self._guarded[method] = handler, guarded
        return guarded

    def _guard_handler(self, method: str, handler: Any) -> Any:
        parse = handler.request_deserializer
        if handler.request_streaming and handler.response_streaming:
            behavior = self._guard(method, self._streaming(handler.stream_stream, _each(parse)))
            return grpc.stream_stream_rpc_method_handler(behavior, None, handler.response_serializer)
        if handler.response_streaming:
            behavior = self._guard(method, self._streaming(handler.unary_stream, _one(parse)))
            return grpc.unary_stream_rpc_method_handler(behavior, None, handler.response_serializer)
        behavior = self._guard(method, _unary(handler.unary_unary, _one(parse)))
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
                    await self._writes.write(context, message)

        return handle

    def _guard(self, method: str, behavior: Handler) -> Handler:
        async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            code = grpc.StatusCode.OK
            if self._metrics is not None:
                self._metrics.began(method)
            name = callers_id(context)
            if name is not None:
                bind_callers_id(name)
            trailers = () if name is None else ((CALLERS_ID, name),)
            try:
                self._admit(context)
                if self._tracer is not None:
                    self._tracer.attach(_text_metadata(context))
                if trailers:
                    context.set_trailing_metadata(trailers)
                return await behavior(request, context)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Failure as failure:
                code = failure.code
                await failure.abort(context, trailers)
            except grpc.aio.InternalError:
                code = grpc.StatusCode.CANCELLED
                return None  # a write failed: the client left, and gRPC has not told us yet
            except Exception as error:  # noqa: BLE001  whatever it is, the client gets a status
                code = grpc.StatusCode.INTERNAL
                log_unexpected("rpc failed", error, method=method)
                await Failure.internal().abort(context, trailers)
            finally:
                if self._metrics is not None:
                    self._metrics.ended(method, code)

        return guarded

    def _admit(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """Settle who calls. Raises ``Failure``."""
        if self._authentication is None:
            return
        caller = self._authentication.identify(context)
        if self._role is not None and caller.role is not self._role:
            raise Failure("ROLE_REQUIRED", f"this service is for the role {self._role} alone")
        identity.become(caller)


def _text_metadata(context: "grpc.aio.ServicerContext[Any, Any]") -> dict[str, str]:
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


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
