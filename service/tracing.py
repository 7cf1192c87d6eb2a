"""OpenTelemetry: a span for each request, and one each for its queue, its prefill and its decode.

Loaded where an endpoint is given only: OpenTelemetry is an extra (``tidegate[tracing]``).
"""

from dataclasses import dataclass
from importlib.metadata import version

from opentelemetry import context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tidegate.engine.messages import ProgressKind
from tidegate.service.events import Failed, Finished
from tidegate.service.generation import Generation
from tidegate.service.observe import Tracer

EXPORT_SECONDS = 5.0
"""For one batch of spans; then they are lost."""


@dataclass(slots=True)
class _Spans:
    whole: Span
    phase: Span
    """The queue, the prefill or the decode: one behind the other."""
    name: str


class Tracing(Tracer):
    """Spans hold names, numbers and reasons, never text of a prompt."""

    hears_tokens = True

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({SERVICE_NAME: "tidegate", SERVICE_VERSION: version("tidegate")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tidegate")
        self._propagator = TraceContextTextMapPropagator()
        self._spans: dict[Generation, _Spans] = {}

    def close(self) -> None:
        """Send what was not sent yet; takes seconds where nobody listens."""
        self._provider.shutdown()

    def attach(self, metadata: dict[str, str]) -> None:
        """What the present RPC's tasks start belongs to the caller's trace, where these name one."""
        context.attach(self._propagator.extract(metadata))

    def on_open(self, generation: Generation) -> None:
        attributes = {"tidegate.request_id": generation.request_id, "tidegate.tenant": generation.tenant}
        whole = self._tracer.start_span("request", kind=SpanKind.SERVER, attributes=attributes)
        self._spans[generation] = _Spans(whole, self._start("queue", whole), "queue")

    def on_admitted(self, generation: Generation) -> None:
        self._next(generation, "queue", "prefill")

    def on_tokens(self, generation: Generation, choice: int, now: float) -> None:
        self._next(generation, "prefill", "decode")

    def on_progress(self, generation: Generation, choice: int, kind: ProgressKind) -> None:
        self._spans[generation].whole.add_event(kind.value, {"tidegate.choice": choice})

    def on_end(self, generation: Generation) -> None:
        spans = self._spans.pop(generation)
        spans.phase.end()
        whole, end = spans.whole, generation.end
        match end:
            case Finished():
                whole.set_attribute("gen_ai.usage.input_tokens", end.usage.prompt_tokens)
                whole.set_attribute("gen_ai.usage.output_tokens", end.usage.output_tokens)
                whole.set_attribute("tidegate.cached_tokens", end.usage.cached_tokens)
                reasons = [choice.reason.value for choice in end.choices]
                whole.set_attribute("gen_ai.response.finish_reasons", reasons)
            case Failed():
                whole.set_attribute("rpc.grpc.status_code", end.failure.code.value[0])
                whole.set_status(Status(StatusCode.ERROR, end.failure.reason))
            case None:
                whole.set_status(Status(StatusCode.ERROR, "CLIENT_LEFT"))
        whole.end()

    def _next(self, generation: Generation, before: str, name: str) -> None:
        """Begin a phase, unless the one that it follows is over already."""
        spans = self._spans[generation]
        if spans.name == before:
            spans.phase.end()
            spans.phase, spans.name = self._start(name, spans.whole), name

    def _start(self, name: str, parent: Span) -> Span:
        return self._tracer.start_span(name, context=set_span_in_context(parent))


def over_otlp(endpoint: str) -> Tracing:
    """To a collector. ``endpoint``: ``http://HOST:PORT``, or ``https://`` for TLS."""
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_SECONDS
    )
    return Tracing(BatchSpanProcessor(exporter))
