"""Puts a model behind open ports: its servicers, what they share, and how all of that drains."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version

from tidegate.engine.client import EngineClient, EngineGone
from tidegate.engine.messages import EngineInfo
from tidegate.engine.text import Text
from tidegate.service.admin import AdminService
from tidegate.service.admission import Admission, AdmissionLimits
from tidegate.service.compat.protocols import Compat, add_protocols
from tidegate.service.config import MAX_DRAIN_GRACE
from tidegate.service.control import ControlService
from tidegate.service.generation import Generation
from tidegate.service.hub import Hub, draining
from tidegate.service.inference import InferenceService
from tidegate.service.intake import Intake
from tidegate.service.listener import Listener
from tidegate.service.logging import RequestLog
from tidegate.service.observe import Observer, Observers
from tidegate.service.sessions import Sessions
from tidegate.v1 import admin_pb2_grpc, control_pb2_grpc, inference_pb2_grpc

HANDOVER_SECONDS = 2.0
"""Without credit for so long, a request is not waited for in a drain."""


class Server:
    """A server that serves a model. Made by ``start_server``."""

    def __init__(
        self, listener: Listener, hub: Hub, sessions: Sessions, drain_asked: "asyncio.Future[float | None]"
    ) -> None:
        self.listener = listener
        self.addresses = listener.addresses
        self.drain_asked = drain_asked
        """Done when an operator asks for it, with the grace."""
        self.engine_ended = asyncio.create_task(hub.run())
        """Fails once the engine is gone. Every request has ended by then."""
        self.is_closed = False
        """After ``stop``, False where gRPC cannot end: a client is frozen, with its buffers full."""
        self._hub = hub
        self._sessions = sessions

    async def drain(self, grace: float) -> None:
        """Take nothing new, let requests under way finish within ``grace`` seconds, and stop.

        One whose client gives no credit cannot finish: it is ended sooner, for another server to go on with.
        """
        self._hub.is_draining = True
        await self.listener.health.set_serving(False)
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
        self._hub.stopping.set()
        self._sessions.close()
        self.is_closed = await self.listener.close()
        self.engine_ended.cancel()
        await asyncio.wait({self.engine_ended})
        self._hub.close()


async def start_server(
    listener: Listener,
    engine: EngineClient,
    text: Text,
    *,
    admission: AdmissionLimits | None = None,
    memory: Callable[[], float] | None = None,
    compat: Compat | None = None,
    restart: Callable[[EngineGone], Awaitable[None]] | None = None,
) -> Server:
    """Serve an engine that is ready, on ports that are open.

    ``memory`` is as in ``Admission``. Engine and text stay the caller's to close. ``restart``
    is the hub's.
    """
    fingerprint = _fingerprint(engine.info)
    hub = Hub(
        engine,
        text,
        Admission(admission or AdmissionLimits(), memory),
        restart=restart,
        set_serving=listener.health.set_serving,
    )
    intake = Intake(hub, text)
    sessions = Sessions(hub, intake, listener.limits, fingerprint)

    observers: list[Observer] = [RequestLog()]
    if listener.metrics is not None:
        listener.metrics.watch(engine.info, hub)
        observers.append(listener.metrics.requests)
    if listener.tracer is not None:
        observers.append(listener.tracer)
    hub.observer = Observers(*observers)

    registry = listener.services.registry
    if compat is not None:
        add_protocols(registry, compat, intake, hub)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceService(text, intake, sessions), registry
    )
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlService(hub, text, sessions, fingerprint), registry
    )
    drain_asked: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
    admin_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminService(hub, partial(_ask_for_drain, drain_asked), MAX_DRAIN_GRACE),
        listener.admin_services.registry,
    )
    server = Server(listener, hub, sessions, drain_asked)
    await listener.complete()
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
