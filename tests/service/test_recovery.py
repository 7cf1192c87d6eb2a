"""The front when its engine dies and another one comes: nothing is lost or doubled, and who is to blame."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_engine import DEADLY
from front import Front, SessionClient, open_session, read_status, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.engine.client import EngineGone
from tidegate.engine.messages import Pause, Place, Submit
from tidegate.engine.request import Request, StructuredOutput
from tidegate.v1 import admin_pb2, admin_pb2_grpc, events_pb2

RECOVERED = events_pb2.PROGRESS_KIND_RECOVERED
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PROMPTS = {"a": "one", "b": "two", "poison": f"poison{DEADLY}"}


@dataclass
class Outage:
    """An engine that dies when the test says so, and comes back when the test says so."""

    front: Front
    session: SessionClient
    _may_start: asyncio.Event

    @property
    def engine(self) -> Any:
        return self.front.engine

    def kill(self, *executing: Place) -> None:
        self._may_start.clear()
        self.engine.kill(*executing)

    def come_back(self) -> None:
        self._may_start.set()

    async def kill_and_come_back(self, *executing: Place) -> None:
        submitted = len(self.engine.sent(Submit))
        self.kill(*executing)
        self.come_back()
        await until(lambda: len(self.engine.sent(Submit)) > submitted)

    async def start(self, request_id: str, prompt: str = "tide", *, tokens: int = 20, **fields: Any) -> None:
        sampling = {"max_tokens": tokens, **fields.pop("sampling", {})}
        start = {"request_id": request_id, "prompt": {"text": prompt}, "sampling": sampling}
        await self.session.send(start={**start, "credit": 10_000, **fields})

    async def has_tokens(self, request_id: str, number: int) -> None:
        while sum(len(delta.token_ids) for delta in self.session.deltas(request_id)) < number:
            await self.session.next("batch")

    async def end(self, *request_ids: str) -> None:
        while not all(self.session.ends(request_id) for request_id in request_ids):
            await self.session.next("finished", "request_error")

    def engine_id(self, prompt: str) -> str:
        """The engine's name of the request with this prompt."""
        wanted = self.front.text.encode(prompt)
        found = {r.id for r in self.requests() if r.prompt_token_ids == wanted}
        (name,) = found
        return name

    def requests(self) -> list[Request]:
        return [command.request for command in self.engine.sent(Submit)]

    def error(self, request_id: str) -> Any:
        return next(
            read_status(r.request_error.status)
            for r in self.session.seen
            if r.request_error.request_id == request_id
        )


@pytest.fixture
async def outage(start_front: Callable[..., Awaitable[Front]], tmp_path: Path) -> Outage:
    fronts: list[Front] = []
    may_start = asyncio.Event()

    async def restart(gone: EngineGone) -> None:
        await may_start.wait()
        fronts[0].engine.revive()

    admin = f"unix:{tmp_path}/admin"
    fronts.append(await start_front(restart=restart, step_seconds=0.002, admin_addresses=[admin]))
    return Outage(fronts[0], await open_session(fronts[0]), may_start)


async def test_a_stream_goes_on_behind_the_tokens_that_it_has(outage: Outage) -> None:
    await outage.start("r", tokens=60)
    await outage.has_tokens("r", 5)
    await outage.kill_and_come_back()
    await outage.end("r")
    assert outage.session.text("r") == outage.engine.expected("tide", 60)
    offsets = [delta.offset for delta in outage.session.deltas("r")]
    assert offsets == sorted(set(offsets))
    assert outage.session.progress("r") == [RECOVERED]
    kinds = [response.WhichOneof("event") for response in outage.session.seen]
    assert kinds.count("admitted") == 1
    again = outage.requests()[-1]
    assert again.choices is not None
    assert len(again.choices[0]) >= 5
    assert again.seed == outage.requests()[0].seed


async def test_every_choice_goes_on_behind_its_own_tokens_and_one_that_ended_stays_ended(
    outage: Outage,
) -> None:
    texts = [outage.engine.expected("tide", 200, choice) for choice in range(3)]
    # A stop string that the first choice meets early, and the others late or never.
    stop = next(
        texts[0][i : i + 3] for i in range(5, 40) if all(texts[0][i : i + 3] not in t[:80] for t in texts[1:])
    )
    await outage.start("r", tokens=70, sampling={"n": 3, "stop": [stop]})
    await until(lambda: {choice.index for choice in outage.engine.running} == {1, 2})
    await outage.kill_and_come_back()
    await outage.end("r")
    again = outage.requests()[-1]
    assert again.choices is not None
    assert set(again.choices) == {1, 2}
    (finished,) = [r.finished for r in outage.session.seen if r.HasField("finished")]
    assert [end.reason for end in finished.choices] == [
        events_pb2.FINISH_REASON_STOP_STRING,
        events_pb2.FINISH_REASON_MAX_TOKENS,
        events_pb2.FINISH_REASON_MAX_TOKENS,
    ]
    for choice in (1, 2):
        assert outage.session.text("r", choice) == texts[choice][:70]
    assert outage.session.text("r", 0) == texts[0][: texts[0].index(stop)]


async def test_the_next_engine_is_told_what_the_output_must_be_like(outage: Outage) -> None:
    form = {"regex": "[a-z]+"}
    await outage.start("r", tokens=60, sampling={"n": 2, "structured_output": form, "bad_words": ["kite"]})
    await outage.has_tokens("r", 6)
    await outage.kill_and_come_back()
    await outage.end("r")
    first, again = outage.requests()
    assert first.params.structured_output == StructuredOutput(regex="[a-z]+")
    assert again.params == first.params
    assert again.choices is not None
    assert sum(map(len, again.choices.values())) >= 6
    for choice in range(2):
        assert outage.session.text("r", choice) == outage.engine.expected("tide", 60, choice)


async def test_a_request_whose_end_was_decided_ends_without_another_engine(outage: Outage) -> None:
    text = outage.engine.expected("tide", 30)
    await outage.start("r", tokens=1000, sampling={"stop": [text[5:9]]})
    await outage.has_tokens("r", 1)
    outage.engine.lag = 10**6  # it does not obey, and confirms nothing
    await outage.has_tokens("r", 9)
    outage.kill()
    await outage.end("r")
    assert outage.session.text("r") == text[:5]
    assert outage.session.ends("r") == ["finished"]


async def test_requests_of_the_outage_wait_and_those_cancelled_in_it_are_not_told(outage: Outage) -> None:
    await outage.start("running", "one", tokens=40)
    await outage.start("cancelled", "two", tokens=40)
    await outage.has_tokens("running", 2)
    await outage.has_tokens("cancelled", 2)
    outage.kill()
    submitted = len(outage.requests())
    await outage.start("new", "three", tokens=40)
    await outage.session.send(cancel={"request_id": "cancelled"})
    await outage.end("cancelled")
    outage.come_back()
    await outage.end("running", "new")
    told = [outage.front.text.decode(request.prompt_token_ids) for request in outage.requests()[submitted:]]
    assert told == ["one", "three"]
    for name, prompt in (("running", "one"), ("new", "three")):
        assert outage.session.text(name) == outage.engine.expected(prompt, 40)
    assert outage.session.progress("new") == []


async def test_a_request_that_waited_is_queued_again(outage: Outage) -> None:
    outage.engine.admits = False
    await outage.start("r")
    await until(lambda: outage.engine.waiting)
    outage.engine.admits = True
    await outage.kill_and_come_back()
    await outage.end("r")
    assert outage.session.text("r") == outage.engine.expected("tide", 20)
    assert outage.session.progress("r") == []


async def test_credit_is_kept_and_credit_of_the_outage_counts(outage: Outage) -> None:
    await outage.start("r", tokens=20, credit=4)
    await outage.has_tokens("r", 4)
    outage.kill()
    await outage.session.send(credit={"request_id": "r", "upto": 9})
    # Behind the answer to this, the credit is known.
    await outage.session.send(update={"request_id": "unknown"})
    await outage.session.next("command_rejected")
    outage.come_back()
    await outage.has_tokens("r", 9)
    await until(lambda: all(choice.stalled for choice in outage.engine.running))
    assert outage.requests()[-1].emit_upto == 9
    await outage.session.send(credit={"request_id": "r", "upto": 20})
    await outage.end("r")
    assert outage.session.text("r") == outage.engine.expected("tide", 20)


async def test_health_says_that_there_is_no_engine(outage: Outage) -> None:
    watch = health_pb2_grpc.HealthStub(outage.front.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    outage.kill()
    assert (await watch.read()).status == NOT_SERVING
    outage.come_back()
    assert (await watch.read()).status == SERVING
    watch.cancel()


async def test_a_pause_outlives_the_engine(outage: Outage) -> None:
    await outage.start("r", tokens=30)
    await outage.has_tokens("r", 2)
    async with grpc.aio.insecure_channel(outage.front.server.listener.admin_addresses[0]) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        await admin.Pause(admin_pb2.PauseRequest())
        told = len(outage.engine.commands)
        await outage.kill_and_come_back()
        assert outage.engine.commands[told] == Pause(True)
        await admin.Resume(admin_pb2.ResumeRequest())
    await outage.end("r")
    assert outage.session.text("r") == outage.engine.expected("tide", 30)


async def test_a_drain_in_an_outage_still_finishes_what_runs(outage: Outage) -> None:
    await outage.start("r", tokens=30)
    await outage.has_tokens("r", 2)
    outage.kill()
    draining = asyncio.create_task(outage.front.server.drain(10))
    await outage.session.next("go_away")
    outage.come_back()
    await outage.end("r")
    assert outage.session.text("r") == outage.engine.expected("tide", 30)
    await draining


async def test_suspects_run_alone_and_only_the_one_that_is_deadly_is_refused(outage: Outage) -> None:
    outage.come_back()
    outage.engine.admits = False
    for name, prompt in PROMPTS.items():
        await outage.start(name, prompt, tokens=300)
    await until(lambda: len(outage.engine.waiting) == len(PROMPTS))
    outage.engine.admits = True
    outage.engine.go_on()
    await outage.end(*PROMPTS)
    together = set(PROMPTS.values())
    assert outage.engine.deaths == [together, together, {"poison!"}, {"poison!"}]
    refusal = outage.error("poison")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "POISON_SUSPECTED")
    assert refusal.retry_seconds is None
    for name in ("a", "b"):
        assert outage.session.text(name) == outage.engine.expected(PROMPTS[name], 300)


async def test_a_suspect_without_credit_keeps_nobody_waiting(outage: Outage) -> None:
    """It cannot be tried now; when it gets credit, it is."""
    outage.come_back()
    await outage.start("idle", "idle!", credit=0)
    await outage.start("other", tokens=1000)
    await outage.has_tokens("other", 3)
    for _ in range(2):
        await outage.kill_and_come_back(Place(outage.engine_id("idle!"), 0, 0, 1))
        await outage.has_tokens("other", len(outage.session.deltas("other")) + 3)
    await outage.session.send(credit={"request_id": "idle", "upto": 5})
    await outage.end("idle", "other")
    assert outage.error("idle").reason == "POISON_SUSPECTED"
    assert outage.session.text("other") == outage.engine.expected("tide", 1000)


async def test_a_hundred_kills_from_outside_blame_nobody(outage: Outage) -> None:
    for name in ("a", "b"):
        await outage.start(name, name, tokens=400)
    ids = []
    for kill in range(100):
        for name in ("a", "b"):
            await outage.has_tokens(name, 2 * kill + 1)
        ids = ids or [outage.engine_id("a"), outage.engine_id("b")]
        at = 2 * kill
        await outage.kill_and_come_back(*(Place(engine_id, 0, at, at + 2) for engine_id in ids))
    await outage.end("a", "b")
    for name in ("a", "b"):
        assert outage.session.text(name) == outage.engine.expected(name, 400)
        assert outage.session.progress(name) == [RECOVERED] * 100


async def test_where_no_other_engine_comes_every_request_is_told_and_new_ones_are_refused(
    start_front: Callable[..., Awaitable[Front]],
) -> None:
    async def restart(gone: EngineGone) -> None:
        raise gone

    front = await start_front(restart=restart)
    front.engine.admits = False
    session = await open_session(front)
    await session.send(start={"request_id": "r", "prompt": {"text": "x"}})
    await until(lambda: front.engine.waiting)
    front.engine.kill()
    error = read_status((await session.next("request_error")).request_error.status)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
    assert error.retry_seconds
    with pytest.raises(EngineGone):
        await front.server.engine_ended
