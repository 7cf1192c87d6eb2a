"""What a server is started with: one place for every default, validated once."""

from dataclasses import dataclass, field

from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.logging import LogFormat
from tidegate.service.addresses import check_address, every_interface
from tidegate.service.admission import AdmissionLimits
from tidegate.service.compat.protocols import PROTOCOLS
from tidegate.service.security import SecurityConfig

MAX_DRAIN_GRACE = 86_400
MIN_HANG_TIMEOUT = 2
"""An engine that has nothing to do beats once a second."""
MAX_HANG_TIMEOUT = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    engine: EngineConfig
    security: SecurityConfig = field(default_factory=SecurityConfig)
    addresses: tuple[str, ...] = ("127.0.0.1:50051",)
    """``HOST:PORT`` or ``unix:PATH``. Without TLS and authentication only loopback and sockets, unless
    ``insecure``."""
    insecure: bool = False
    health_port: str | None = None
    """``PORT`` or ``HOST:PORT``, by default of every interface: ``grpc.health.v1`` alone, in plaintext."""
    admin_addresses: tuple[str, ...] = ()
    """As ``addresses``: for ``AdminService`` alone, and callers with the role ``admin`` alone."""
    metrics_port: str | None = None
    """As ``health_port``: HTTP, with ``/metrics`` for Prometheus."""
    otlp_endpoint: str | None = None
    """Where a collector of OpenTelemetry listens: spans of requests go there."""
    max_waiting_tokens: int | None = None
    """These three are as in ``AdmissionLimits``."""
    tenant_requests: int | None = None
    tenant_tokens: int | None = None
    reflection: bool = False
    max_restarts: int = 20
    """Of the engine process, within five minutes; 0: none, and its end is the server's."""
    hang_timeout: float = 60.0
    """Seconds without progress after which the engine process is killed; more than its longest step takes."""
    protocols: tuple[str, ...] = PROTOCOLS
    """Other people's, served beside ``tidegate.v1``."""
    openai_port: str | None = None
    """``PORT`` or ``HOST:PORT``, by default of loopback: an OpenAI endpoint, by a gateway as our child."""
    drain_grace: float = 30.0
    """Seconds that requests under way may take to finish after SIGTERM or SIGINT."""
    log_format: LogFormat = "console"

    def __post_init__(self) -> None:
        """Raises ``ConfigError``."""
        if not self.addresses:
            raise ConfigError("addresses must name at least one address")
        for address in (*self.addresses, *self.admin_addresses):
            check_address(address, self.insecure or self.security.is_safe_for_strangers)
        if not (self.otlp_endpoint or "http://").startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_endpoint must be http://HOST:PORT or https://; got {self.otlp_endpoint!r}"
            )
        for port in (self.health_port, self.metrics_port):
            if port is not None:
                check_address(every_interface(port), may_be_reached=True)
        self.admission_limits()
        if self.openai_port is not None:
            check_address(self.openai_address, self.insecure)
            if self.security != SecurityConfig():
                raise ConfigError(
                    "openai_port cannot be had beside TLS or authentication: the gateway would let "
                    "everybody past them. Run it on its own, with its own keys"
                )
            if "vllm" not in self.protocols:
                raise ConfigError("openai_port needs vllm among the protocols: the gateway speaks it to us")
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                known = ", ".join(PROTOCOLS)
                raise ConfigError(f"protocols must be of {known}, or none at all; got {protocol!r}")
        if not 0 <= self.drain_grace <= MAX_DRAIN_GRACE:
            raise ConfigError(f"drain_grace must be between 0 and {MAX_DRAIN_GRACE}; got {self.drain_grace}")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts must not be negative; got {self.max_restarts}")
        if not MIN_HANG_TIMEOUT <= self.hang_timeout <= MAX_HANG_TIMEOUT:
            limits = f"between {MIN_HANG_TIMEOUT} and {MAX_HANG_TIMEOUT}"
            raise ConfigError(f"hang_timeout must be {limits}; got {self.hang_timeout}")

    @property
    def openai_address(self) -> str:
        port = self.openai_port or ""
        return port if ":" in port else f"127.0.0.1:{port}"

    def admission_limits(self) -> AdmissionLimits:
        """Raises ``ConfigError``."""
        return AdmissionLimits(
            max_waiting=self.engine.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            tenant_requests=self.tenant_requests,
            tenant_tokens=self.tenant_tokens,
        )
