"""Logprobs of prompts at the front: in pieces, before any output, each once to a stream that stays."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from front import Front, SessionClient, open_session, refusal_of, until

from tidegate.engine import messages
from tidegate.engine.client import EngineGone
from tidegate.engine.messages import Submit
from tidegate.service import intake
from tidegate.service.client import AsyncClient, PositionLogprobs
from tidegate.service.delivery import BATCH_TOKENS, Delivery
from tidegate.service.events import Event, Finished, PromptLogprobs, Timings, Usage
from tidegate.service.output import Output
from tidegate.service.session_limits import SessionLimits
from tidegate.v1 import control_pb2, inference_pb2

Start = Callable[..., Any]
LONG = "the tide comes in and goes out; " * 40


def sampling(top: int = 20, tokens: int = 5) -> dict[str, int]:
    return {"prompt_logprobs": top, "max_tokens": tokens}


def start(request_id: str, text: str = LONG, **fields: Any) -> dict[str, Any]:
    return {"request_id": request_id, "prompt": {"text": text}, "sampling": sampling(), **fields}


def pieces_of(responses: Iterable[Any]) -> list[Any]:
    return [r.prompt_logprobs for r in responses if r.WhichOneof("event") == "prompt_logprobs"]


def assert_whole(front: Front, pieces: list[Any], text: str = LONG, top: int = 20, first: int = 1) -> None:
    """Each of the prompt's tokens from ``first`` on, once and in order."""
    prompt = front.text.encode(text)
    offset = first
    for piece in pieces:
        assert piece.offset == offset
        assert 0 < len(piece.positions) * (1 + top) <= BATCH_TOKENS + top
        offset += len(piece.positions)
    positions = [position for piece in pieces for position in piece.positions]
    assert [position.chosen.token_id for position in positions] == prompt[first:]
    assert all(len(position.top) == top for position in positions)


async def resume(front: Front, lost: SessionClient, **next_offsets: int) -> SessionClient:
    session = SessionClient(front.inference.Session())
    points = [{"request_id": name, "next_offset": offset} for name, offset in next_offsets.items()]
    await session.send(open={"resume_token": lost.seen[0].opened.resume_token, "resume_points": points})
    await session.next("opened")
    return session


async def log_bytes(front: Front) -> int:
    listed = await front.control.ListSessions(control_pb2.ListSessionsRequest())
    return sum(session.unacked_log_bytes for session in listed.sessions)


@pytest.mark.parametrize("top", [0, 20])
@pytest.mark.parametrize("step", [None, 7])
async def test_they_come_in_pieces_before_any_output(front: Front, top: int, step: int | None) -> None:
    front.engine.prompt_step = step
    request = inference_pb2.GenerateRequest(prompt={"text": LONG}, sampling={**sampling(top), "n": 2})
    responses = [response async for response in front.inference.Generate(request)]
    kinds = [response.WhichOneof("event") for response in responses]
    assert_whole(front, pieces_of(responses), top=top)
    assert kinds[0] == "admitted"
    first_output = kinds.index("batch")
    assert all(kind == "prompt_logprobs" for kind in kinds[1:first_output])
    assert "prompt_logprobs" not in kinds[first_output:]
    assert kinds[-1] == "finished"


async def test_a_prompt_of_one_token_has_none(front: Front) -> None:
    request = inference_pb2.GenerateRequest(prompt={"text": "a"}, sampling=sampling())
    assert not pieces_of([response async for response in front.inference.Generate(request)])


async def test_one_answer_holds_them_all_and_not_more_than_fit(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = inference_pb2.GenerateUnaryRequest(prompt={"text": LONG}, sampling=sampling(2))
    response = await front.inference.GenerateUnary(request)
    ids = [position.chosen.token_id for position in response.prompt_logprobs]
    assert ids == front.text.encode(LONG)[1:]
    monkeypatch.setattr(intake, "MAX_UNARY_PROMPT_LOGPROBS", 3 * len(front.text.encode(LONG)) - 1)
    refusal = await refusal_of(front.inference.GenerateUnary(request))
    assert "use Generate" in refusal.violations["sampling.prompt_logprobs"]
    streamed = inference_pb2.GenerateRequest(prompt={"text": LONG}, sampling=sampling(2))
    assert pieces_of([response async for response in front.inference.Generate(streamed)])


async def test_a_resumed_stream_gets_them_again_unless_it_holds_output(start_front: Start) -> None:
    front = await start_front(limits=SessionLimits(max_message_bytes=2**20, unacked_log_bytes=2**22))
    lost = await open_session(front)
    await lost.send(start=start("r", credit=2))
    await lost.send(start=start("other", credit=2))
    while len(lost.progress("r")) + len(lost.progress("other")) < 4:
        await lost.next("progress")
    lost.call.cancel()
    again = await resume(front, lost, other=1)
    while not again.progress("r") and not again.deltas("r"):
        await again.next("batch", "progress")
    for name, is_told in (("r", True), ("other", False)):
        pieces = [piece for piece in pieces_of(again.seen) if piece.request_id == name]
        assert bool(pieces) is is_told
        if is_told:
            assert_whole(front, pieces)


async def test_they_count_in_the_sessions_log_until_output_is_acknowledged(start_front: Start) -> None:
    """More of them than the log may hold: other requests wait until then, and go on behind it."""
    front = await start_front(limits=SessionLimits(max_message_bytes=2**20, unacked_log_bytes=4000))
    session = await open_session(front)
    await session.send(start=start("r"))
    while not session.deltas("r"):
        await session.next("batch")
    held = await log_bytes(front)
    assert held > 100 * len(front.text.encode(LONG))
    await session.send(start={"request_id": "next", "prompt": {"text": "b"}, "sampling": {"max_tokens": 3}})
    await until(lambda: any(request.params.max_tokens == 3 for request in front.engine.waiting))
    await session.send(ack={"request_id": "r", "upto": 1})
    while not session.ends("next"):
        await session.next("finished")
    assert await log_bytes(front) < 4000
    lost = session
    lost.call.cancel()
    again = await resume(front, lost)
    while not again.ends("r"):
        await again.next("finished")
    assert not pieces_of(again.seen)


async def test_a_cancel_in_the_middle_of_a_prompt_ends_behind_those_that_came(front: Front) -> None:
    front.engine.step_seconds, front.engine.prompt_step = 0.05, 1200
    session = await open_session(front)
    await session.send(start=start("r"))
    await session.next("prompt_logprobs")
    await session.send(cancel={"request_id": "r"})
    await session.next("finished")
    positions = [position for piece in pieces_of(session.seen) for position in piece.positions]
    ids = [position.chosen.token_id for position in positions]
    assert ids == front.text.encode(LONG)[1 : 1 + len(ids)]
    assert len(ids) >= 1200


async def test_an_end_waits_for_those_that_a_message_had_no_room_for() -> None:
    position = messages.PositionLogprobs(messages.Logprob(7, -1.0, 1), [messages.Logprob(7, -1.0, 1)] * 20)
    output, delivery = Output("r"), Delivery()
    output.set_listener(delivery)
    output.push_prompt([position] * 1000)
    output.close(Finished("r", [], Usage(), Timings(0.0, None, 0.0)))
    taken: list[Event] = []
    while not any(isinstance(event, Finished) for event in taken):
        taken += await delivery.take()
    *pieces, _ = taken
    assert [type(piece) for piece in pieces] == [PromptLogprobs] * len(pieces)
    assert sum(len(piece.positions) for piece in pieces) == 1000


async def test_an_engine_that_dies_in_the_middle_of_a_prompt_costs_none_and_doubles_none(
    start_front: Callable[..., Awaitable[Front]],
) -> None:
    async def restart(gone: EngineGone) -> None:
        front.engine.revive()

    front = await start_front(restart=restart, step_seconds=0.002)
    front.engine.prompt_step = 100
    session = await open_session(front)
    await session.send(start=start("r"))
    for _ in range(3):
        await session.next("prompt_logprobs")
    front.engine.kill()
    await session.next("finished", "request_error")
    assert session.ends("r") == ["finished"]
    first, again = (command.request for command in front.engine.sent(Submit))
    assert first.num_scored == 0
    assert again.num_scored > 0
    assert_whole(front, pieces_of(session.seen))
    assert session.text("r") == front.engine.expected(LONG, 5)


async def test_an_engine_that_leaves_some_out_fails_the_request(front: Front) -> None:
    front.engine.prompt_step = 10
    session = await open_session(front)
    front.engine._scored["r0"] = 3
    await session.send(start=start("r"))
    error = (await session.next("request_error")).request_error
    assert "TOKENS_OUT_OF_ORDER" in str(error)


def assert_told(front: Front, positions: list[PositionLogprobs] | tuple[PositionLogprobs, ...]) -> None:
    assert [position.chosen.token_id for position in positions] == front.text.encode(LONG)[1:]


async def test_the_python_client_has_them_whole_before_the_first_chunk(front: Front) -> None:
    async with AsyncClient(front.server.addresses[0]) as client, client.session() as session:
        for stream in (
            client.generate(LONG, max_tokens=5, prompt_logprobs=20),
            await session.start(LONG, max_tokens=5, prompt_logprobs=20),
        ):
            first = await anext(stream)
            assert_told(front, stream.prompt_logprobs)
            assert first.text + await stream.text() == front.engine.expected(LONG, 5)
        response = await client.generate_unary(LONG, max_tokens=5, prompt_logprobs=1)
        assert_told(front, response.prompt_logprobs)
