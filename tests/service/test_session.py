"""Sessions over a real channel, with a fake engine behind the front."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc.aio
import pytest
from fake_engine import POISON
from front import SECONDS, Front, SessionClient, open_session, read_error, read_status, until
from google.protobuf.duration_pb2 import Duration
from google.protobuf.unknown_fields import UnknownFieldSet

from tidegate.engine.messages import Finish, Limit, Submit
from tidegate.service.session_limits import DEFAULT_CREDIT, SessionLimits
from tidegate.v1 import control_pb2, events_pb2, session_pb2

Start = Callable[..., Any]


def start(request_id: str, text: str = "the tide", max_tokens: int = 10, **fields: Any) -> Any:
    sampling = {"max_tokens": max_tokens, **fields.pop("sampling", {})}
    return {"request_id": request_id, "prompt": {"text": text}, "sampling": sampling, **fields}


async def end_of(session: SessionClient) -> Any:
    """How the stream ends, read to its end."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session.rest()
    return read_error(caught.value)


async def test_open_tells_the_limits_and_what_is_served(front: Front) -> None:
    session = await open_session(front)
    opened = session.seen[0].opened
    assert opened.model == "fake"
    assert opened.fingerprint
    assert opened.limits.default_credit == DEFAULT_CREDIT
    assert opened.limits.open_timeout.seconds == 5
    assert opened.limits.credit_pool * 4 == opened.limits.unacked_log_bytes
    assert len(opened.resume_token.partition(".")[2]) * 6 >= 128  # base64
    await session.send(close={})
    await session.rest()


async def test_many_requests_share_a_stream(front: Front) -> None:
    session = await open_session(front)
    for index in range(20):
        await session.send(start=start(f"r{index}", f"prompt {index}"))
    await session.send(close={})
    await session.rest()
    for index in range(20):
        assert session.text(f"r{index}") == front.engine.expected(f"prompt {index}", 10)
        assert session.ends(f"r{index}") == ["finished"]
    assert await session.call.code() == grpc.StatusCode.OK


async def test_a_step_of_the_engine_is_one_message(start_front: Start) -> None:
    front = await start_front(step_seconds=0.01)
    front.engine.admits = False
    session = await open_session(front)
    for index in range(8):
        await session.send(start=start(f"r{index}"))
    await until(lambda: len(front.engine.waiting) == 8)
    front.engine.admits = True
    front.engine.go_on()
    await session.send(close={})
    await session.rest()
    batches = [r.batch for r in session.seen if r.WhichOneof("event") == "batch"]
    # Where the machine is busy, one message holds several steps.
    assert {len(batch.deltas) for batch in batches} == {8}
    assert sum(len(delta.token_ids) for batch in batches for delta in batch.deltas) == 8 * 10


async def test_half_closing_lets_running_requests_finish(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("a", max_tokens=50))
    await session.call.done_writing()
    await session.rest()
    assert session.ends("a") == ["finished"]


async def test_without_credit_a_request_stalls_and_credit_lets_it_go_on(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("held", max_tokens=12, credit=5))
    await session.send(start=start("free", "other", max_tokens=12))
    await session.next("progress")
    await session.next("progress")
    while not session.ends("free"):
        await session.next("finished")
    assert len(session.text("held")) == 5
    assert session.progress("held") == [
        events_pb2.PROGRESS_KIND_STALLED,
        events_pb2.PROGRESS_KIND_PARKED,
    ]
    await session.send(credit={"request_id": "held", "upto": 3})
    await session.send(credit={"request_id": "held", "upto": 12})
    await session.send(credit={"request_id": "held", "upto": 8})
    await session.next("finished")
    assert session.text("held") == front.engine.expected("the tide", 12)
    assert events_pb2.PROGRESS_KIND_RESUMED in session.progress("held")
    assert [limit.emit_upto for limit in front.engine.sent(Limit)] == [12]
    await session.send(close={})
    await session.rest()


async def test_credit_is_finite_by_default_and_counts_behind_given_tokens(front: Front) -> None:
    session = await open_session(front)
    given = front.text.encode("abcd")
    await session.send(start=start("plain", max_tokens=1000))
    await session.send(start=start("on", max_tokens=1000, generated_token_ids=given))
    await until(lambda: sum(choice.stalled for choice in front.engine.running) == 2)
    assert {len(c.tokens) for c in front.engine.running} == {DEFAULT_CREDIT, DEFAULT_CREDIT + 4}
    session.call.cancel()


async def test_a_request_without_any_credit_runs_once_it_gets_some(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("r", credit=0))
    await until(lambda: front.engine.waiting)
    await session.send(credit={"request_id": "r", "upto": 100})
    await session.next("finished")
    assert session.text("r") == front.engine.expected("the tide", 10)
    session.call.cancel()


async def test_cancel_ends_a_request_once_and_leaves_the_others(start_front: Start) -> None:
    front = await start_front(step_seconds=0.005)
    session = await open_session(front)
    await session.send(start=start("gone", max_tokens=200))
    await session.send(start=start("stays", "other", max_tokens=30))
    await session.next("batch")
    for _ in range(3):
        await session.send(cancel={"request_id": "gone"})
    await session.send(cancel={"request_id": "unknown"})
    await session.send(close={})
    await session.rest()
    assert session.ends("gone") == ["finished"]
    (finished,) = [r.finished for r in session.seen if r.finished.request_id == "gone"]
    (end,) = finished.choices
    assert end.reason == events_pb2.FINISH_REASON_CANCELLED
    assert end.output_tokens == len(session.text("gone")) < 200
    assert session.text("stays") == front.engine.expected("other", 30)
    assert session.deltas("gone")[-1].finish_reason == events_pb2.FINISH_REASON_CANCELLED


async def test_commands_reach_a_request_whose_prompt_is_still_being_read(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, may_read = front.text.encode_async, asyncio.Event()

    async def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        await may_read.wait()
        return await encode(text, add_special_tokens)

    monkeypatch.setattr(front.text, "encode_async", slow)
    session = await open_session(front)
    await session.send(start=start("gone", sampling={"n": 2}))
    await session.send(start=start("stays", credit=2))
    await session.send(cancel={"request_id": "gone"})
    for upto in (7, 4):
        await session.send(credit={"request_id": "stays", "upto": upto})
    finished = (await session.next("finished")).finished
    assert [end.reason for end in finished.choices] == [events_pb2.FINISH_REASON_CANCELLED] * 2
    # Its answer comes behind the credit.
    await session.send(update={"request_id": "nobody"})
    await session.next("command_rejected")
    may_read.set()
    await session.next("progress")
    assert len(session.text("stays")) == 7
    assert [submit.request.emit_upto for submit in front.engine.sent(Submit)] == [7]
    session.call.cancel()


async def test_a_time_limit_delivers_what_there_is_or_says_that_nothing_ran(start_front: Start) -> None:
    front = await start_front(step_seconds=0.02)  # 40 s for all the tokens
    session = await open_session(front)
    await session.send(start=start("ran", max_tokens=2000, time_limit=Duration(seconds=3)))
    finished = (await session.next("finished")).finished
    assert finished.choices[0].reason == events_pb2.FINISH_REASON_DEADLINE
    assert finished.usage.output_tokens == len(session.text("ran")) > 0
    front.engine.admits = False
    await session.send(start=start("queued", time_limit=Duration(nanos=10**8)))
    error = (await session.next("request_error")).request_error
    refusal = read_status(error.status)
    assert (error.request_id, refusal.code, refusal.reason) == (
        "queued",
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "TIME_LIMIT",
    )
    session.call.cancel()


async def test_an_error_of_a_request_does_not_end_the_session(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("bad", sampling={"top_p": 2.0, "min_p": 3.0}))
    await session.send(start=start("poison", f"x{POISON}"))
    await session.send(start=start("", "no id"))
    await session.send(start=start("other-model", model="other"))
    await session.send(start=start("good"))
    await session.send(close={})
    await session.rest()
    errors = {
        r.request_error.request_id: read_status(r.request_error.status)
        for r in session.seen
        if r.WhichOneof("event") == "request_error"
    }
    assert set(errors["bad"].violations) == {"sampling.top_p", "sampling.min_p"}
    assert errors["poison"].reason == "NONFINITE_LOGITS"
    assert set(errors[""].violations) == {"request_id"}
    assert errors["other-model"].reason == "MODEL_NOT_FOUND"
    assert session.ends("good") == ["finished"]


async def test_a_second_start_of_a_running_id_is_rejected_and_the_first_goes_on(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("r", max_tokens=20, credit=5))
    await session.send(start=start("r", "other"))
    rejected = (await session.next("command_rejected")).command_rejected
    assert (rejected.request_id, rejected.command) == ("r", "start")
    assert read_status(rejected.status).reason == "REQUEST_ID_IN_USE"
    await session.send(credit={"request_id": "r", "upto": 20})
    await session.send(close={})
    await session.rest()
    assert session.ends("r") == ["finished"]
    assert session.text("r") == front.engine.expected("the tide", 20)


async def test_an_id_that_is_too_long_is_told_in_short_and_not_kept(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("x" * 10_000))
    await session.send(append_turn={"request_id": "y" * 257, "parent_request_id": "none"})
    await session.send(fork={"parent_request_id": "none", "branches": [{"request_id": "z" * 257}]})
    await session.send(update={"request_id": "u" * 257})
    for command, letter in {"start": "x", "append_turn": "y", "fork": "z", "update": "u"}.items():
        rejected = (await session.next("command_rejected", "request_error")).command_rejected
        assert (rejected.command, rejected.request_id) == (command, letter * 256)
        refusal = read_status(rejected.status)
        if command == "update":
            assert refusal.reason == "REQUEST_GONE"
        else:
            assert set(refusal.violations) == {"request_id"}
    listed = await front.control.ListSessions(control_pb2.ListSessionsRequest())
    assert [one.unacked_requests for one in listed.sessions] == [0]
    await session.send(start=start("x" * 256))
    await session.next("finished")
    session.call.cancel()


async def test_the_first_message_must_be_open(front: Front) -> None:
    session = SessionClient(front.inference.Session())
    await session.send(start=start("r"))
    refusal = await end_of(session)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "OPEN_EXPECTED")


async def test_a_second_open_breaks_the_protocol(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("r", max_tokens=1000, credit=1))
    await session.send(open={})
    assert (await end_of(session)).reason == "ALREADY_OPEN"
    await until(lambda: not front.engine.running)


async def test_a_session_that_never_opens_is_ended(start_front: Start) -> None:
    front = await start_front(limits=SessionLimits(max_message_bytes=1000, open_timeout=0.05))
    session = SessionClient(front.inference.Session())
    refusal = await end_of(session)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "OPEN_TIMEOUT")


async def test_a_resume_token_of_another_server_is_lost(front: Front) -> None:
    session = SessionClient(front.inference.Session())
    await session.send(open={"resume_token": "from elsewhere"})
    refusal = await end_of(session)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_LOST")


@pytest.mark.parametrize("message", [b"", bytes.fromhex("ca0c00")])
async def test_a_command_that_the_server_does_not_know_ends_the_stream(front: Front, message: bytes) -> None:
    """An empty message, and field 201 of a newer client."""
    raw = front.channel.stream_stream(
        "/tidegate.v1.InferenceService/Session",
        request_serializer=lambda data: data,
        response_deserializer=session_pb2.SessionResponse.FromString,
    )
    session = SessionClient(raw())
    assert not message or len(UnknownFieldSet(session_pb2.SessionRequest.FromString(message))) == 1
    await session.call.write(session_pb2.SessionRequest(open={}).SerializeToString())
    await session.next("opened")
    await session.call.write(message)
    refusal = await end_of(session)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_COMMAND")


async def test_too_many_requests_in_a_session_are_refused(start_front: Start) -> None:
    front = await start_front(limits=SessionLimits(max_message_bytes=1000, requests_per_session=2))
    front.engine.admits = False
    session = await open_session(front)
    for request_id in "abc":
        await session.send(start=start(request_id))
    error = (await session.next("request_error")).request_error
    assert (error.request_id, read_status(error.status).reason) == ("c", "SESSION_FULL")
    front.engine.admits = True
    front.engine.go_on()
    await session.send(close={})
    await session.rest()
    assert session.ends("a") == session.ends("b") == ["finished"]


async def test_load_is_sent_while_nothing_else_happens(start_front: Start) -> None:
    front = await start_front(limits=SessionLimits(max_message_bytes=1000, heartbeat_interval=0.05))
    session = await open_session(front)
    await session.send(start=start("r", credit=2))
    await session.next("progress")
    load = (await session.next("load")).load
    assert (load.stalled, load.device.total, load.host.total) == (1, 64, 128)
    session.call.cancel()


async def test_requests_of_a_lost_session_are_cancelled_when_nobody_takes_it_up(start_front: Start) -> None:
    front = await start_front(limits=SessionLimits(max_message_bytes=1000, resume_timeout=0.1))
    session = await open_session(front)
    other = await open_session(front)
    for index in range(5):
        await session.send(start=start(f"r{index}", max_tokens=1000, credit=3))
    await other.send(start=start("stays", max_tokens=1000, credit=3))
    await until(lambda: len(front.engine.running) == 6)
    session.call.cancel()
    await until(lambda: len(front.engine.running) == 1)
    assert len(front.engine.sent(Finish)) == 5
    await other.send(credit={"request_id": "stays", "upto": 1000})
    await other.next("finished")
    other.call.cancel()


async def test_an_abort_by_id_reaches_a_request_of_a_session(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("r", max_tokens=1000, credit=3))
    await session.next("progress")
    answers = [await front.control.Abort(control_pb2.AbortRequest(request_id="r")) for _ in range(2)]
    assert [answer.aborted for answer in answers] == [True, False]
    finished = (await session.next("finished")).finished
    assert finished.choices[0].reason == events_pb2.FINISH_REASON_CANCELLED
    session.call.cancel()


async def test_every_request_has_exactly_one_end_under_random_load(start_front: Start) -> None:
    """200 requests in four sessions, with cancels, time limits, credit, faults and stop strings."""
    seed = 20_261
    front = await start_front(step_seconds=0.001)
    rng = random.Random(seed)
    plans: list[dict[str, Any]] = []
    for index in range(200):
        fields: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "sampling": {"n": rng.choice((1, 1, 3))}}
        match rng.randrange(6):
            case 0:
                fields["time_limit"] = Duration(nanos=rng.randint(1, 5 * 10**7))
            case 1:
                fields["sampling"]["stop"] = [rng.choice("abcdef"), "xyz"]
            case 2:
                fields["text"] = f"{index}{POISON}"
            case 3:
                fields["credit"] = rng.randint(0, 10)
        plans.append(start(f"r{index}", **{"text": f"prompt {index}", **fields}))

    async def drive(own: list[dict[str, Any]]) -> SessionClient:
        session = await open_session(front)

        async def write() -> None:
            for plan in own:
                await session.send(start=plan)
                if rng.random() < 0.3:
                    await session.send(cancel={"request_id": rng.choice(own)["request_id"]})
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.random() * 0.02)
            for plan in own:
                await session.send(credit={"request_id": plan["request_id"], "upto": 1000})
            await session.send(close={})

        async with asyncio.timeout(SECONDS * 3):
            await asyncio.gather(write(), session.rest())
        return session

    for session, own in zip(
        await asyncio.gather(*(drive(plans[part::4]) for part in range(4))),
        (plans[part::4] for part in range(4)),
        strict=True,
    ):
        for plan in own:
            request_id = plan["request_id"]
            assert len(session.ends(request_id)) == 1, (seed, request_id)
            for choice in range(plan["sampling"]["n"]):
                deltas = session.deltas(request_id, choice)
                offsets = [delta.offset for delta in deltas]
                lengths = [len(delta.token_ids) for delta in deltas]
                assert offsets == [sum(lengths[:position]) for position in range(len(lengths))]
                text = session.text(request_id, choice)
                assert front.engine.expected(plan["prompt"]["text"], 40, choice).startswith(text)
    await until(lambda: not front.engine.running and not front.engine.waiting)
