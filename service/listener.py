"""A server's ports, open from its first moment on: health is told there, and that the model still loads."""

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tidegate.service.addresses import listen
from tidegate.service.compat.protocols import SERVICES
from tidegate.service.errors import Failure
from tidegate.service.guard import Guard
from tidegate.service.health import HealthService
from tidegate.service.identity import Role
from tidegate.service.metrics import Metrics
from tidegate.service.observe import Tracer
from tidegate.service.security import Security
from tidegate.service.session_limits import SessionLimits
from tidegate.v1 import admin_pb2, control_pb2, inference_pb2

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_METADATA_BYTES = 16 * 2**10
"""Room for a signed token beside what proxies add."""
MAX_PENDING_REQUESTS = 20_000
KEEPALIVE_MS = 10_000
PING_TIMEOUT_MS = 5_000

STOP_SECONDS = 2.0
"""For RPCs to write their last messages, once their requests have ended."""
SIDE_STOP_SECONDS = 0.5
"""For the answers of those that serve probes and operators."""
LOADING_SECONDS = 5.0
"""A client refused while the model loads is told to come back then. How long it takes, nobody knows; the five
attempts that gRPC's own retries make at most shall outlast most starts."""

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

OWN_SERVICES = tuple(
    descriptor.services_by_name[name].full_name
    for descriptor, name in (
        (inference_pb2.DESCRIPTOR, "InferenceService"),
        (control_pb2.DESCRIPTOR, "ControlService"),
    )
)
ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Services(grpc.GenericRpcHandler):
    """The services of a gRPC server that need the model: they come later, and are refused until then.

    gRPC takes handlers only before it starts: this is one, and looks further by itself.
    """

    def __init__(self, awaited: Iterable[str]) -> None:
        """``awaited``: the full names of those to come."""
        # Strangers make names up, and the guard and the metrics keep every name that has a handler.
        self._awaited = frozenset(
            f"/{service}/{method}"
            for service in awaited
            for method in descriptor_pool.Default().FindServiceByName(service).methods_by_name
        )
        """Methods, as calls name them."""
        self._handlers: list[grpc.GenericRpcHandler] = []

    @property
    def registry(self) -> grpc.aio.Server:
        """What generated code calls a server, and asks for no more than the two methods below."""
        return cast(grpc.aio.Server, self)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """gRPC's way around the lookup, which its asyncio server does not go."""

    def complete(self) -> None:
        """All have come."""
        self._awaited = frozenset()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The method's handler; None for one that there is not."""
        for handler in self._handlers:
            if (found := handler.service(handler_call_details)) is not None:
                return found
        return _REFUSAL if handler_call_details.method in self._awaited else None


async def _refuse(requests: object, context: object) -> None:
    raise Failure("MODEL_LOADING", "the model is being loaded", retry_after=LOADING_SECONDS)


_REFUSAL: "grpc.RpcMethodHandler[Any, Any]" = grpc.stream_stream_rpc_method_handler(_refuse)
"""On the wire all kinds of RPCs are streams, and a status alone fits each of them."""


class Listener:
    """Open ports. Made by ``open_listener``; the services that need a model are added to it."""

    def __init__(
        self,
        security: Security,
        limits: SessionLimits,
        protocols: Collection[str],
        metrics: Metrics | None,
        tracer: Tracer | None,
        reflection_on: bool,
    ) -> None:
        self.addresses: list[str] = []
        """With the ports that were chosen for port 0; so are the next three."""
        self.health_addresses: list[str] = []
        """Those where nothing but health is served."""
        self.admin_addresses: list[str] = []
        self.metrics_address: str | None = None
        self.security = security
        self.limits = limits
        self.metrics = metrics
        self.tracer = tracer
        names = [*OWN_SERVICES, *(service for protocol in protocols for service in SERVICES[protocol])]
        self.health = HealthService(names)
        self.services = Services(names)
        self.admin_services = Services([ADMIN_SERVICE])

        stall_limit, authentication = limits.stall_limit, security.authentication
        rpcs = None if metrics is None else metrics.rpcs
        admin = None if authentication is None else Role.ADMIN
        self._server = _server(Guard(stall_limit, authentication, metrics=rpcs, tracer=tracer), self.services)
        self._health_server = _server(Guard(stall_limit))
        self._admin_server = _server(Guard(stall_limit, authentication, role=admin), self.admin_services)
        for server in (self._server, self._health_server):
            health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if reflection_on:
            reflection.enable_server_reflection(
                [*names, HEALTH_SERVICE, reflection.SERVICE_NAME], self._server
            )
        self._ports = contextlib.ExitStack()

    async def open(
        self,
        addresses: Sequence[str],
        health_addresses: Sequence[str],
        admin_addresses: Sequence[str],
        metrics_address: str | None,
    ) -> None:
        """Raises ``ConfigError`` where an address cannot be opened; then none is."""
        tls = None if self.security.tls is None else self.security.tls.credentials
        with contextlib.ExitStack() as opening:
            for server, wanted, protection, opened in (
                (self._server, addresses, tls, self.addresses),
                (self._health_server, health_addresses, None, self.health_addresses),
                (self._admin_server, admin_addresses, tls, self.admin_addresses),
            ):
                opened += [opening.enter_context(listen(server, address, protection)) for address in wanted]
            if self.metrics is not None and metrics_address is not None:
                metrics_server = self.metrics.serve(metrics_address)
                opening.callback(metrics_server.close)
                self.metrics_address = metrics_server.address
            for server in (self._server, self._health_server, self._admin_server):
                await server.start()
            self._ports = opening.pop_all()

    async def complete(self) -> None:
        """All services are here, and ready."""
        self.services.complete()
        self.admin_services.complete()
        await self.health.set_serving(True)

    async def close(self) -> bool:
        """End all RPCs, behind what they still have to say, and give the ports back.

        Returns False where gRPC cannot end: a client is frozen, with its buffers full.
        """
        await self.health.close()
        stopping = asyncio.create_task(self._server.stop(STOP_SECONDS))
        await asyncio.wait({stopping}, timeout=2 * STOP_SECONDS)
        is_closed = stopping.done()
        if is_closed:
            stopping.result()
        for side_server in (self._health_server, self._admin_server):
            await side_server.stop(SIDE_STOP_SECONDS)
        self._ports.close()
        return is_closed


def _server(guard: Guard, *services: Services) -> grpc.aio.Server:
    return grpc.aio.server(handlers=services, interceptors=[guard], options=GRPC_OPTIONS)


async def open_listener(
    addresses: Sequence[str],
    *,
    security: Security | None = None,
    limits: SessionLimits | None = None,
    health_addresses: Sequence[str] = (),
    admin_addresses: Sequence[str] = (),
    metrics_address: str | None = None,
    protocols: Collection[str] = (),
    tracer: Tracer | None = None,
    reflection_on: bool = False,
) -> Listener:
    """Open the ports. ``protocols``: other people's, that will be served.

    Raises ``ConfigError`` where an address cannot be opened.
    """
    listener = Listener(
        security or Security(),
        limits or SessionLimits(MAX_MESSAGE_BYTES),
        protocols,
        None if metrics_address is None else Metrics(),
        tracer,
        reflection_on,
    )
    await listener.open(addresses, health_addresses, admin_addresses, metrics_address)
    return listener
