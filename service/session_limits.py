"""What bounds a session."""

from dataclasses import dataclass

from tidegate.service import convert
from tidegate.service.credit import TOKEN_BYTES
from tidegate.v1 import session_pb2

DEFAULT_CREDIT = 256
MAX_REQUESTS = 10_000
MAX_SESSIONS = 20_000
OPEN_SECONDS = 5.0
HEARTBEAT_SECONDS = 15.0
STALL_SECONDS = 60.0
RESUME_SECONDS = 30.0
IDLE_SECONDS = 600.0
UNACKED_LOG_BYTES = 40 * 2**10
"""With the text that waits and the message that is written, 64 KB."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Seconds and bytes."""

    max_message_bytes: int
    open_timeout: float = OPEN_SECONDS
    heartbeat_interval: float = HEARTBEAT_SECONDS
    stall_limit: float = STALL_SECONDS
    """How long a client, of any stream, may take no message while there is one."""
    resume_timeout: float = RESUME_SECONDS
    """How long a session outlives its stream."""
    idle_timeout: float = IDLE_SECONDS
    sessions_per_tenant: int = MAX_SESSIONS
    requests_per_session: int = MAX_REQUESTS
    default_credit: int = DEFAULT_CREDIT
    unacked_log_bytes: int = UNACKED_LOG_BYTES

    def message(self) -> session_pb2.SessionLimits:
        return session_pb2.SessionLimits(
            sessions_per_tenant=self.sessions_per_tenant,
            requests_per_session=self.requests_per_session,
            open_timeout=convert.duration(self.open_timeout),
            idle_timeout=convert.duration(self.idle_timeout),
            heartbeat_interval=convert.duration(self.heartbeat_interval),
            unacked_log_bytes=self.unacked_log_bytes,
            default_credit=self.default_credit,
            # What is not used is not acknowledged either.
            credit_pool=self.unacked_log_bytes // TOKEN_BYTES,
            max_message_bytes=self.max_message_bytes,
            resume_timeout=convert.duration(self.resume_timeout),
        )
