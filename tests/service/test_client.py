"""The Python client against a scripted server: what it does with every answer that a server may give."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from scripted_server import (
    DEFAULT_CREDIT,
    WORDS,
    ScriptedServer,
    refuse,
    retry_after,
    start_scripted_server,
    status,
)

from tidegate import AsyncClient, Client
from tidegate.service.client import (
    Cancelled,
    Chunk,
    Finished,
    InvalidRequest,
    NotSupported,
    Overloaded,
    Progress,
    PromptLogprobs,
    TidegateError,
    Unavailable,
)


async def eventually(holds: Callable[[], bool]) -> None:
    """For what has no event to wait for, such as the arrival of bytes."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedServer]:
    scripted, grpc_server = await start_scripted_server(f"unix:{tmp_path}/socket")
    yield scripted
    await grpc_server.stop(0)


@pytest.fixture
async def client(server: ScriptedServer, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"unix:{tmp_path}/socket") as connected:
        yield connected


# --- Generate ---------------------------------------------------------------------------------------------


async def test_generate_streams_chunks_and_then_says_how_it_ended(client: AsyncClient) -> None:
    stream = client.generate("hello", max_tokens=3)
    chunks = [chunk async for chunk in stream]
    assert [str(chunk) for chunk in chunks] == ["w0 ", "w1 ", "w2 "]
    assert [(chunk.offset, chunk.token_ids) for chunk in chunks] == [(0, (0,)), (1, (1,)), (2, (2,))]
    assert stream.admitted is not None
    assert stream.admitted.seed == 17
    assert stream.finished is not None
    assert stream.finished.reason == "max_tokens"
    assert stream.finished.usage.output_tokens == 3
    assert stream.finished.timings.to_first_token is None


async def test_text_reads_to_the_end(client: AsyncClient) -> None:
    assert await client.generate("hello", max_tokens=3).text() == "w0 w1 w2 "


@pytest.mark.parametrize(
    ("prompt", "form"),
    [
        ("hello", "text"),
        ([1, 2, 3], "token_ids"),
        (({"role": "user", "content": "hi"},), "chat"),
    ],
)
async def test_a_prompt_is_text_token_ids_or_messages(
    client: AsyncClient, server: ScriptedServer, prompt: Any, form: str
) -> None:
    await client.generate(prompt, max_tokens=1).text()
    assert server.requests[0].prompt.WhichOneof("content") == form


async def test_only_what_was_given_is_sent(client: AsyncClient, server: ScriptedServer) -> None:
    """The server's defaults apply to everything else, so that they can change."""
    await client.generate("x", max_tokens=1, temperature=0, stop=["."], priority=2, request_id="mine").text()
    request = server.requests[0]
    assert {field.name for field, _ in request.sampling.ListFields()} == {"max_tokens", "temperature", "stop"}
    assert (request.request_id, request.priority) == ("mine", 2)
    assert not request.HasField("sample_index")


def test_an_unknown_option_is_named() -> None:
    async def call() -> None:
        async with AsyncClient("unix:/nowhere") as client:
            client.generate("x", temprature=0)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="temprature"):
        asyncio.run(call())


async def test_leaving_a_stream_cancels_the_request(client: AsyncClient, server: ScriptedServer) -> None:
    server.token_delay = 0.01
    async with client.generate("x", max_tokens=1000) as stream:
        async for _ in stream:
            break
    await asyncio.wait_for(server.cancelled.wait(), 30)


async def test_cancel_ends_a_read_that_waits(client: AsyncClient, server: ScriptedServer) -> None:
    server.token_delay = 60
    stream = client.generate("x", max_tokens=1)
    reading = asyncio.create_task(stream.text())
    await eventually(lambda: bool(server.requests))
    stream.cancel()
    assert await asyncio.wait_for(reading, 30) == ""
    assert stream.finished is None
    await asyncio.wait_for(server.cancelled.wait(), 30)


async def test_cancelling_the_readers_task_cancels_the_request(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.token_delay = 60
    reading = asyncio.create_task(client.generate("x", max_tokens=1).text())
    await eventually(lambda: bool(server.requests))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.wait_for(server.cancelled.wait(), 30)


async def test_the_timeout_is_the_calls_deadline(client: AsyncClient, server: ScriptedServer) -> None:
    server.token_delay = 60
    with pytest.raises(TidegateError) as failed:
        await client.generate_unary("x", timeout=0.2)
    assert failed.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_unary_gives_the_whole_answer(client: AsyncClient) -> None:
    response = await client.generate_unary("hello", max_tokens=2, logprobs=1)
    assert response.text == "w0 w1 "
    assert response.completions[0].finish_reason == "stop_string"
    assert response.completions[0].logprobs[1].top[0].logprob == -0.5
    assert response.finished.usage.prompt_tokens == 3


async def test_tokenize_detokenize_and_model_info(client: AsyncClient) -> None:
    ids = await client.tokenize("hé")
    assert ids == [104, 233]
    assert await client.detokenize(ids) == "hé"
    assert (await client.model_info()).vocab_size == 99


# --- errors and retries -----------------------------------------------------------------------------------


async def test_an_error_carries_every_violation(client: AsyncClient, server: ScriptedServer) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation
    bad = error_details_pb2.BadRequest(
        field_violations=[
            violation(field="sampling.top_p", description="must be above 0"),
            violation(field="sampling.n", description="must be positive"),
        ]
    )
    refusal = status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", bad, message="two problems")
    server.refusals = [lambda context: refuse(context, refusal)]
    with pytest.raises(InvalidRequest, match="two problems") as failed:
        await client.generate("x", max_tokens=1).text()
    assert failed.value.reason == "INVALID_REQUEST"
    assert [v.field for v in failed.value.violations] == ["sampling.top_p", "sampling.n"]


async def test_an_overloaded_server_names_a_time(client: AsyncClient, server: ScriptedServer) -> None:
    refusal = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after(2.5))
    server.refusals = [lambda context: refuse(context, refusal)]
    with pytest.raises(Overloaded) as failed:
        await client.generate_unary("x")
    assert failed.value.retry_after == 2.5
    assert len(server.requests) == 1


async def test_a_missing_call_is_told_apart(client: AsyncClient) -> None:
    with pytest.raises(NotSupported):
        await client.count_tokens("x")


async def test_unavailable_is_tried_again_no_sooner_than_the_server_asks(
    client: AsyncClient, server: ScriptedServer
) -> None:
    refusal = status(grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING", retry_after(0.4))
    server.refusals = [lambda context: refuse(context, refusal)]
    begin = asyncio.get_running_loop().time()
    assert await client.generate("x", max_tokens=2).text() == "w0 w1 "
    assert asyncio.get_running_loop().time() - begin >= 0.4
    assert len({request.request_id for request in server.requests}) == 1
    assert len(server.requests) == 2


async def test_retries_come_to_an_end(client: AsyncClient, server: ScriptedServer) -> None:
    refusal = status(grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
    server.refusals = [lambda context: refuse(context, refusal)] * 10
    with pytest.raises(Unavailable):
        await client.generate_unary("x")
    assert len(server.requests) == 4


async def test_no_retry_where_the_server_says_it_is_pointless(
    client: AsyncClient, server: ScriptedServer
) -> None:
    refusal = status(grpc.StatusCode.UNAVAILABLE, "DRAINING")
    server.refusals = [lambda context: refuse(context, refusal, ("grpc-retry-pushback-ms", "-1"))]
    with pytest.raises(Unavailable, match="no"):
        await client.generate_unary("x")
    assert len(server.requests) == 1


async def test_no_retry_beyond_the_timeout(client: AsyncClient, server: ScriptedServer) -> None:
    refusal = status(grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING", retry_after(30))
    server.refusals = [lambda context: refuse(context, refusal)]
    with pytest.raises(Unavailable):
        await asyncio.wait_for(client.generate_unary("x", timeout=25), 20)


async def test_no_retry_once_a_token_has_come(client: AsyncClient, server: ScriptedServer) -> None:
    """A second run would say the first words twice."""
    server.lose_connection_at = 1
    stream = client.generate("x", max_tokens=3)
    assert str(await anext(stream)) == "w0 "
    with pytest.raises(Unavailable):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert len(server.requests) == 1


async def test_a_retry_in_the_middle_of_a_prompts_logprobs_doubles_none(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.lose_connection_in_prompt = True
    stream = client.generate("x", max_tokens=2, prompt_logprobs=0)
    told = [event async for event in stream.events() if isinstance(event, PromptLogprobs)]
    assert len(server.requests) == 2
    assert [(event.offset, len(event.positions)) for event in told] == [(1, 2), (3, 1)]
    assert [position.chosen.token_id for position in stream.prompt_logprobs] == [5, 6, 7]


async def test_no_server_is_unavailable_without_a_reason(tmp_path: Path) -> None:
    async with AsyncClient(f"unix:{tmp_path}/none", retries=1) as client:
        with pytest.raises(Unavailable) as failed:
            await client.generate("x", max_tokens=1).text()
    assert failed.value.reason == ""


# --- sessions ---------------------------------------------------------------------------------------------


async def test_requests_of_a_session_interleave(client: AsyncClient) -> None:
    async with client.session() as session:
        streams = [await session.start("x", max_tokens=20 + i) for i in range(10)]
        texts = await asyncio.gather(*(stream.text() for stream in streams))
    assert texts == ["".join(WORDS[: 20 + i]) for i in range(10)]
    assert session.opened.model == "m"


async def test_credit_follows_what_the_application_reads(client: AsyncClient, server: ScriptedServer) -> None:
    """Bytes that merely arrived earn the server nothing."""
    async with client.session() as session:
        stream = await session.start("x", max_tokens=1000)
        await eventually(lambda: bool(stream.progress))
        assert [c.WhichOneof("command") for c in server.commands] == ["start"]
        await anext(stream)
        await eventually(lambda: len(stream.progress) == 2)
        assert server.commands[-1].credit.upto == 4 + DEFAULT_CREDIT
        stream.cancel()


async def test_without_auto_credit_grant_alone_lets_it_go_on(
    client: AsyncClient, server: ScriptedServer
) -> None:
    async with client.session() as session:
        stream = await session.start("x", max_tokens=10, credit=4, auto_credit=False)
        events = stream.events()
        seen = [await anext(events) for _ in range(3)]
        assert seen[-1] == Progress(choice=0, kind="parked")
        stream.grant(100)
        rest = [event async for event in events]
    assert [event.text for event in rest if isinstance(event, Chunk)] == ["w4 w5 w6 w7 ", "w8 w9 "]
    assert isinstance(rest[-1], Finished)
    assert [c.credit.upto for c in server.commands if c.HasField("credit")] == [100]


async def test_a_request_without_any_credit_needs_manual_grants(client: AsyncClient) -> None:
    async with client.session() as session:
        with pytest.raises(ValueError, match="auto_credit"):
            await session.start("x", credit=0)


async def test_credit_counts_behind_tokens_generated_before(
    client: AsyncClient, server: ScriptedServer
) -> None:
    async with client.session() as session:
        stream = await session.start("x", max_tokens=6, generated_token_ids=[0, 1, 2, 3])
        assert await stream.text() == "w4 w5 "
    assert server.commands[0].start.credit == 4 + DEFAULT_CREDIT


async def test_a_cancelled_request_ends_with_what_there_was(client: AsyncClient) -> None:
    async with client.session() as session:
        stream = await session.start("x", max_tokens=1000, credit=4, auto_credit=False)
        await anext(stream)
        stream.cancel()
        assert [chunk async for chunk in stream] == []
        assert stream.finished is not None
        assert stream.finished.reason == "cancelled"


async def test_an_error_of_one_request_leaves_the_others_alone(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.start_errors = [status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")]
    async with client.session() as session:
        bad = await session.start("x", max_tokens=3)
        good = await session.start("x", max_tokens=3)
        assert await good.text() == "w0 w1 w2 "
        with pytest.raises(InvalidRequest):
            await bad.text()
        assert await (await session.start("x", max_tokens=1)).text() == "w0 "


async def test_a_request_refused_as_unavailable_is_started_again(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.start_errors = [status(grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING", retry_after(0.2))]
    async with client.session() as session:
        stream = await session.start("x", max_tokens=2, timeout=20)
        assert await stream.text() == "w0 w1 "
    starts = [c.start for c in server.commands if c.HasField("start")]
    assert len({start.request_id for start in starts}) == 1
    limits = [start.time_limit.ToMilliseconds() for start in starts]
    assert limits[0] == 20_000
    assert 10_000 < limits[1] <= 19_800


async def test_a_request_can_be_cancelled_while_it_waits_for_a_retry(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.start_errors = [status(grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING", retry_after(60))]
    async with client.session() as session:
        stream = await session.start("x", max_tokens=2)
        await eventually(lambda: bool(session._resends))
        stream.cancel()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(stream.text(), 30)


async def test_a_request_that_is_cancelled_while_its_refusal_comes_is_not_started_again(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.start_errors = [status(grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING", retry_after(0.1))]
    async with client.session() as session:
        stream = await session.start("x", max_tokens=2)
        stream.cancel()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(stream.text(), 30)
    assert [command.WhichOneof("command") for command in server.commands].count("start") == 1


async def test_the_time_limit_travels_with_the_request(client: AsyncClient, server: ScriptedServer) -> None:
    async with client.session() as session:
        await (await session.start("x", max_tokens=1, timeout=1.5)).text()
    assert server.commands[0].start.time_limit.ToMilliseconds() == 1500


async def test_a_lost_session_fails_every_request_on_it(tmp_path: Path) -> None:
    _, grpc_server = await start_scripted_server(f"unix:{tmp_path}/socket")
    async with AsyncClient(f"unix:{tmp_path}/socket") as client, client.session() as session:
        stream = await session.start("x", max_tokens=1000, credit=4, auto_credit=False)
        await anext(stream)
        await grpc_server.stop(0)
        with pytest.raises(Unavailable):
            await anext(stream)
        with pytest.raises(Unavailable):
            await session.start("x")


async def test_a_session_is_opened_again_where_the_server_was_not_ready(
    client: AsyncClient, server: ScriptedServer
) -> None:
    refusal = status(grpc.StatusCode.UNAVAILABLE, "DRAINING")
    server.refusals = [lambda context: refuse(context, refusal)]
    async with client.session() as session:
        assert await (await session.start("x", max_tokens=1)).text() == "w0 "


async def test_leaving_a_session_cancels_what_still_runs(client: AsyncClient, server: ScriptedServer) -> None:
    async with client.session() as session:
        stream = await session.start("x", max_tokens=1000)
        await anext(stream)
    # Told, and not only left: a session that loses its stream would go on.
    assert [c.WhichOneof("command") for c in server.commands[-2:]] == ["cancel", "close"]
    async for _ in stream:
        pass
    assert stream.finished is not None
    assert stream.finished.reason == "cancelled"


@pytest.mark.parametrize("how", ["generate", "session"])
async def test_closing_the_client_cancels_streams_that_nobody_reads(
    server: ScriptedServer, tmp_path: Path, how: str
) -> None:
    server.token_delay = 0.02
    client = AsyncClient(f"unix:{tmp_path}/socket")
    session = await client.session().__aenter__()
    start = session.start("x", max_tokens=1000) if how == "session" else None
    stream = client.generate("x", max_tokens=1000) if start is None else await start
    await anext(stream)
    await client.aclose()
    if how == "session":
        await eventually(lambda: server.commands[-1].HasField("close"))
        assert any(command.HasField("cancel") for command in server.commands)
    else:
        await asyncio.wait_for(server.cancelled.wait(), 30)


async def test_leaving_an_idle_session_closes_it(client: AsyncClient, server: ScriptedServer) -> None:
    async with client.session() as session:
        await (await session.start("x", max_tokens=1)).text()
    assert server.commands[-1].WhichOneof("command") == "close"
    assert not server.cancelled.is_set()


async def test_two_requests_of_a_session_cannot_share_an_id(client: AsyncClient) -> None:
    async with client.session() as session:
        await session.start("x", max_tokens=1000, request_id="a")
        with pytest.raises(ValueError, match="'a'"):
            await session.start("x", request_id="a")


async def test_an_id_that_no_server_would_take_is_refused_before_it_is_sent(client: AsyncClient) -> None:
    async with client.session() as session:
        with pytest.raises(ValueError, match="at most 256 characters"):
            await session.start("x", request_id="a" * 257)


# --- the blocking client ----------------------------------------------------------------------------------


async def test_the_blocking_client_does_the_same(server: ScriptedServer, tmp_path: Path) -> None:
    def use() -> None:
        with Client(f"unix:{tmp_path}/socket") as client:
            assert [str(chunk) for chunk in client.generate("x", max_tokens=2)] == ["w0 ", "w1 "]
            assert client.generate_unary("x").text == "w0 w1 "
            assert client.tokenize("a") == [97]
            with client.session() as session:
                stream = session.start("x", max_tokens=6, credit=4, auto_credit=False)
                kinds = []
                for event in stream.events():
                    kinds.append(type(event).__name__)
                    if isinstance(event, Progress):
                        stream.grant(6)
                assert kinds == ["Admitted", "Chunk", "Progress", "Chunk", "Finished"]
                assert stream.finished is not None

    await asyncio.to_thread(use)


async def test_the_blocking_client_cancels_what_is_left_early(server: ScriptedServer, tmp_path: Path) -> None:
    server.token_delay = 0.01

    def use() -> None:
        with Client(f"unix:{tmp_path}/socket") as client, client.generate("x", max_tokens=1000) as stream:
            assert str(next(stream)) == "w0 "

    await asyncio.to_thread(use)
    await asyncio.wait_for(server.cancelled.wait(), 30)


def test_the_client_needs_neither_torch_nor_the_engine() -> None:
    """A service that only asks for tokens installs and loads three small libraries."""
    script = (
        "import sys; from tidegate import AsyncClient, Client; "
        "print(*sorted({n.split('.')[0] for n in sys.modules} & "
        "{'torch', 'transformers', 'msgspec', 'zmq', 'numpy', 'rich'}), 'tidegate.engine' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
