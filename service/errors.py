"""Every failure becomes one gRPC status with details: the table. The guard (``guard.py``) applies it.

Messages are for people and never hold text of a prompt. Programs switch on the reason.
"""

import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
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
    "SESSION_CLOSED": grpc.StatusCode.INVALID_ARGUMENT,
    "ALREADY_OPEN": grpc.StatusCode.INVALID_ARGUMENT,
    "MODEL_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_LOST": grpc.StatusCode.NOT_FOUND,
    "PARENT_GONE": grpc.StatusCode.NOT_FOUND,
    "REQUEST_GONE": grpc.StatusCode.NOT_FOUND,
    "SERVICE_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "REQUEST_ID_IN_USE": grpc.StatusCode.ALREADY_EXISTS,
    "NO_CHAT_TEMPLATE": grpc.StatusCode.FAILED_PRECONDITION,
    "PROFILE_RUNNING": grpc.StatusCode.FAILED_PRECONDITION,
    "PARENT_RUNNING": grpc.StatusCode.FAILED_PRECONDITION,
    "NO_TOKEN_ALLOWED": grpc.StatusCode.FAILED_PRECONDITION,
    "OFFSET_OUT_OF_RANGE": grpc.StatusCode.OUT_OF_RANGE,
    "CREDENTIALS_MISSING": grpc.StatusCode.UNAUTHENTICATED,
    "CREDENTIALS_INVALID": grpc.StatusCode.UNAUTHENTICATED,
    "TENANT_NOT_ALLOWED": grpc.StatusCode.PERMISSION_DENIED,
    "ROLE_REQUIRED": grpc.StatusCode.PERMISSION_DENIED,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "SESSION_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "TENANT_QUOTA": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "WAIT_TOO_LONG": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "MEMORY_PRESSURE": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "TOO_MANY_SESSIONS": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "LEASES_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "CLIENT_TOO_SLOW": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DEVICE_OUT_OF_MEMORY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "GRAMMAR_TOO_COMPLEX": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "SESSION_SUPERSEDED": grpc.StatusCode.ABORTED,
    "REQUEST_MOVED": grpc.StatusCode.ABORTED,
    "TIME_LIMIT": grpc.StatusCode.DEADLINE_EXCEEDED,
    "OPEN_TIMEOUT": grpc.StatusCode.DEADLINE_EXCEEDED,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "MODEL_LOADING": grpc.StatusCode.UNAVAILABLE,
    "ENGINE_RESTARTING": grpc.StatusCode.UNAVAILABLE,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}
"""Reasons of the front, and of the engine where it is no fault of its own: any other is INTERNAL."""

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
        quota: tuple[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """``retry_after`` in seconds: when it makes sense to try again; None where it does not.

        ``quota``: the subject whose quota is used up, and the quota in words.
        """
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.code = CODES.get(reason, grpc.StatusCode.INTERNAL)
        self.message = message
        self.violations = list(violations)
        self.retry_after = retry_after
        self.quota = quota
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
        if self.quota is not None:
            subject, description = self.quota
            failure = error_details_pb2.QuotaFailure()
            failure.violations.add(subject=subject, description=description)
            status.details.add().Pack(failure)
        if self.retry_after is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_after * 1000))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        return status

    async def abort(
        self, context: "grpc.aio.ServicerContext[Any, Any]", trailers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """End the RPC with this failure, and more trailers beside its own. Raises ``grpc.aio.AbortError``.

        gRPC's own retry policies obey the pushback trailer and ignore ``RetryInfo``.
        """
        pushback = -1 if self.retry_after is None else round(self.retry_after * 1000)
        own = (
            ("grpc-status-details-bin", self.status().SerializeToString()),
            ("grpc-retry-pushback-ms", str(pushback)),
        )
        await context.abort(self.code, self.message, (*own, *trailers))


def log_unexpected(event: str, error: BaseException, **fields: object) -> None:
    """Log where an exception came from. Not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]]
    _log.error(event, error=type(error).__name__, where=where, **fields)
