"""Prompts leave no trace: canaries go through all ways to fail, and must be in no status, log, metric, span.

Their number is set by TIDEGATE_CANARIES; the run prints how many went which way.
"""

import asyncio
import itertools
import os
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_engine import DEADLY, POISON
from front import Front, open_session, until
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tidegate.compat.kserve import grpc_service_pb2, grpc_service_pb2_grpc
from tidegate.engine.client import EngineGone
from tidegate.service.admission import AdmissionLimits
from tidegate.service.compat.protocols import Compat
from tidegate.service.tracing import Tracing
from tidegate.v1 import inference_pb2

CANARY = "kanarienvogel"
COUNT = int(os.environ.get("TIDEGATE_CANARIES", "400"))

Way = Callable[[Front, str], Awaitable[str]]


async def told(call: Any) -> str:
    """All that a client is told of a failure; what is generated is the model's, and not looked at."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        trailers = [value for _, value in iter(error.trailing_metadata())]
        texts = [
            value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in trailers
        ]
        return " ".join([str(error.details()), *texts])
    return ""


def request(text: str, **fields: Any) -> inference_pb2.GenerateUnaryRequest:
    sampling = {"max_tokens": 2, **fields.pop("sampling", {})}
    return inference_pb2.GenerateUnaryRequest(prompt={"text": text}, sampling=sampling, **fields)


async def computed_to_nan(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(text + POISON)))


async def invalid_beside_it(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(text, sampling={"top_p": 7, "stop": [text, ""]})))


async def constraints_of_what_fails(front: Front, text: str) -> str:
    constraints = {"structured_output": {"grammar": f'start: "{text}"'}, "bad_words": [text]}
    return await told(front.inference.GenerateUnary(request(POISON, sampling=constraints)))


async def constraints_that_are_none(front: Front, text: str) -> str:
    constraints = {"structured_output": {"choices": {"values": [text, ""]}}, "bad_words": [text, ""]}
    return await told(front.inference.GenerateUnary(request("x", sampling=constraints)))


async def a_schema_in_anothers_protocol(front: Front, text: str) -> str:
    infer = grpc_service_pb2.ModelInferRequest(model_name="fake")
    infer.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    sampling = infer.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    sampling.contents.bytes_contents.append(f'{{"structured_output": {{"{text}": 1}}}}'.encode())
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(front.channel)
    return await told(stub.ModelInfer(infer))


async def too_long(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(text * 200)))


async def another_model(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(text, model="another")))


async def a_reader_that_breaks(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(f"broken {text}")))


async def broken_bytes(front: Front, text: str) -> str:
    call = front.channel.unary_unary(
        "/tidegate.v1.InferenceService/GenerateUnary", request_serializer=bytes, response_deserializer=bytes
    )
    return await told(call(request(text).SerializeToString() + b"\xff" + text.encode()))


async def a_chat_without_content(front: Front, text: str) -> str:
    messages = [{"role": text, "content": [{"text": text}, {}]}]
    call = front.inference.Generate(inference_pb2.GenerateRequest(prompt={"chat": {"messages": messages}}))
    return await told(call)


async def over_its_quota(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(text, sampling={"max_tokens": 1900})))


async def out_of_time(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(text, time_limit={"nanos": 1})))


async def a_client_that_leaves(front: Front, text: str) -> str:
    call = front.inference.Generate(inference_pb2.GenerateRequest(prompt={"text": text}))
    call.cancel()
    return ""


async def refused_in_a_session(front: Front, text: str) -> str:
    session = await open_session(front)
    await session.send(start={"request_id": "r", "prompt": {"text": text + POISON}})
    await session.send(start={"request_id": "s", "prompt": {"text": text}, "sampling": {"stop": [""]}})
    for _ in range(2):
        await session.next("request_error")
    session.call.cancel()
    return " ".join(str(response.request_error) for response in session.seen)


async def deadly_to_the_engine(front: Front, text: str) -> str:
    return await told(front.inference.GenerateUnary(request(text + DEADLY)))


async def wrong_in_anothers_protocol(front: Front, text: str) -> str:
    infer = grpc_service_pb2.ModelInferRequest(model_name="fake", id=text)
    infer.inputs.add(name="text_input", datatype="BYTES", shape=[2]).contents.bytes_contents.append(
        text.encode()
    )
    infer.parameters["sampling_parameters"].string_param = f'{{"stop": "{text}", "top_p": 7'
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(front.channel)
    return await told(stub.ModelInfer(infer))


WAYS: list[Way] = [
    computed_to_nan,
    invalid_beside_it,
    constraints_of_what_fails,
    constraints_that_are_none,
    a_schema_in_anothers_protocol,
    too_long,
    another_model,
    a_reader_that_breaks,
    broken_bytes,
    a_chat_without_content,
    over_its_quota,
    out_of_time,
    a_client_that_leaves,
    refused_in_a_session,
    deadly_to_the_engine,
    wrong_in_anothers_protocol,
]


@pytest.mark.timeout(1200)
async def test_no_prompt_is_in_a_status_a_log_a_metric_or_a_span(
    start_front: Callable[..., Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    may_restart = True

    async def restart(gone: EngineGone) -> None:
        if not may_restart:
            raise gone
        front.engine.revive()

    front = await start_front(
        restart=restart,
        compat=Compat(["kserve"], Path(), max_num_seqs=1),
        metrics_address="127.0.0.1:0",
        tracer=Tracing(SimpleSpanProcessor(exporter)),
        admission=AdmissionLimits(tenant_tokens=1500),
    )
    encode = front.text.encode_async

    async def encode_or_break(text: str, add_special_tokens: bool = True) -> list[int]:
        if text.startswith("broken"):
            raise RuntimeError(f"cannot read {text}")
        ids: list[int] = await encode(text, add_special_tokens)
        return ids

    monkeypatch.setattr(front.text, "encode_async", encode_or_break)
    ways: Counter[str] = Counter()
    statuses = []
    for number, way in zip(range(COUNT), itertools.cycle(WAYS), strict=False):
        statuses.append(await way(front, f"{CANARY}-{number}"))
        ways[way.__name__] += 1
    # And with the engine's end, what runs at that time.
    front.engine.admits = False
    ending = asyncio.ensure_future(told(front.inference.GenerateUnary(request(CANARY))))
    await until(lambda: front.engine.waiting)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://{front.server.listener.metrics_address}/metrics") as response:
            text: str = response.read().decode()
            return text

    metrics = await asyncio.to_thread(scrape)
    may_restart = False
    front.engine.kill()
    statuses.append(await ending)
    spans = [span.to_json() for span in exporter.get_finished_spans()]
    captured = capfd.readouterr()
    assert all(statuses[index] for index, way in enumerate(WAYS) if way is not a_client_that_leaves)
    assert "RuntimeError" in captured.out + captured.err
    assert len(spans) > COUNT / 2
    for name, texts in {
        "statuses": statuses,
        "metrics": [metrics],
        "spans": spans,
        "log": [captured.out, captured.err],
    }.items():
        assert not [text for text in texts if CANARY in text], name
    print(
        f"{sum(ways.values())} canaries: {dict(ways)}; 0 seen in {len(statuses)} statuses, {len(spans)} spans"
    )
