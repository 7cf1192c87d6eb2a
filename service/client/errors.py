"""What can go wrong, typed: a gRPC status and its ``google.rpc`` details as one exception."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

_STATUS_DETAILS = "grpc-status-details-bin"
_PUSHBACK = "grpc-retry-pushback-ms"


class Violation(NamedTuple):
    """One thing that is wrong with a request: the field, and what to do about it."""

    field: str
    description: str


class TidegateError(Exception):
    """A request failed, or the connection did. Every error of the client is one of the classes below.

    ``code`` is the gRPC status; ``reason`` the server's UPPER_SNAKE word for the case, to switch on, and
    empty where the failure is the transport's own; ``retry_after`` the seconds after which the server
    would like to hear of it again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
        may_retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.may_retry = may_retry
        """False where the server said that trying again is pointless."""


class InvalidRequest(TidegateError):
    """The request cannot be served as it stands. ``violations`` holds all that is wrong with it."""


class NotFound(TidegateError):
    """The server has no such model, session or parent request."""


class AlreadyExists(TidegateError):
    """Another request under way has this id."""


class FailedPrecondition(TidegateError):
    """Not possible with this model, such as chat without a chat template."""


class AccessDenied(TidegateError):
    """The server asks for another token or certificate, or for a role that this one does not have."""


class Overloaded(TidegateError):
    """No room now. ``retry_after`` says when to try again, where that makes sense."""


class Unavailable(TidegateError):
    """No server, or one that is starting, stopping or was lost."""


class DeadlineExceeded(TidegateError):
    """The time limit passed before anything ran."""


class Cancelled(TidegateError):
    """The request was cancelled from elsewhere."""


class NotSupported(TidegateError):
    """The server does not know the call, or not yet the field."""


class ServerFault(TidegateError):
    """The server's own fault, or an answer that makes no sense."""


_CLASSES: dict[grpc.StatusCode, type[TidegateError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def error_from_rpc(error: grpc.aio.AioRpcError) -> TidegateError:
    """The end of an RPC. Details that do not parse are left out: the code still says what happened."""
    trailers = error.trailing_metadata() or grpc.aio.Metadata()
    packed = trailers.get(_STATUS_DETAILS, b"")
    status = status_pb2.Status()
    if isinstance(packed, bytes):
        try:
            status.MergeFromString(packed)
        except ValueError:
            status.Clear()
    pushback = str(trailers.get(_PUSHBACK, ""))
    return _build(
        error.code(), error.details() or error.code().value[1], status, may_retry=not pushback.startswith("-")
    )


def error_from_status(status: Any) -> TidegateError:
    """A ``google.rpc.Status`` inside a message: the end of one request of a session."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _build(code, status.message or code_pb2.Code.Name(code.value[0]), status, may_retry=True)


def _build(code: grpc.StatusCode, message: str, status: Any, may_retry: bool) -> TidegateError:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry_info = error_details_pb2.RetryInfo()
    retry_after = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad_request.DESCRIPTOR):
            detail.Unpack(bad_request)
        elif detail.Is(retry_info.DESCRIPTOR):
            detail.Unpack(retry_info)
            retry_after = retry_info.retry_delay.ToMilliseconds() / 1000
    return _CLASSES.get(code, ServerFault)(
        message,
        code=code,
        reason=info.reason,
        violations=[Violation(v.field, v.description) for v in bad_request.field_violations],
        retry_after=retry_after,
        may_retry=may_retry,
    )
