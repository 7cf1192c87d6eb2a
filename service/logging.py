"""What the log says of requests: those that the server itself failed, with the names to find them by."""

from typing import Any

import grpc
import structlog

from tidegate.service.events import Failed
from tidegate.service.generation import Generation
from tidegate.service.observe import Observer

CALLERS_ID = "x-request-id"
MAX_ID_CHARS = 128

_log = structlog.get_logger(__name__)


def callers_id(context: "grpc.aio.ServicerContext[Any, Any]") -> str | None:
    """The name that the caller gave to the RPC, where it can stand in a log and in a trailer."""
    for name, value in context.invocation_metadata() or ():
        if name == CALLERS_ID and isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARS:
            return value if value.isascii() and value.isprintable() else None
    return None


def bind_callers_id(callers_id: str) -> None:
    """Every line that the RPC's tasks log has it from here on."""
    structlog.contextvars.bind_contextvars(x_request_id=callers_id)


class RequestLog(Observer):
    """One line for each request that failed by a fault of the server."""

    def __init__(self) -> None:
        self._bound: dict[Generation, dict[str, Any]] = {}

    def on_open(self, generation: Generation) -> None:
        if bound := structlog.contextvars.get_contextvars():
            self._bound[generation] = bound

    def on_end(self, generation: Generation) -> None:
        bound = self._bound.pop(generation, {})
        end = generation.end
        if isinstance(end, Failed) and end.failure.code is grpc.StatusCode.INTERNAL:
            _log.error(
                "request failed",
                request_id=generation.request_id,
                tenant=generation.tenant,
                reason=end.failure.reason,
                **bound,
            )
