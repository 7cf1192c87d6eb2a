"""Sessions that lose their stream, requests that are asked for twice, and what must be acknowledged."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from front import SECONDS, Front, SessionClient, open_session, read_error, read_status, until

from tidegate.engine.messages import Limit, Submit
from tidegate.service import remembered
from tidegate.service.errors import Failure
from tidegate.service.session_limits import SessionLimits
from tidegate.v1 import control_pb2, events_pb2
from tidegate.v1.session_pb2 import SessionRequest, SessionResponse

Start = Callable[..., Any]


def start(request_id: str, text: str = "the tide", max_tokens: int = 10, **fields: Any) -> Any:
    sampling = {"max_tokens": max_tokens, **fields.pop("sampling", {})}
    return {"request_id": request_id, "prompt": {"text": text}, "sampling": sampling, **fields}


def limits(**changes: Any) -> SessionLimits:
    return SessionLimits(max_message_bytes=2**20, **changes)


async def resume(front: Front, lost: SessionClient, **next_offsets: int) -> SessionClient:
    """Take up a session on another stream; requests not named from their last ``Ack``."""
    session = SessionClient(front.inference.Session())
    points = [{"request_id": name, "next_offset": offset} for name, offset in next_offsets.items()]
    token = lost.seen[0].opened.resume_token
    await session.send(open={"resume_token": token, "resume_points": points})
    await session.next("opened")
    return session


async def end_of(session: SessionClient) -> Any:
    """How the stream ends, read to its end."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session.rest()
    return read_error(caught.value)


async def finish(session: SessionClient, *request_ids: str) -> None:
    while not all(session.ends(request_id) for request_id in request_ids):
        await session.next("finished", "request_error")


async def test_a_resumed_session_says_the_rest_token_for_token_and_letter_for_letter(front: Front) -> None:
    lost = await open_session(front)
    await lost.send(start=start("r", "été", max_tokens=40, credit=12, sampling={"logprobs": 2}))
    await lost.next("progress")
    lost.call.cancel()
    # Half of what came is lost with the connection.
    session = await resume(front, lost, r=5)
    await session.next("admitted")
    await session.send(credit={"request_id": "r", "upto": 40})
    await finish(session, "r")
    deltas = session.deltas("r")
    assert deltas[0].offset == 5
    assert [token for delta in deltas for token in delta.token_ids] == front.text.encode(
        front.engine.expected("été", 40)
    )[5:]
    assert session.text("r") == front.engine.expected("été", 40)[5:]
    logprobs = [one for seen in (lost, session) for delta in seen.deltas("r") for one in delta.logprobs]
    assert logprobs[5:12] == logprobs[12:19]
    assert len(front.engine.sent(Submit)) == 1


async def test_text_that_was_held_back_is_the_same_behind_a_resume(start_front: Start) -> None:
    """Half a stop string before the cut, the other half behind it; and one that never is completed."""
    script = "abcabXabcabcabd"
    front = await start_front(script=lambda prompt, offset, choice: script[offset % len(script)])
    lost = await open_session(front)
    await lost.send(start=start("r", max_tokens=100, credit=5, sampling={"stop": ["abcabd"]}))
    await lost.next("progress")
    assert lost.text("r") == ""
    for next_offset in range(6):
        again = await resume(front, lost, r=next_offset)
        await again.next("admitted")
        again.call.cancel()
    session = await resume(front, lost, r=3)
    await session.send(credit={"request_id": "r", "upto": 100})
    finished = (await session.next("finished")).finished
    assert finished.choices[0].stop_string == "abcabd"
    assert session.text("r") == "abcabXabc"


async def test_requests_go_on_without_a_stream_as_far_as_their_credit(front: Front) -> None:
    lost = await open_session(front)
    front.engine.admits = False
    await lost.send(start=start("short", max_tokens=10))
    await lost.send(start=start("long", "other", max_tokens=100, credit=20))
    await until(lambda: len(front.engine.waiting) == 2)
    lost.call.cancel()
    await asyncio.wait([asyncio.ensure_future(lost.call.code())])
    front.engine.admits = True
    front.engine.go_on()
    await until(lambda: [len(choice.tokens) for choice in front.engine.running] == [20])
    session = await resume(front, lost)
    await finish(session, "short")
    assert session.text("short") == front.engine.expected("the tide", 10)
    await session.send(credit={"request_id": "long", "upto": 100})
    await finish(session, "long")
    assert session.text("long") == front.engine.expected("other", 100)


async def test_a_second_open_takes_the_session_from_the_first_stream(front: Front) -> None:
    first = await open_session(front)
    await first.send(start=start("r", max_tokens=30, credit=10))
    await first.next("progress")
    second = await resume(front, first, r=10)
    refusal = await end_of(first)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "SESSION_SUPERSEDED")
    await second.send(credit={"request_id": "r", "upto": 30})
    await finish(second, "r")
    assert second.text("r") == front.engine.expected("the tide", 30)[10:]


class Feed:
    """A client's half of a stream without a connection: what comes, and when the server has heard its end."""

    def __init__(self) -> None:
        self.commands: asyncio.Queue[SessionRequest | Failure | None] = asyncio.Queue()
        self.heard_the_end = asyncio.Event()

    async def read(self) -> AsyncIterator[SessionRequest]:
        try:
            while (command := await self.commands.get()) is not None:
                if isinstance(command, Failure):
                    raise command
                yield command
        finally:
            self.heard_the_end.set()

    def send(self, **command: Any) -> None:
        self.commands.put_nowait(SessionRequest(**command))


@pytest.mark.parametrize("end", [None, Failure("UNDECODABLE_MESSAGE", "no valid protobuf")])
async def test_a_superseded_streams_late_end_leaves_the_session_to_its_new_stream(
    front: Front, end: Failure | None
) -> None:
    """The old stream hangs in a write, as to a peer that is gone; then its connection gives up."""
    sessions = front.server._sessions
    old, new = Feed(), Feed()
    async with aclosing(sessions.serve(old.read())) as hanging, aclosing(sessions.serve(new.read())) as told:
        old.send(open={})
        token = (await anext(hanging)).opened.resume_token
        old.send(start=start("r", credit=2))
        assert (await anext(hanging)).HasField("admitted")  # and it is asked for nothing more
        new.send(open={"resume_token": token})
        await anext(told)
        carried = asyncio.create_task(finished_of(told, "r", "next"))
        old.commands.put_nowait(end)
        await asyncio.wait_for(old.heard_the_end.wait(), SECONDS)
        new.send(start=start("next", "other"))
        new.send(credit={"request_id": "r", "upto": 10})
        assert await asyncio.wait_for(carried, SECONDS) == {"r": 10, "next": 10}
        assert [session.token for session in sessions.of("local")] == [token]


async def finished_of(responses: AsyncIterator[SessionResponse], *request_ids: str) -> dict[str, int]:
    """How many tokens each of these requests has made, once all have finished."""
    finished: dict[str, int] = {}
    async for response in responses:
        assert not response.HasField("request_error"), response
        if response.HasField("finished"):
            finished[response.finished.request_id] = response.finished.usage.output_tokens
            if finished.keys() == {*request_ids}:
                return finished
    raise AssertionError(f"the stream ended behind {finished}")


async def test_ends_are_told_again_until_they_are_acknowledged(front: Front) -> None:
    lost = await open_session(front)
    await lost.send(start=start("kept", max_tokens=5))
    await lost.send(start=start("acked", max_tokens=5))
    await lost.send(start=start("refused", max_tokens=5, sampling={"top_p": 7.0}))
    await finish(lost, "kept", "acked", "refused")
    await lost.send(
        commands={
            "commands": [
                {"ack": {"request_id": "acked", "upto": 5, "end": True}},
                {"cancel": {"request_id": "x"}},
            ]
        }
    )
    await lost.send(start=start("later", max_tokens=1))
    await finish(lost, "later")
    lost.call.cancel()
    session = await resume(front, lost, kept=3)
    await session.send(close={})
    await session.rest()
    assert session.text("kept") == front.engine.expected("the tide", 5)[3:]
    assert session.ends("kept") == ["finished"]
    assert session.ends("refused") == ["request_error"]
    assert session.ends("acked") == []
    assert not session.deltas("acked")


async def test_a_session_nobody_takes_up_is_lost_and_a_token_is_its_tenants(start_front: Start) -> None:
    front = await start_front(limits=limits(resume_timeout=0.05))
    lost = await open_session(front)
    await lost.send(start=start("r", max_tokens=1000, credit=3))
    await until(lambda: front.engine.running)
    lost.call.cancel()
    await until(lambda: not front.engine.running)
    again = SessionClient(front.inference.Session())
    await again.send(open={"resume_token": lost.seen[0].opened.resume_token})
    assert (await end_of(again)).reason == "SESSION_LOST"


async def test_without_ack_a_session_stalls_at_its_cap_and_ack_lets_it_go_on(start_front: Start) -> None:
    """Also what ended counts, until it is acknowledged."""
    front = await start_front(limits=limits(unacked_log_bytes=4 * 60))
    session = await open_session(front)
    await session.send(start=start("a", max_tokens=50, credit=1000))
    await finish(session, "a")
    await session.send(start=start("b", "other", max_tokens=200, credit=1000))
    await until(lambda: [c.stalled for c in front.engine.running] == [True])
    assert len(front.engine.running[0].tokens) == 10
    await session.send(ack={"request_id": "a", "end": True})
    while not session.ends("b"):
        event = await session.next("batch", "finished")
        upto = max((delta.offset + len(delta.token_ids) for delta in event.batch.deltas), default=0)
        await session.send(ack={"request_id": "b", "upto": upto})
    assert session.text("b") == front.engine.expected("other", 200)


async def test_a_request_takes_no_more_room_than_its_output_may_fill(start_front: Start) -> None:
    """Else the first few would hold all of it, and the others wait for nothing; more where it may grow."""
    front = await start_front(limits=limits(unacked_log_bytes=4 * 60))
    front.engine.admits = False
    session = await open_session(front)
    for index in range(10):
        await session.send(start=start(f"r{index}", max_tokens=3))
    await until(lambda: len(front.engine.sent(Submit)) == 10)
    assert [submit.request.emit_upto for submit in front.engine.sent(Submit)] == [3] * 10
    await session.send(update={"request_id": "r0", "max_tokens": 5})
    await until(lambda: front.engine.sent(Limit))
    assert [limit.emit_upto for limit in front.engine.sent(Limit)] == [5]


async def test_many_requests_share_the_room_and_all_end(start_front: Start) -> None:
    """With room for one token of each, in turn; two choices, and logprobs, take more of it."""
    front = await start_front(limits=limits(unacked_log_bytes=4 * 40))
    session = await open_session(front)
    for index in range(40):
        sampling = {"n": 1 + index % 2, **({"logprobs": 3} if index % 5 == 0 else {})}
        await session.send(start=start(f"r{index}", f"prompt {index}", sampling=sampling))
    ends = 0
    while ends < 40:
        event = await session.next("batch", "finished")
        for delta in event.batch.deltas:
            ack = {"request_id": delta.request_id, "choice": delta.choice}
            await session.send(ack={**ack, "upto": delta.offset + len(delta.token_ids)})
        if event.HasField("finished"):
            ends += 1
            await session.send(ack={"request_id": event.finished.request_id, "end": True})
    for index in range(40):
        assert session.text(f"r{index}", index % 2) == front.engine.expected(f"prompt {index}", 10, index % 2)


async def test_credit_of_the_session_bounds_all_its_requests_together(front: Front) -> None:
    session = await open_session(front)
    await session.send(credit={"upto": 15})
    for name in "ab":
        await session.send(start=start(name, name, max_tokens=20))
    await until(lambda: sum(len(choice.tokens) for choice in front.engine.running) == 15)
    await session.send(credit={"upto": 40})
    await finish(session, "a", "b")
    for name in "ab":
        assert session.text(name) == front.engine.expected(name, 20)


async def test_the_same_request_again_attaches_and_moves_delivery(front: Front) -> None:
    first, second = await open_session(front), await open_session(front)
    request = start("r", max_tokens=30, credit=10)
    await first.send(start=request)
    await first.next("progress")
    await first.send(ack={"request_id": "r", "upto": 4})
    await first.send(start=start("fence", max_tokens=1))
    await finish(first, "fence")
    # Credit is no content.
    await second.send(start={**request, "credit": 3})
    await second.next("admitted")
    error = (await first.next("request_error")).request_error
    assert (error.request_id, read_status(error.status).reason) == ("r", "REQUEST_MOVED")
    await second.send(credit={"request_id": "r", "upto": 30})
    await finish(second, "r")
    assert second.text("r") == front.engine.expected("the tide", 30)[4:]
    assert [submit.request.params.max_tokens for submit in front.engine.sent(Submit)] == [30, 1]


async def test_a_finished_request_is_read_again_and_not_made_again(front: Front) -> None:
    first, second = await open_session(front), await open_session(front)
    await first.send(start=start("r", max_tokens=8))
    await finish(first, "r")
    await second.send(start=start("r", max_tokens=8))
    await finish(second, "r")
    assert second.text("r") == front.engine.expected("the tide", 8)
    await second.send(start=start("r", max_tokens=9))
    error = (await second.next("request_error")).request_error
    refusal = read_status(error.status)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    await second.send(ack={"request_id": "r", "end": True})
    await second.send(start=start("r", max_tokens=9))
    while len(second.ends("r")) < 3:
        await second.next("finished")
    assert len(front.engine.sent(Submit)) == 2


async def test_the_same_start_in_the_same_session_changes_nothing(front: Front) -> None:
    session = await open_session(front)
    request = start("r", max_tokens=20, credit=5)
    await session.send(start=request)
    await session.next("progress")
    await session.send(start=request)
    await session.send(credit={"request_id": "r", "upto": 20})
    await session.send(close={})
    await session.rest()
    assert session.text("r") == front.engine.expected("the tide", 20)
    assert session.ends("r") == ["finished"]
    assert not [r for r in session.seen if r.HasField("command_rejected")]


async def test_what_is_remembered_has_a_cap_in_bytes_and_the_oldest_goes(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "LOG_BYTES", 2 * 10 * 4)  # two of ten tokens
    session = await open_session(front)
    for name in ("oldest", "older", "newest"):
        await session.send(start=start(name))
        await finish(session, name)
    await session.send(close={})
    await session.rest()
    session = await open_session(front)
    for name in ("older", "newest"):
        await session.send(start=start(name))
        await finish(session, name)
    assert len(front.engine.sent(Submit)) == 3
    await session.send(start=start("oldest"))
    await finish(session, "oldest")
    assert len(front.engine.sent(Submit)) == 4


async def test_logprobs_that_are_remembered_count_against_the_cap(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "LOG_BYTES", 2 * 10 * 4)
    large = start("large", sampling={"logprobs": 1})
    session = await open_session(front)
    await session.send(start=large)
    await finish(session, "large")
    await session.send(start=start("small"))
    await finish(session, "small")
    again = await open_session(front)
    await again.send(start=large)
    await finish(again, "large")
    assert len(front.engine.sent(Submit)) == 3


async def test_a_failed_request_may_be_tried_again_under_its_id(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("r", sampling={"top_p": 3.0}))
    await session.next("request_error")
    await session.send(start=start("r"))
    await finish(session, "r")
    while len(session.ends("r")) < 2:
        await session.next("finished")
    assert session.ends("r") == ["request_error", "finished"]


async def test_an_idle_session_is_closed_and_too_many_are_refused(start_front: Start) -> None:
    front = await start_front(limits=limits(idle_timeout=5, sessions_per_tenant=2))
    idle, busy = await open_session(front), await open_session(front)
    await busy.send(start=start("r", max_tokens=1000, credit=3))
    third = SessionClient(front.inference.Session())
    await third.send(open={})
    refusal = await end_of(third)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_SESSIONS")
    await idle.rest()
    assert await idle.call.code() == grpc.StatusCode.OK
    await busy.next("load")
    assert not busy.call.done()


async def test_of_a_tenant_without_sessions_nothing_is_kept(front: Front) -> None:
    """Tenants come and go, named by their tokens."""
    session = await open_session(front)
    sessions = front.server._sessions
    assert sessions._num_of_tenant == {"local": 1}
    await session.send(close={})
    await session.rest()
    await until(lambda: not sessions.of("local"))
    assert list(sessions._num_of_tenant) == []


async def test_a_slow_readers_logs_and_texts_stay_below_64_kb(front: Front) -> None:
    """It has all the credit that it wants, and takes nothing; then it gets everything."""
    session = await open_session(front)
    for index in range(30):
        await session.send(start=start(f"r{index}", f"prompt {index}", max_tokens=500, credit=2000))
    # gRPC's own buffers take some messages; what is acknowledged is nothing.
    (held,) = front.server._sessions._sessions.values()
    full = held._pool.capacity
    await until(lambda: held._pool.used == full and all(c.stalled for c in front.engine.running))
    logs = sum(
        choice.token_ids.itemsize * (len(choice.token_ids) - choice.acked) + len(choice.waiting_text)
        for generation in held._requests.values()
        for choice in generation._output.choices
    )
    assert 20_000 < logs < 64 * 1024
    num_ended = 0
    while num_ended < 30:
        event = await session.next("batch", "finished")
        num_ended += event.HasField("finished")
        acks = [
            {"request_id": delta.request_id, "upto": delta.offset + len(delta.token_ids)}
            for delta in event.batch.deltas
        ]
        await session.send(commands={"commands": [{"ack": ack} for ack in acks]})
    for index in range(30):
        assert session.text(f"r{index}") == front.engine.expected(f"prompt {index}", 500)
    assert not [kind for kind in session.progress("r0") if kind == events_pb2.PROGRESS_KIND_DROPPED]


async def test_a_tenants_sessions_are_listed_with_and_without_their_stream(front: Front) -> None:
    async def list_sessions() -> Any:
        return (await front.control.ListSessions(control_pb2.ListSessionsRequest())).sessions

    async def are_listed(*expected: tuple[bool, int, int]) -> None:
        """Wait for it: nobody tells when a command was obeyed."""
        async with asyncio.timeout(SECONDS):
            while True:
                seen = await list_sessions()
                if expected == tuple((s.connected, s.unacked_requests, s.running_requests) for s in seen):
                    return
                await asyncio.sleep(0.01)

    await are_listed()
    first, second = await open_session(front), await open_session(front)
    await first.send(start=start("ended", max_tokens=3))
    await first.next("finished")
    await first.send(start=start("waits", credit=2))
    await first.next("progress")
    await are_listed((True, 2, 1), (True, 0, 0))
    state = (await list_sessions())[0]
    assert 0 <= time.time() - state.opened_at.ToNanoseconds() / 1e9 < 60
    assert state.unacked_log_bytes > 0
    assert first.seen[0].opened.resume_token not in str(state)
    await first.send(ack={"request_id": "ended", "upto": 3, "end": True})
    await are_listed((True, 1, 1), (True, 0, 0))
    first.call.cancel()
    await are_listed((False, 1, 1), (True, 0, 0))
    again = await resume(front, first)
    await are_listed((True, 1, 1), (True, 0, 0))
    await again.send(cancel={"request_id": "waits"})
    await again.next("finished")
    await again.send(ack={"request_id": "waits", "upto": 2, "end": True})
    await again.send(close={})
    await again.rest()
    await are_listed((True, 0, 0))
    await second.send(close={})
    await second.rest()
