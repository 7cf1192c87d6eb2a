"""Hostile and clumsy clients: whatever they send, every request ends once, and nobody else suffers."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_engine import MAX_MODEL_LEN, byte_text
from front import Front, open_session, read_error, refusal_of
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.messages import Finished as EngineFinished
from tidegate.engine.messages import Timings, Usage
from tidegate.engine.request import FinishReason, Request, SamplingParams
from tidegate.service.addresses import check_address
from tidegate.service.config import ServerConfig
from tidegate.service.delivery import Delivery
from tidegate.service.errors import MAX_VIOLATIONS
from tidegate.service.events import Failed
from tidegate.service.generation import Generation
from tidegate.service.listener import STOP_SECONDS
from tidegate.service.session import UNREAD_REFUSALS
from tidegate.v1 import control_pb2, inference_pb2, prompt_pb2

MANY = MAX_MODEL_LEN + 1


def start(request_id: str, max_tokens: int = 5) -> Any:
    return {"request_id": request_id, "prompt": {"text": "tide"}, "sampling": {"max_tokens": max_tokens}}


async def test_an_id_whose_refusal_is_on_its_way_is_taken(front: Front) -> None:
    """Were it free, its next use would end twice, or not at all."""
    session = await open_session(front)
    await session.send(fork={"branches": [{"request_id": "a"}] * 50})
    # Comes behind the refusal or before it was written; either way it has one answer of its own.
    await session.send(start=start("a", max_tokens=200))
    await session.send(close={})
    await session.rest()
    kinds = [response.WhichOneof("event") for response in session.seen]
    assert session.ends("a")[0] == "request_error"
    assert kinds.count("request_error") == 1
    assert kinds.count("command_rejected") + kinds.count("finished") == 50


async def test_a_client_that_reads_nothing_is_not_read_without_end(front: Front) -> None:
    """Refusals wait for it in memory, up to a limit; all the others wait in its own."""
    session = await open_session(front)
    number = 30 * UNREAD_REFUSALS  # more than gRPC itself holds of the answers

    async def flood() -> None:
        for _ in range(number):
            await session.send(update={"request_id": "x" * 1000})
            nonlocal sent
            sent += 1
        await session.send(start=start("a"))

    sent, before = 0, -1
    flooding = asyncio.create_task(flood())
    while sent > before and not flooding.done():
        before = sent
        await asyncio.sleep(0.5)
    assert sent < number
    # Once it reads, it is served again.
    await session.next("finished")
    await flooding
    session.call.cancel()


async def test_a_flood_of_refused_starts_is_answered_one_by_one(front: Front) -> None:
    session = await open_session(front)
    number = 3 * UNREAD_REFUSALS

    async def send() -> None:
        for index in range(number):
            await session.send(start={**start(f"r{index}"), "model": "another"})
        await session.send(close={})

    sending = asyncio.create_task(send())
    await session.rest()
    await sending
    answered = [r.request_error.request_id for r in session.seen if r.HasField("request_error")]
    assert answered == [f"r{index}" for index in range(number)]


async def test_thousands_of_violations_still_come_with_their_details(front: Front) -> None:
    """More of them than gRPC's trailers hold would arrive without any."""
    chat = {"messages": [{"role": "user", "content": [{}]}] * 5000}
    refusal = await refusal_of(front.inference.Generate(inference_pb2.GenerateRequest(prompt={"chat": chat})))
    assert refusal.reason == "INVALID_REQUEST"
    assert len(refusal.violations) == MAX_VIOLATIONS
    assert refusal.message.endswith(f" and {5000 - MAX_VIOLATIONS} more")


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt.token_ids.ids", {"prompt": {"token_ids": {"ids": [1] * MANY}}}),
        ("generated_token_ids", {"prompt": {"text": "a"}, "generated_token_ids": [1] * MANY}),
        ("sampling.stop_token_ids", {"prompt": {"text": "a"}, "sampling": {"stop_token_ids": [1] * MANY}}),
    ],
)
async def test_more_ids_than_the_context_are_refused_unread(
    front: Front, field: str, fields: dict[str, Any]
) -> None:
    refusal = await refusal_of(front.inference.Generate(inference_pb2.GenerateRequest(**fields)))
    assert "exceed" in refusal.violations[field]


async def test_more_ids_than_the_context_are_not_detokenized(front: Front) -> None:
    request = inference_pb2.DetokenizeRequest(token_ids=[1] * MANY)
    refusal = await refusal_of(front.inference.Detokenize(request))
    assert list(refusal.violations) == ["token_ids"]


@pytest.mark.parametrize("messages", [[{}] * 2**15, [{"content": [{}] * 2**15}]])
async def test_a_conversation_of_too_many_parts_is_not_rendered(
    front: Front, messages: list[dict[str, Any]]
) -> None:
    prompt = prompt_pb2.Prompt(chat={"messages": messages})
    refusal = await refusal_of(front.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=prompt)))
    assert "at most" in refusal.violations["prompt.chat.messages"]


async def test_a_role_counts_as_text_of_the_prompt(front: Front) -> None:
    role = "x" * (2**22 + 1)
    prompt = prompt_pb2.Prompt(chat={"messages": [{"role": role}]})
    refusal = await refusal_of(front.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=prompt)))
    assert list(refusal.violations) == ["prompt.chat.messages"]


async def test_watchers_are_told_of_the_stop_and_do_not_delay_it(front: Front) -> None:
    health = health_pb2_grpc.HealthStub(front.channel).Watch(health_pb2.HealthCheckRequest())
    load = front.control.WatchLoad(control_pb2.WatchLoadRequest(min_interval={"seconds": 3600}))
    await health.read()
    await load.read()

    async def read_on(call: Any) -> None:
        while True:
            await call.read()

    await asyncio.wait_for(front.server.stop(), STOP_SECONDS / 2)
    for call in (health, load):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on(call)
        assert read_error(caught.value).reason == "DRAINING"


async def test_nothing_comes_behind_the_failure_of_one_choice() -> None:
    """Another choice that ends in the same step has no more to say."""
    delivery = Delivery()
    generation = Generation(
        "r",
        "local",
        num_choices=2,
        credit=None,
        unread=None,
        time_limit=None,
        send=lambda command: None,
        on_end=lambda ended: None,
    )
    request = Request(id="e", prompt_token_ids=[1], params=SamplingParams(n=2), seed=0)
    generation.join(None, delivery, None)
    generation.prepare(request, byte_text(), 0, [])
    for choice, reason in enumerate((FinishReason.ERROR, FinishReason.CONTEXT_LENGTH)):
        usage, timings = Usage(1, 0, 0, 0, 0), Timings(0.0, None, 0.0)
        generation.on_choice_end(EngineFinished("e", choice, reason, usage, timings, "NONFINITE_LOGITS"))
    generation.finish_if_confirmed()
    (event,) = await delivery.take()
    assert isinstance(event, Failed)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [(lambda folder: folder / ("x" * 108), "bytes"), (lambda folder: folder / "a%41", "%")],
)
def test_a_path_that_no_socket_can_have_is_refused(
    tmp_path: Path, path: Callable[[Path], Path], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_address(f"unix:{path(tmp_path)}", may_be_reached=False)


@pytest.mark.parametrize("grace", [float("nan"), float("inf"), -1.0])
def test_a_grace_that_no_clock_can_measure_is_refused(grace: float) -> None:
    with pytest.raises(ConfigError, match="drain_grace"):
        ServerConfig(engine=EngineConfig(model="demo"), drain_grace=grace)
