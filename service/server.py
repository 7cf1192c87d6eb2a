"""Assembles the server: ports, interceptors, servicers, health, drain."""

import asyncio
import contextlib
import gc
import hashlib
import importlib
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import grpc.aio
import msgspec
import structlog
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tidegate.engine.checkpoint import resolve
from tidegate.engine.client import EngineClient, EngineGone
from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.logging import LogFormat, configure_logging, process_age
from tidegate.engine.messages import EngineInfo
from tidegate.engine.process import ProcessClient
from tidegate.engine.text import Text
from tidegate.service.addresses import check_address, every_interface, listen
from tidegate.service.admin import AdminService
from tidegate.service.admission import Admission, AdmissionLimits
from tidegate.service.compat.protocols import PROTOCOLS, SERVICES, Compat, add_protocols
from tidegate.service.control import ControlService
from tidegate.service.errors import log_unexpected
from tidegate.service.gateway import Gateway, find_program
from tidegate.service.generation import Generation
from tidegate.service.guard import Guard
from tidegate.service.health import HealthService
from tidegate.service.hub import Hub, draining
from tidegate.service.identity import Role
from tidegate.service.inference import InferenceService
from tidegate.service.intake import Intake
from tidegate.service.logging import RequestLog
from tidegate.service.metrics import Metrics
from tidegate.service.observe import Observer, Observers, Tracer
from tidegate.service.security import Security, SecurityConfig, load_security
from tidegate.service.session_limits import SessionLimits
from tidegate.service.sessions import Sessions
from tidegate.service.supervisor import Supervisor
from tidegate.v1 import admin_pb2_grpc, control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_METADATA_BYTES = 16 * 2**10
"""Room for a signed token beside what proxies add."""
MAX_PENDING_REQUESTS = 20_000
KEEPALIVE_MS = 10_000
PING_TIMEOUT_MS = 5_000
MAX_DRAIN_GRACE = 86_400
MIN_HANG_TIMEOUT = 2
"""An engine that has nothing to do beats once a second."""
MAX_HANG_TIMEOUT = 86_400
STOP_SECONDS = 2.0
"""For RPCs to write their last messages, once their requests have ended."""

HANDOVER_SECONDS = 2.0
"""Without credit for so long, a request is not waited for in a drain."""
SIDE_STOP_SECONDS = 0.5
"""For the answers of those that serve probes and operators."""

GRPC_OPTIONS = (
    # Two servers would share a port without a word.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Of all metadata of a call together; more is refused by gRPC itself, with RESOURCE_EXHAUSTED.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # By default a burst of opens loses a part, which the clients see as CANCELLED.
    ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_REQUESTS),
    # A half-open connection is noticed within the sum of the two; without a ping timeout of its own it
    # would take a minute.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    # Gateways ping idle connections; that is no abuse.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)

YOUNG_OBJECTS = 50_000
"""New objects at which the garbage collector starts to look for cycles."""

_log = structlog.get_logger(__name__)


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


class Server:
    """A server that listens. Made by ``start_server``."""

    def __init__(
        self,
        grpc_server: grpc.aio.Server,
        hub: Hub,
        sessions: Sessions,
        health: HealthService,
        side_servers: Sequence[grpc.aio.Server],
        ports: contextlib.ExitStack,
        addresses: list[str],
        drain_asked: "asyncio.Future[float | None]",
    ) -> None:
        self.addresses = addresses
        """With the ports that were chosen for port 0; so are the next three."""
        self.health_addresses: list[str] = []
        """Those where nothing but health is served."""
        self.admin_addresses: list[str] = []
        self.metrics_address: str | None = None
        self.drain_asked = drain_asked
        """Done when an operator asks for it, with the grace."""
        self.engine_ended = asyncio.create_task(hub.run())
        """Fails once the engine is gone. Every request has ended by then."""
        self.is_closed = False
        """After ``stop``, False where gRPC cannot end: a client is frozen, with its buffers full."""
        self._grpc_server = grpc_server
        self._hub = hub
        self._sessions = sessions
        self._health = health
        self._side_servers = side_servers
        self._ports = ports

    async def drain(self, grace: float) -> None:
        """Take nothing new, let requests under way finish within ``grace`` seconds, and stop.

        One whose client gives no credit cannot finish: it is ended sooner, for another server to go on with.
        """
        self._hub.is_draining = True
        await self._health.set_serving(False)
        self._sessions.go_away(grace)
        handing_over = asyncio.create_task(self._hand_over())
        try:
            await asyncio.wait_for(self._hub.idle(), grace)
        except TimeoutError:
            for generation in self._hub:
                generation.fail(draining())
        finally:
            handing_over.cancel()
        await self.stop()

    async def _hand_over(self) -> None:
        """End the requests that have had no credit for a while."""
        stuck: dict[Generation, float] = {}
        while True:
            now = time.monotonic()
            without = {generation for generation in self._hub if not generation.has_credit}
            stuck = {generation: stuck.get(generation, now) for generation in without}
            for generation, since in stuck.items():
                if now - since >= HANDOVER_SECONDS:
                    generation.fail(draining())
            await asyncio.sleep(HANDOVER_SECONDS / 8)

    async def stop(self) -> None:
        """End all streams, behind what they still have to say, and give the ports back."""
        await self._health.close()
        self._hub.stopping.set()
        self._sessions.close()
        self._stopping = asyncio.create_task(self._grpc_server.stop(STOP_SECONDS))
        await asyncio.wait({self._stopping}, timeout=2 * STOP_SECONDS)
        self.is_closed = self._stopping.done()
        if self.is_closed:
            self._stopping.result()
        for side_server in self._side_servers:
            await side_server.stop(SIDE_STOP_SECONDS)
        self.engine_ended.cancel()
        await asyncio.wait({self.engine_ended})
        self._hub.close()
        self._ports.close()


async def start_server(
    engine: EngineClient,
    text: Text,
    *,
    addresses: Sequence[str],
    admission: AdmissionLimits | None = None,
    memory: Callable[[], float] | None = None,
    security: Security | None = None,
    health_addresses: Sequence[str] = (),
    admin_addresses: Sequence[str] = (),
    metrics_address: str | None = None,
    tracer: Tracer | None = None,
    reflection_on: bool = False,
    compat: Compat | None = None,
    limits: SessionLimits | None = None,
    restart: Callable[[EngineGone], Awaitable[None]] | None = None,
) -> Server:
    """Serve an engine that is ready. Raises ``ConfigError`` where an address cannot be opened.

    ``memory`` is as in ``Admission``. Engine and text stay the caller's to close. ``restart``
    is the hub's.
    """
    limits = limits or SessionLimits(MAX_MESSAGE_BYTES)
    security = security or Security()
    fingerprint = _fingerprint(engine.info)
    services = [
        descriptor.services_by_name[name].full_name
        for descriptor, name in (
            (inference_pb2.DESCRIPTOR, "InferenceService"),
            (control_pb2.DESCRIPTOR, "ControlService"),
        )
    ]
    if compat is not None:
        services += [SERVICES[protocol] for protocol in compat.protocols]
    health = HealthService(services)
    hub = Hub(
        engine,
        text,
        Admission(admission or AdmissionLimits(), memory),
        restart=restart,
        set_serving=health.set_serving,
    )
    intake = Intake(hub, text)
    sessions = Sessions(hub, intake, limits, fingerprint)

    observers: list[Observer] = [RequestLog()]
    metrics = None
    if metrics_address is not None:
        metrics = Metrics(engine.info, lambda: hub.stats, hub.admission, lambda: hub.is_draining)
        observers.append(metrics.requests)
    if tracer is not None:
        observers.append(tracer)
    hub.observer = Observers(*observers)
    guard = Guard(
        limits.stall_limit,
        security.authentication,
        metrics=None if metrics is None else metrics.rpcs,
        tracer=tracer,
    )
    grpc_server = grpc.aio.server(interceptors=[guard], options=GRPC_OPTIONS)
    if compat is not None:
        add_protocols(grpc_server, compat, intake, hub)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceService(text, intake, sessions), grpc_server
    )
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlService(hub, text, limits, fingerprint), grpc_server
    )
    health_pb2_grpc.add_HealthServicer_to_server(health, grpc_server)
    if reflection_on:
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection([*services, health_name, reflection.SERVICE_NAME], grpc_server)

    health_server = grpc.aio.server(interceptors=[Guard(limits.stall_limit)], options=GRPC_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health, health_server)

    drain_asked: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
    role = None if security.authentication is None else Role.ADMIN
    admin_guard = Guard(limits.stall_limit, security.authentication, role=role)
    admin_server = grpc.aio.server(interceptors=[admin_guard], options=GRPC_OPTIONS)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminService(hub, partial(_ask_for_drain, drain_asked), MAX_DRAIN_GRACE), admin_server
    )

    with contextlib.ExitStack() as opening:
        opened = [
            opening.enter_context(listen(grpc_server, address, security.credentials)) for address in addresses
        ]
        opened_for_health = [
            opening.enter_context(listen(health_server, address, None)) for address in health_addresses
        ]
        opened_for_admin = [
            opening.enter_context(listen(admin_server, address, security.credentials))
            for address in admin_addresses
        ]
        metrics_server = None
        if metrics is not None and metrics_address is not None:
            metrics_server = metrics.serve(metrics_address)
            opening.callback(metrics_server.close)
        await grpc_server.start()
        await health_server.start()
        await admin_server.start()
        ports = opening.pop_all()
    server = Server(
        grpc_server, hub, sessions, health, (health_server, admin_server), ports, opened, drain_asked
    )
    server.health_addresses, server.admin_addresses = opened_for_health, opened_for_admin
    server.metrics_address = None if metrics_server is None else metrics_server.address
    await health.set_serving(True)
    return server


def _ask_for_drain(asked: "asyncio.Future[float | None]", grace: float | None) -> None:
    """Only the first time counts, as with a signal."""
    if not asked.done():
        asked.set_result(grace)


def run(config: ServerConfig) -> int:
    """``serve`` on uvloop, from the main thread. Returns the exit status."""
    return uvloop.run(serve(config))


async def serve(config: ServerConfig) -> int:
    """Load the model, serve it until a signal comes, drain. Returns the exit status.

    A start that cannot work, or an engine that ends, is one line in the log and status 1. A second
    signal ends the process at once.
    """
    configure_logging(config.log_format)
    try:
        # Before the model loads: a mistake here shows at once.
        security = load_security(config.security)
        tracer = None if config.otlp_endpoint is None else _load_tracer(config.otlp_endpoint)
        if config.openai_port is not None:
            find_program()
    except ConfigError as error:
        _log.error("cannot start", reason=str(error))
        return 1
    stopping = asyncio.create_task(_signal())
    loading = asyncio.create_task(_load(config))
    await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        await asyncio.wait({loading})
        return 0
    try:
        engine, text = await loading
    except (ConfigError, EngineGone) as error:
        _log.error("cannot start", reason=str(error))
        return 1
    try:
        return await _serve(config, security, tracer, engine, text, stopping)
    finally:
        await engine.close()
        text.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


async def _serve(
    config: ServerConfig,
    security: Security,
    tracer: Tracer | None,
    engine: Supervisor,
    text: Text,
    stopping: asyncio.Task[None],
) -> int:
    folder = await asyncio.to_thread(resolve, config.engine.model)
    # The gateway speaks to a port that nobody else needs to know.
    for_gateway = [] if config.openai_port is None else ["127.0.0.1:0"]
    try:
        server = await start_server(
            engine,
            text,
            addresses=[*config.addresses, *for_gateway],
            admission=config.admission_limits(),
            security=security,
            health_addresses=[] if config.health_port is None else [every_interface(config.health_port)],
            admin_addresses=config.admin_addresses,
            metrics_address=None if config.metrics_port is None else every_interface(config.metrics_port),
            tracer=tracer,
            reflection_on=config.reflection,
            restart=engine.restart,
            compat=Compat(config.protocols, folder, config.engine.max_num_seqs),
        )
    except ConfigError as error:
        _log.error("cannot start", reason=str(error))
        return 1
    spare_collector()
    _log.info(
        "ready",
        model=engine.info.model,
        addresses=server.addresses,
        health=server.health_addresses,
        admin=server.admin_addresses,
        metrics=server.metrics_address,
        after_s=round(process_age(), 2),
    )
    ends: set[asyncio.Future[Any]] = {stopping, server.engine_ended, server.drain_asked}
    try:
        # Around the drain, too: the gateway's requests finish through it.
        async with _gateway(config, server.addresses[-1], engine.info.model, ends):
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if server.engine_ended.done():
                await server.stop()
            else:
                asked = server.drain_asked.result() if server.drain_asked.done() else None
                grace = config.drain_grace if asked is None else asked
                _log.info("draining", grace=grace)
                await server.drain(grace)
    except ConfigError as error:
        _log.error("cannot start", reason=str(error))
        await server.stop()
        return 1
    status = _exit_status(server.engine_ended)
    if not server.is_closed:
        # gRPC would wait for that client for ever, and the interpreter for gRPC.
        await engine.close()
        os._exit(status)
    return status


@contextlib.asynccontextmanager
async def _gateway(
    config: ServerConfig, worker: str, model: str, ends: set[asyncio.Future[Any]]
) -> AsyncGenerator[None]:
    """The gateway of ``openai_port``, if one is wanted: once it is ready, or the server is to end.

    Raises ``ConfigError`` where it cannot start.
    """
    if config.openai_port is None:
        yield
        return
    gateway = Gateway(find_program(), worker, config.openai_address)
    starting = asyncio.create_task(gateway.start(model))
    try:
        await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _log.info("openai endpoint ready", address=config.openai_address, after_s=round(process_age(), 2))
        yield
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await gateway.stop()


def _load_tracer(endpoint: str) -> Tracer:
    """Raises ``ConfigError`` where OpenTelemetry is not installed."""
    try:
        # By name: it is an extra, and takes half a second to import.
        tracing = importlib.import_module("tidegate.service.tracing")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"otlp_endpoint needs {error.name}, which is not installed: pip install 'tidegate[tracing]'"
        ) from error
    tracer: Tracer = tracing.over_otlp(endpoint)
    return tracer


def spare_collector() -> None:
    """Have the garbage collector look at less, and less often; all that a stream needs goes without it.

    What has been loaded stays: to look through all of that takes a tenth of a second, in which no stream
    would get anything. And every step makes some thousand little objects that are gone with the next one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def _load(config: ServerConfig) -> tuple[Supervisor, Text]:
    """The engine process and, meanwhile in a thread, the tokenizer.

    Raises ``ConfigError``, ``EngineGone``.
    """
    own_imports = process_age()
    # A hub name is downloaded here, once; the engine then finds it in the cache.
    folder = await asyncio.to_thread(resolve, config.engine.model)

    async def start(engine_config: EngineConfig, progress: bool = False) -> EngineClient:
        return await ProcessClient.start(
            engine_config,
            progress=progress,
            log_format=config.log_format,
            hang_timeout=config.hang_timeout,
        )

    engine, text = await asyncio.gather(
        start(config.engine, progress=sys.stderr.isatty()),
        asyncio.to_thread(Text.load, str(folder)),
        return_exceptions=True,
    )
    if isinstance(engine, BaseException):
        raise engine
    if isinstance(text, BaseException):
        await engine.close()
        raise text
    seconds = {"own_imports": own_imports, **engine.info.load_seconds, "total": process_age()}
    _log.info("loaded", **{f"{name}_s": round(value, 2) for name, value in seconds.items()})
    again = _same_again(config.engine, engine.info)
    return Supervisor(engine, lambda: start(again), config.max_restarts), text


def _same_again(config: EngineConfig, info: EngineInfo) -> EngineConfig:
    """For an engine of the same size as the first, with room for every request that had room there."""
    return msgspec.structs.replace(
        config,
        max_model_len=info.max_model_len,
        block_size=info.block_size,
        device_kv_tokens=info.device_blocks * info.block_size,
        host_kv_tokens=info.host_blocks * info.block_size,
    )


async def _signal() -> None:
    """Wait for SIGTERM or SIGINT; the next one then does what it does by default."""
    loop = asyncio.get_running_loop()
    received = asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, received.set)
    await received.wait()
    for number in numbers:
        loop.remove_signal_handler(number)


def _exit_status(engine_ended: asyncio.Task[None]) -> int:
    """Of a server that has stopped: by us, or with its engine."""
    try:
        engine_ended.result()
    except asyncio.CancelledError:
        _log.info("stopped")
        return 0
    except EngineGone as gone:
        _log.error("the engine has ended", reason=str(gone), exit_code=gone.exit_code)
    except Exception as error:  # noqa: BLE001  whatever it is, it ends the server
        log_unexpected("the engine's output could not be read", error)
    return 1


def _fingerprint(info: EngineInfo) -> str:
    """Of all that decides which tokens come out."""
    parts = (
        info.model,
        info.architecture,
        info.vocab_size,
        info.eos_token_ids,
        info.dtype,
        info.device,
        version("tidegate"),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
