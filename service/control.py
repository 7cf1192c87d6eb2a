"""``ControlService``: what a router or a balancer needs to know."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from importlib.metadata import version

from google.protobuf.timestamp_pb2 import Timestamp

from tidegate.engine.messages import Inspect, Inspection
from tidegate.engine.request import Violation
from tidegate.engine.text import Text
from tidegate.service import convert
from tidegate.service.errors import Failure
from tidegate.service.hub import Hub, draining
from tidegate.service.identity import Role, caller
from tidegate.service.intake import check_model, seconds
from tidegate.service.sessions import Sessions
from tidegate.v1 import control_pb2, control_pb2_grpc

MIN_INTERVAL = 0.01
DEFAULT_INTERVAL = 1.0
MAX_SEQUENCES = 1000


class ControlService(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, hub: Hub, text: Text, sessions: Sessions, fingerprint: str) -> None:
        self._hub = hub
        self._text = text
        self._sessions = sessions
        self._fingerprint = fingerprint
        self._incarnation = uuid.uuid4().hex
        self._started_at = Timestamp()
        self._started_at.FromNanoseconds(time.time_ns())

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: object
    ) -> control_pb2.GetServerInfoResponse:
        admission = self._hub.admission.limits
        return control_pb2.GetServerInfoResponse(
            version=version("tidegate"),
            incarnation=self._incarnation,
            started_at=self._started_at,
            draining=self._hub.is_draining,
            session_limits=self._sessions.limits.message(),
            max_waiting=admission.max_waiting,
            max_waiting_tokens=admission.max_waiting_tokens,
            tenant_requests=admission.tenant_requests,
            tenant_tokens=admission.tenant_tokens,
        )

    async def GetModelInfo(
        self, request: control_pb2.GetModelInfoRequest, context: object
    ) -> control_pb2.GetModelInfoResponse:
        info = self._hub.info
        check_model(request.model if request.HasField("model") else None, info.model)
        return control_pb2.GetModelInfoResponse(
            model=info.model,
            architecture=info.architecture,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            has_chat_template=self._text.has_chat_template,
            block_size=info.block_size,
            device_blocks=info.device_blocks,
            host_blocks=info.host_blocks,
            kv_bytes_per_token=info.kv_bytes_per_token,
            device=info.device,
            dtype=info.dtype,
            fingerprint=self._fingerprint,
        )

    async def WatchLoad(
        self, request: control_pb2.WatchLoadRequest, context: object
    ) -> AsyncGenerator[control_pb2.WatchLoadResponse]:
        interval = DEFAULT_INTERVAL
        if request.HasField("min_interval"):
            interval = seconds(request.min_interval)
        if interval < MIN_INTERVAL:
            raise Failure.invalid([Violation("min_interval", "must be at least 10 ms")])
        last = None
        while True:
            stats, is_draining = self._hub.stats, self._hub.is_draining
            if last != (stats, is_draining):
                last = (stats, is_draining)
                yield control_pb2.WatchLoadResponse(
                    load=convert.load(stats, is_draining), totals=convert.totals(stats)
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hub.stopping.wait(), interval)
                raise draining()

    async def Inspect(
        self, request: control_pb2.InspectRequest, context: object
    ) -> control_pb2.InspectResponse:
        most = request.max_sequences if request.HasField("max_sequences") else MAX_SEQUENCES
        if not 1 <= most <= MAX_SEQUENCES:
            raise Failure.invalid([Violation("max_sequences", f"must be from 1 to {MAX_SEQUENCES}")])
        inspection = await self._hub.ask(Inspect(most), Inspection)
        stats = self._hub.stats
        return control_pb2.InspectResponse(
            load=convert.load(stats, self._hub.is_draining),
            totals=convert.totals(stats),
            device_slots=inspection.device,
            host_slots=inspection.host,
            sequences=[
                convert.sequence(view, self._request_id(view.request_id)) for view in inspection.sequences
            ],
            swap_out=convert.link(stats.swap_out),
            swap_in=convert.link(stats.swap_in),
        )

    def _request_id(self, engine_id: str) -> str | None:
        """The caller's own name for a request of the engine; None where it is another tenant's."""
        generation = self._hub.submitted(engine_id)
        if generation is None or generation.tenant != caller().tenant:
            return None
        return generation.request_id

    async def ListSessions(
        self, request: control_pb2.ListSessionsRequest, context: object
    ) -> control_pb2.ListSessionsResponse:
        sessions = self._sessions.of(_tenant(request))
        return control_pb2.ListSessionsResponse(sessions=[session.state() for session in sessions])

    async def Abort(self, request: control_pb2.AbortRequest, context: object) -> control_pb2.AbortResponse:
        generation = self._hub.find(_tenant(request), request.request_id)
        if generation is None:
            return control_pb2.AbortResponse(aborted=False)
        generation.cancel()
        return control_pb2.AbortResponse(aborted=True)


def _tenant(request: control_pb2.AbortRequest | control_pb2.ListSessionsRequest) -> str:
    """Whom a request is about. Raises ``Failure`` where the caller may not name another tenant."""
    tenant = request.tenant if request.HasField("tenant") else caller().tenant
    if tenant != caller().tenant and caller().role is not Role.ROUTER:
        raise Failure("TENANT_NOT_ALLOWED", "only a router may name another tenant")
    return tenant
