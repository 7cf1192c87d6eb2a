"""Assembles the server: ports, interceptors, servicers, health, drain."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.metadata import version

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tidegate.engine.client import EngineClient, EngineGone
from tidegate.engine.messages import EngineInfo
from tidegate.engine.text import Text
from tidegate.service.addresses import listen
from tidegate.service.admin import AdminService
from tidegate.service.admission import Admission, AdmissionLimits
from tidegate.service.compat.protocols import SERVICES, Compat, add_protocols
from tidegate.service.config import MAX_DRAIN_GRACE
from tidegate.service.control import ControlService
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
from tidegate.service.security import Security
from tidegate.service.session_limits import SessionLimits
from tidegate.service.sessions import Sessions
from tidegate.v1 import admin_pb2_grpc, control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_METADATA_BYTES = 16 * 2**10
"""Room for a signed token beside what proxies add."""
MAX_PENDING_REQUESTS = 20_000
KEEPALIVE_MS = 10_000
PING_TIMEOUT_MS = 5_000

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
