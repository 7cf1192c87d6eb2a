"""Faults that are the server's, as two clients see them."""

import asyncio
from pathlib import Path

import grpc
import pytest
from calls import CALLS, GENERATE, SESSION, Connect, Start, content, open_session, told
from fake_engine import DEADLY, FAULTS, LOST_COPY, POISON, TOO_LARGE
from front import Front, until

from tidegate.engine.client import EngineGone
from tidegate.service.listener import LOADING_SECONDS, open_listener


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    ("end_of_prompt", "code"),
    [
        (POISON, grpc.StatusCode.INTERNAL),
        (LOST_COPY, grpc.StatusCode.INTERNAL),
        (TOO_LARGE, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_request_that_the_engine_cannot_compute_fails_alone(
    start_front: Start, connect: Connect, method: str, end_of_prompt: str, code: grpc.StatusCode
) -> None:
    front = await start_front()
    client = connect(front)
    failed = await (await client.call(method, content(f"x{end_of_prompt}"))).outcome()
    assert told(failed) == (code, FAULTS[end_of_prompt])
    assert failed.retry_ms is None
    assert (await (await client.call(method, content())).outcome()).code == grpc.StatusCode.OK


@pytest.mark.parametrize("method", CALLS)
async def test_an_unexpected_fault_is_internal_and_quotes_nothing(
    start_front: Start, connect: Connect, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = await start_front()

    async def broken(text: str, add_special_tokens: bool = True) -> list[int]:
        raise RuntimeError(f"cannot read {text}")

    monkeypatch.setattr(front.text, "encode_async", broken)
    outcome = await (await connect(front).call(method, content())).outcome()
    assert told(outcome) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "the tide" not in str(outcome)


@pytest.mark.parametrize("method", CALLS)
async def test_a_draining_server_sends_elsewhere(start_front: Start, connect: Connect, method: str) -> None:
    front = await start_front(step_seconds=0.01)
    client = connect(front)
    running = await client.call(GENERATE, content(max_tokens=60))
    await until(lambda: front.engine.running)
    draining = asyncio.create_task(front.server.drain(30))
    await asyncio.sleep(0)
    outcome = await (await client.call(method, content())).outcome()
    assert told(outcome) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert outcome.retry_ms
    assert (await running.outcome()).messages[-1]["finished"]
    await draining


async def test_a_draining_server_sends_its_sessions_away_and_finishes_their_requests(
    start_front: Start, connect: Connect
) -> None:
    front = await start_front(step_seconds=0.01)
    session = await open_session(connect(front))
    await session.write(start={"request_id": "r", **content(max_tokens=60), "credit": 60})
    await session.until("batch")
    draining = asyncio.create_task(front.server.drain(30))
    assert (await session.until("go_away"))["grace"]
    await session.write(start={"request_id": "late", **content()})
    error = await session.until("request_error")
    assert (error["request_id"], error["status"]["code"]) == ("late", grpc.StatusCode.UNAVAILABLE.value[0])
    assert (await session.until("finished"))["request_id"] == "r"
    assert told(await session.outcome()) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    await draining


@pytest.mark.parametrize("method", [*CALLS, SESSION])
async def test_while_the_model_loads_a_call_is_told_when_to_come_back(
    connect: Connect, method: str, tmp_path: Path
) -> None:
    listener = await open_listener([f"unix:{tmp_path}/socket"])
    message = None if method == SESSION else content()
    outcome = await (await connect(listener.addresses[0]).call(method, message)).outcome()
    assert told(outcome) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
    assert outcome.retry_ms == LOADING_SECONDS * 1000
    assert not outcome.had_headers
    await listener.close()


# --- the engine's death -----------------------------------------------------------------------------------


async def test_a_stream_goes_on_when_another_engine_comes(start_front: Start, connect: Connect) -> None:
    fronts: list[Front] = []

    async def restart(gone: EngineGone) -> None:
        fronts[0].engine.revive()

    fronts.append(await start_front(restart=restart, step_seconds=0.005))
    (front,) = fronts
    call = await connect(front).call(GENERATE, content(max_tokens=100))
    first = await call.until("batch")
    front.engine.kill()
    outcome = await call.outcome()
    assert outcome.code == grpc.StatusCode.OK
    batches = [first, *(message["batch"] for message in outcome.messages if "batch" in message)]
    deltas = [delta for batch in batches for delta in batch["deltas"]]
    assert "".join(delta["text"] for delta in deltas) == front.engine.expected("the tide", 100)
    kinds = [message["progress"]["kind"] for message in outcome.messages if "progress" in message]
    assert kinds == ["PROGRESS_KIND_RECOVERED"]


@pytest.mark.parametrize("method", CALLS)
async def test_where_no_other_engine_comes_calls_are_told_when_to_come_back(
    start_front: Start, connect: Connect, method: str
) -> None:
    front = await start_front()
    front.engine.admits = False
    client = connect(front)
    running = await client.call(method, content())
    await until(lambda: front.engine.waiting)
    front.engine.kill()
    for call in (running, await client.call(method, content())):
        outcome = await call.outcome()
        assert told(outcome) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
        assert outcome.retry_ms
        assert not outcome.had_headers
    with pytest.raises(EngineGone):
        await front.server.engine_ended


@pytest.mark.parametrize("method", CALLS)
async def test_a_request_that_kills_the_engine_is_refused_for_good_and_others_finish(
    start_front: Start, connect: Connect, method: str
) -> None:
    fronts: list[Front] = []

    async def restart(gone: EngineGone) -> None:
        fronts[0].engine.revive()

    fronts.append(await start_front(restart=restart))
    (front,) = fronts
    front.engine.admits = False
    client = connect(front)
    deadly = await client.call(method, content(f"x{DEADLY}"))
    harmless = await client.call(method, content(max_tokens=50))
    await until(lambda: len(front.engine.waiting) == 2)
    front.engine.admits = True
    front.engine.go_on()
    outcome = await deadly.outcome()
    assert told(outcome) == (grpc.StatusCode.INTERNAL, "POISON_SUSPECTED")
    assert outcome.retry_ms is None
    assert (await harmless.outcome()).code == grpc.StatusCode.OK
