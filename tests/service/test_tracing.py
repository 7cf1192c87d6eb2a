"""Spans of requests: what they are named, whose trace they belong to, what they hold."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
import pytest
from fake_engine import POISON
from front import Front, open_session, refusal_of, until
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tidegate.service.tracing import Tracing, over_otlp
from tidegate.v1 import inference_pb2

Start = Callable[..., Any]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)


def unary(text: str = "the tide", **fields: Any) -> inference_pb2.GenerateUnaryRequest:
    return inference_pb2.GenerateUnaryRequest(prompt={"text": text}, sampling={"max_tokens": 3}, **fields)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def front(start_front: Start, exporter: InMemorySpanExporter) -> Front:
    started: Front = await start_front(tracer=Tracing(SimpleSpanProcessor(exporter)))
    return started


def named(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


async def test_a_request_is_a_span_with_its_queue_its_prefill_and_its_decode(
    front: Front, exporter: InMemorySpanExporter
) -> None:
    await front.inference.GenerateUnary(unary(request_id="r-1"))
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["queue", "prefill", "decode", "request"]
    request = named(spans, "request")
    for span in spans[:3]:
        assert span.parent is not None
        assert span.parent.span_id == request.context.span_id
    for before, after in itertools.pairwise(spans[:3]):
        assert before.end_time is not None
        assert after.start_time is not None
        assert before.end_time <= after.start_time
    assert request.attributes is not None
    assert request.attributes["tidegate.request_id"] == "r-1"
    assert request.attributes["gen_ai.usage.input_tokens"] == len("the tide")
    assert request.attributes["gen_ai.usage.output_tokens"] == 3
    assert request.attributes["gen_ai.response.finish_reasons"] == ("max_tokens",)
    assert request.parent is None


async def test_requests_belong_to_the_callers_trace_each_to_its_own(
    front: Front, exporter: InMemorySpanExporter
) -> None:
    await front.inference.GenerateUnary(unary(), metadata=TRACEPARENT)
    await front.inference.GenerateUnary(unary())
    first, second = [span for span in exporter.get_finished_spans() if span.name == "request"]
    assert f"{first.context.trace_id:032x}" == TRACE
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == PARENT
    assert f"{second.context.trace_id:032x}" != TRACE


async def test_all_requests_of_a_session_belong_to_its_trace(
    front: Front, exporter: InMemorySpanExporter
) -> None:
    call = front.inference.Session(metadata=TRACEPARENT)
    session = await open_session(front)
    session.call.cancel()
    session.call = call
    await session.send(open={})
    await session.next("opened")
    for request_id in ("a", "b"):
        start = {"request_id": request_id, "prompt": {"text": "x"}, "sampling": {"max_tokens": 2}}
        await session.send(start=start)
    await session.send(close={})
    await session.rest()
    requests = [span for span in exporter.get_finished_spans() if span.name == "request"]
    assert [f"{span.context.trace_id:032x}" for span in requests] == [TRACE] * 2


async def test_what_happens_to_its_kv_is_an_event_of_the_span(
    front: Front, exporter: InMemorySpanExporter
) -> None:
    session = await open_session(front)
    start = {"request_id": "r", "prompt": {"text": "x"}, "sampling": {"max_tokens": 4}, "credit": 2}
    await session.send(start=start)
    await session.next("progress")
    await session.next("progress")
    await session.send(credit={"request_id": "r", "upto": 4})
    await session.next("finished")
    events = [event.name for event in named(exporter.get_finished_spans(), "request").events]
    assert events == ["stalled", "parked", "resumed"]


async def test_a_failed_request_says_why(front: Front, exporter: InMemorySpanExporter) -> None:
    await refusal_of(front.inference.GenerateUnary(unary(f"x{POISON}")))
    span = named(exporter.get_finished_spans(), "request")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "NONFINITE_LOGITS")


async def test_a_client_that_left_is_told_from_one_that_was_served(
    front: Front, exporter: InMemorySpanExporter
) -> None:
    front.engine.admits = False
    call = front.inference.Generate(inference_pb2.GenerateRequest(prompt={"text": "x"}))
    await until(lambda: front.engine.waiting)
    call.cancel()
    await until(exporter.get_finished_spans)
    await until(lambda: len(exporter.get_finished_spans()) == 2)
    span = named(exporter.get_finished_spans(), "request")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "CLIENT_LEFT")


async def test_spans_reach_a_collector(start_front: Start) -> None:
    """Over the wire, as in production."""
    got: list[str] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
        async def Export(self, request: Any, context: object) -> Any:
            got.extend(
                span.name
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            )
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    tracer = over_otlp(f"http://127.0.0.1:{port}")
    front = await start_front(tracer=tracer)
    await front.inference.GenerateUnary(unary())
    await asyncio.to_thread(tracer.close)
    assert sorted(got) == ["decode", "prefill", "queue", "request"]
    await collector.stop(None)
