"""Requests that go on from others: turns, forks, leases; and requests that change while they run."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fake_engine import EOS, MAX_MODEL_LEN, byte_text
from front import Front, SessionClient, open_session, read_status, until
from google.protobuf.duration_pb2 import Duration

from tidegate.engine.messages import Finish, Release, Submit, Update
from tidegate.engine.request import FinishReason, Parent, Request
from tidegate.engine.text import Text
from tidegate.service import leases
from tidegate.service.generation import Generation
from tidegate.service.leases import Leases

Start = Callable[..., Any]
LEASE = {"time_to_live": Duration(seconds=100)}


def chat(*contents: str) -> Any:
    """The user's messages, each with an answer between."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": [{"text": text}]} for i, text in enumerate(contents)]
    return {"chat": {"messages": messages}}


def start(request_id: str, prompt: Any = "the tide", max_tokens: int = 10, **fields: Any) -> Any:
    sampling = {"max_tokens": max_tokens, **fields.pop("sampling", {})}
    prompt = {"text": prompt} if isinstance(prompt, str) else prompt
    return {"request_id": request_id, "prompt": prompt, "sampling": sampling, **fields}


def requests(front: Front) -> list[Request]:
    return [command.request for command in front.engine.sent(Submit) if isinstance(command, Submit)]


async def refusal(session: SessionClient) -> tuple[str, grpc.StatusCode, str]:
    error = (await session.next("request_error")).request_error
    status = read_status(error.status)
    return error.request_id, status.code, status.reason


async def test_a_turn_goes_behind_the_tokens_of_its_parent(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("a", lease=LEASE))
    await session.next("finished")
    for request_id, content in (("text", {"text": " and"}), ("ids", {"token_ids": {"ids": [65, 66]}})):
        turn = {"request_id": request_id, "parent_request_id": "a", "input": content}
        await session.send(append_turn={**turn, "sampling": {"max_tokens": 5}})
        await session.next("finished")
    first, text, ids = requests(front)
    so_far = [*first.prompt_token_ids, *front.text.encode(session.text("a"))]
    assert text.prompt_token_ids == [*so_far, *front.text.encode(" and")]
    assert ids.prompt_token_ids == [*so_far, 65, 66]
    assert text.parent == ids.parent == Parent(first.id, 0)
    assert (first.is_leased, text.is_leased) == (True, False)


async def test_chat_turns_keep_what_was_sampled_as_a_prefix(start_front: Start) -> None:
    """Also where the answer ends with the token that closes a turn, and where it does not."""
    letters = ["h", "i", EOS]
    front = await start_front(script=lambda prompt, offset, choice: letters[offset])
    session = await open_session(front)
    await session.send(start=start("a", chat("hello"), lease=LEASE))
    await session.next("finished")
    for request_id, parent, text in (("b", "a", "more"), ("c", "b", "and more")):
        turn = {"request_id": request_id, "parent_request_id": parent, "input": chat(text), "lease": LEASE}
        await session.send(append_turn={**turn, "sampling": {"max_tokens": 2}})
        await session.next("finished")
    whole = (
        f"user: hello{EOS}assistant: hi{EOS}user: more{EOS}assistant: hi{EOS}user: and more{EOS}assistant: "
    )
    first, second, third = requests(front)
    assert third.prompt_token_ids == front.text.encode(whole)
    assert second.prompt_token_ids[: len(first.prompt_token_ids) + 3] == [
        *first.prompt_token_ids,
        *front.text.encode(f"hi{EOS}"),
    ]


def test_where_a_template_rewrites_the_past_the_whole_chat_is_rendered_anew() -> None:
    base = byte_text()

    def render(conversation: Any, add_generation_prompt: bool, continue_final_message: bool) -> str:
        """Leaves out of a past answer what stands before a bar."""
        lines = []
        for message in conversation:
            content = message["content"]
            if message["role"] == "assistant":
                content = content.rpartition("|")[2]
            lines.append(f"{message['role']}: {content}{EOS}")
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")

    text = Text(base._tokenizer, render)
    history = [{"role": "user", "content": "hello"}]
    prompt = text.render_chat(history)
    more = [{"role": "user", "content": "more"}]
    kept = text.continue_chat([*prompt, *text.encode(f"hi{EOS}")], len(prompt), history, more)
    assert kept == [*prompt, *text.encode(f"hi{EOS}user: more{EOS}assistant: ")]
    cut = text.continue_chat([*prompt, *text.encode(f"hm|hi{EOS}")], len(prompt), history, more)
    assert cut == [*prompt, *text.encode(f"hi{EOS}user: more{EOS}assistant: ")]
    unknown = text.continue_chat([*prompt, *text.encode(" hi ")], len(prompt), None, more)
    assert unknown == [*prompt, *text.encode(f" hi {EOS}user: more{EOS}assistant: ")]


async def test_parents_that_cannot_be_continued(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("running", max_tokens=100, credit=3))
    await session.send(start=start("unleased", max_tokens=2))
    await session.next("finished")
    await session.send(start=start("leased", max_tokens=2, lease=LEASE))
    await session.next("finished")
    for name, parent, reason in (
        ("a", "nobody", (grpc.StatusCode.NOT_FOUND, "PARENT_GONE")),
        ("b", "unleased", (grpc.StatusCode.NOT_FOUND, "PARENT_GONE")),
        ("c", "running", (grpc.StatusCode.FAILED_PRECONDITION, "PARENT_RUNNING")),
    ):
        await session.send(
            append_turn={"request_id": name, "parent_request_id": parent, "input": {"text": "x"}}
        )
        assert await refusal(session) == (name, *reason)
    turn = {"request_id": "d", "parent_request_id": "leased", "parent_choice": 1, "input": {"text": "x"}}
    await session.send(append_turn=turn)
    assert await refusal(session) == ("d", grpc.StatusCode.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE")
    await session.send(append_turn={"request_id": "e", "parent_request_id": "leased"})
    error = (await session.next("request_error")).request_error
    assert set(read_status(error.status).violations) == {"input"}
    fork = {"parent_request_id": "nobody", "branches": [{"request_id": "f"}, {"request_id": "g"}]}
    await session.send(fork=fork)
    assert [(await refusal(session))[0] for _ in range(2)] == ["f", "g"]
    fork = {"parent_request_id": "leased", "at_offset": 3, "branches": [{"request_id": "h"}]}
    await session.send(fork=fork)
    assert await refusal(session) == ("h", grpc.StatusCode.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE")


async def test_a_running_request_is_forked_and_goes_on(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("p", max_tokens=20, credit=8))
    await session.next("progress")
    branches = [
        {"request_id": "x", "sampling": {"max_tokens": 4}},
        {"request_id": "y", "input": {"text": ","}, "sampling": {"max_tokens": 4}},
    ]
    await session.send(fork={"parent_request_id": "p", "at_offset": 5, "branches": branches})
    for _ in branches:
        await session.next("finished")
    parent, x, y = requests(front)
    shared = [*parent.prompt_token_ids, *front.text.encode(session.text("p")[:5])]
    assert (x.prompt_token_ids, y.prompt_token_ids) == (shared, [*shared, *front.text.encode(",")])
    assert x.parent == y.parent == Parent(parent.id, 0)
    assert x.seed != parent.seed
    await session.send(credit={"request_id": "p", "upto": 20})
    await session.next("finished")
    assert session.text("p") == front.engine.expected("the tide", 20)


async def test_a_fork_waits_for_a_prompt_that_is_still_being_read(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, may_read = front.text.encode_async, asyncio.Event()

    async def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        await may_read.wait()
        return await encode(text, add_special_tokens)

    monkeypatch.setattr(front.text, "encode_async", slow)
    session = await open_session(front)
    await session.send(start=start("p"))
    branches = [{"request_id": "x", "sampling": {"max_tokens": 3}}]
    await session.send(fork={"parent_request_id": "p", "at_offset": 0, "branches": branches})
    await session.send(cancel={"request_id": "x-unknown"})
    may_read.set()
    await session.next("finished")
    await session.next("finished")
    assert session.text("x") == front.engine.expected("the tide", 3)


async def test_a_lease_ends_with_its_time(start_front: Start) -> None:
    front = await start_front()
    session = await open_session(front)
    await session.send(start=start("short", lease={"time_to_live": Duration(nanos=10**8)}))
    await session.next("finished")
    await until(lambda: front.engine.sent(Release))
    (request,) = requests(front)
    assert front.engine.sent(Release) == [Release([request.id])]
    turn = {"request_id": "late", "parent_request_id": "short", "input": {"text": "x"}}
    await session.send(append_turn=turn)
    assert (await refusal(session))[2] == "PARENT_GONE"


async def test_a_request_that_fails_here_ends_in_the_engine_before_its_lease_does(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round the engine would lease what it ends, and nobody would give that back."""
    monkeypatch.setattr(Generation, "on_delta", lambda *_: 1 / 0)
    session = await open_session(front)
    await session.send(start=start("broken", lease=LEASE, sampling={"n": 2}))
    await session.next("request_error")
    (request,) = requests(front)
    await until(lambda: front.engine.sent(Release))
    ends = [c for c in front.engine.commands if isinstance(c, Finish | Release)]
    assert ends == [Finish(request.id, FinishReason.CANCELLED), Release([request.id])]


async def test_a_request_that_nobody_hears_ends_in_the_engine_before_its_lease_does(
    start_front: Start,
) -> None:
    front = await start_front(step_seconds=0.05)
    session = await open_session(front)
    await session.send(start=start("left", lease=LEASE, max_tokens=100))
    await session.next("admitted")
    front.server._hub.find("local", "left").abandon()
    (request,) = requests(front)
    ends = [c for c in front.engine.commands if isinstance(c, Finish | Release)]
    assert ends == [Finish(request.id, FinishReason.CANCELLED), Release([request.id])]


async def test_beyond_its_quota_a_tenants_oldest_kv_goes_and_its_transcript_stays(front: Front) -> None:
    hub = front.server._hub
    hub.leases = Leases(front.engine.info, hub._send, quota_bytes=40)
    session = await open_session(front)
    for name in ("a", "b"):
        await session.send(start=start(name, lease=LEASE))  # 18 tokens of a byte each
        await session.next("finished")
    turn = {"parent_request_id": "a", "input": {"text": "x"}, "sampling": {"max_tokens": 1}}
    await session.send(append_turn={"request_id": "uses-a", **turn})
    await session.next("finished")
    await session.send(start=start("c", lease=LEASE))
    await session.next("finished")
    ids = [request.id for request in requests(front)]
    assert front.engine.sent(Release) == [Release([ids[1]])]
    await session.send(append_turn={"request_id": "on-b", **turn, "parent_request_id": "b"})
    await session.next("finished")
    assert session.ends("on-b") == ["finished"]


async def test_an_update_raises_the_limit_and_replaces_the_stops(front: Front) -> None:
    session = await open_session(front)
    expected = front.engine.expected("the tide", 40)
    await session.send(start=start("r", max_tokens=20, credit=10, sampling={"stop": [expected[12:15]]}))
    await session.next("progress")
    stop = expected[30:33]
    await session.send(update={"request_id": "r", "max_tokens": 40, "stops": {"stop": [stop]}})
    await until(lambda: front.engine.sent(Update))
    await session.send(credit={"request_id": "r", "upto": 100})
    finished = (await session.next("finished")).finished
    assert finished.choices[0].stop_string == stop
    assert session.text("r") == expected[:30]


async def test_an_update_that_cannot_be_is_rejected_and_ends_nothing(front: Front) -> None:
    session = await open_session(front)
    await session.send(start=start("r", max_tokens=20, credit=10))
    await session.next("progress")
    for update, reason in (
        ({"request_id": "r", "max_tokens": 19}, "INVALID_REQUEST"),
        ({"request_id": "r", "max_tokens": MAX_MODEL_LEN}, "INVALID_REQUEST"),
        ({"request_id": "r", "stops": {"stop": [""]}}, "INVALID_REQUEST"),
        ({"request_id": "nobody", "max_tokens": 30}, "REQUEST_GONE"),
    ):
        await session.send(update=update)
        rejected = (await session.next("command_rejected")).command_rejected
        assert (rejected.request_id, rejected.command) == (update["request_id"], "update")
        assert read_status(rejected.status).reason == reason
    await session.send(credit={"request_id": "r", "upto": 20})
    await session.next("finished")
    assert session.text("r") == front.engine.expected("the tide", 20)


async def test_a_tenant_whose_transcripts_fill_their_room_leases_no_more(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease counts beyond its few tokens, too."""
    monkeypatch.setattr(leases, "TRANSCRIPT_BYTES", 2000)
    session = await open_session(front)
    for name in ("first", "other"):
        await session.send(start=start(name, lease=LEASE))
        await session.next("finished")
    await session.send(start=start("second", lease=LEASE))
    error = read_status((await session.next("request_error", "finished")).request_error.status)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LEASES_FULL")
    await session.send(start=start("unleased"))
    assert (await session.next("finished")).finished.request_id == "unleased"
