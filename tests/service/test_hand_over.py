"""The client's sessions against real fronts: connections that break, servers that stop, requests that go on.

``TIDEGATE_CUTS`` sets how often the connection is cut; the count is printed.
"""

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import pytest
from front import Front, running_front

from tidegate.service.client import AsyncClient, Client, NotFound, SessionStream, Unavailable
from tidegate.service.session_limits import SessionLimits

CUTS = int(os.environ.get("TIDEGATE_CUTS", "25"))
SECONDS = 60.0

Start = Callable[..., Any]


class Scissors:
    """A proxy that resets every connection once so many bytes, at random, have come from the server."""

    def __init__(self, address: str, path: Path, seed: int, bytes_between: int) -> None:
        self.address = f"unix:{path}"
        self.cuts = 0
        self.most = CUTS
        self._path = path
        self._to = address.removeprefix("unix:")
        self._rng = random.Random(seed)
        self._between = bytes_between
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(self._join, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for pump in self._pumps:
            pump.cancel()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._to)
        left = self._rng.randint(1, 2 * self._between) if self.cuts < self.most else None
        ends = (writer, server_writer)
        for pump in (
            self._pump(reader, server_writer, ends, None),
            self._pump(server_reader, writer, ends, left),
        ):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: tuple[asyncio.StreamWriter, ...],
        left: int | None,
    ) -> None:
        try:
            while data := await reader.read(65536):
                if left is not None and len(data) >= left:
                    writer.write(data[:left])
                    await writer.drain()
                    self.cuts += 1
                    break
                left = None if left is None else left - len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the other direction was cut first
        finally:
            for end in ends:
                end.transport.abort()


async def read_all(stream: SessionStream) -> tuple[list[int], str]:
    tokens: list[int] = []
    text = ""
    async for chunk in stream:
        assert chunk.offset == len(tokens), "a gap, or tokens twice"
        tokens += chunk.token_ids
        text += chunk.text
    return tokens, text


@pytest.fixture
async def two_fronts(tmp_path: Path) -> AsyncGenerator[tuple[Front, Front]]:
    async with AsyncExitStack() as stack:
        fronts = []
        for name in "ab":
            folder = tmp_path / name
            folder.mkdir()
            fronts.append(await stack.enter_async_context(running_front(folder, step_seconds=0.005)))
        yield fronts[0], fronts[1]


@pytest.mark.timeout(60 + 2 * CUTS)
async def test_cut_connections_lose_and_double_nothing(start_front: Start, tmp_path: Path) -> None:
    """At random bytes, in the middle of messages and of opening; requests with stops, choices, logprobs."""
    front = await start_front()
    started = 0
    async with (
        Scissors(front.server.addresses[0], tmp_path / "proxy", seed=7, bytes_between=6000) as proxy,
        AsyncClient(proxy.address, retries=50) as client,
        client.session() as session,
    ):

        async def one(number: int) -> None:
            prompt = f"prompt {number}"
            options: dict[str, Any] = {"logprobs": 2, "prompt_logprobs": 2} if number % 3 == 0 else {}
            expected = front.engine.expected(prompt, 150)
            if number % 3 == 1:
                stop = expected[100:104]
                options["stop"] = [stop]
                expected = expected[: expected.index(stop)]
            stream = await session.start(prompt, max_tokens=150, credit=32, **options)
            _, text = await read_all(stream)
            assert text == expected
            assert stream.finished is not None
            told = [position.chosen.token_id for position in stream.prompt_logprobs]
            assert told == (front.text.encode(prompt)[1:] if "prompt_logprobs" in options else [])

        while proxy.cuts < CUTS:
            await asyncio.gather(*(one(started + index) for index in range(8)))
            started += 8
        assert not front.engine.running
    print(f"{proxy.cuts} cuts, {started} requests, none with a token lost or doubled")


async def test_a_drained_server_hands_64_streams_over(two_fronts: tuple[Front, Front]) -> None:
    first, second = two_fronts
    addresses = [front.server.addresses[0] for front in two_fronts]
    async with AsyncClient(addresses) as client, client.session() as session:
        streams = [
            await session.start(f"prompt {index}", max_tokens=120, temperature=1.0, n=1 + index % 8 // 7)
            for index in range(64)
        ]
        readings = [asyncio.create_task(read_first(stream)) for stream in streams]
        async with asyncio.timeout(SECONDS):
            while not all(stream.has_tokens for stream in streams):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await first.server.drain(30)
            texts = await asyncio.gather(*readings)
    for index, text in enumerate(texts):
        assert text == first.engine.expected(f"prompt {index}", 120)
        finished = streams[index].finished
        assert finished is not None
        assert finished.reason == "max_tokens"
        assert finished.usage.output_tokens == 120 * len(finished.choices)
    assert not second.engine.running
    assert len(second.engine.commands) > 0


async def read_first(stream: SessionStream) -> str:
    """Of its first choice."""
    text, tokens = "", 0
    async for chunk in stream:
        if chunk.choice == 0:
            assert chunk.offset == tokens
            tokens += len(chunk.token_ids)
            text += chunk.text
    return text


async def test_a_server_that_is_gone_is_replaced_by_another_one(two_fronts: tuple[Front, Front]) -> None:
    first, _ = two_fronts
    addresses = [front.server.addresses[0] for front in two_fronts]
    async with AsyncClient(addresses) as client, client.session() as session:
        stream = await session.start("tide", max_tokens=300)
        chunk = await anext(stream)
        await first.server.stop()
        _, text = await read_all_from(stream, len(chunk.token_ids))
    assert chunk.text + text == first.engine.expected("tide", 300)


async def read_all_from(stream: SessionStream, offset: int) -> tuple[int, str]:
    text = ""
    async for chunk in stream:
        assert chunk.offset == offset
        offset += len(chunk.token_ids)
        text += chunk.text
    return offset, text


async def test_a_session_that_the_server_has_lost_goes_on_there_anew(
    start_front: Start, tmp_path: Path
) -> None:
    front = await start_front(limits=SessionLimits(max_message_bytes=2**20, resume_timeout=0.01))
    async with (
        Scissors(front.server.addresses[0], tmp_path / "proxy", seed=3, bytes_between=2000) as proxy,
        AsyncClient(proxy.address, retries=20) as client,
        client.session() as session,
    ):
        proxy.most = 3
        texts = [await (await session.start(f"p{index}", max_tokens=200)).text() for index in range(10)]
    assert texts == [front.engine.expected(f"p{index}", 200) for index in range(10)]


async def test_turns_and_forks_through_the_client(start_front: Start) -> None:
    front = await start_front()
    async with AsyncClient(front.server.addresses[0]) as client, client.session() as session:
        chat = [{"role": "user", "content": "hello"}]
        first = await session.start(chat, max_tokens=5, lease=60)
        answer = await first.text()
        more = [{"role": "user", "content": "more"}]
        second = await session.append(first, more, max_tokens=5)
        await second.text()
        assert second.admitted is not None
        so_far = f"user: hello<eos>assistant: {answer}<eos>user: more<eos>assistant: "
        assert list(second.admitted.prompt_token_ids) == front.text.encode(so_far)
        fork = await session.fork(first, at_offset=2, max_tokens=3)
        await fork.text()
        assert fork.admitted is not None
        assert fork.admitted.prompt_tokens == first.admitted.prompt_tokens + 2  # type: ignore[union-attr]
        with pytest.raises(NotFound, match="lease") as failed:
            await (await session.append(second, more)).text()
        assert failed.value.reason == "PARENT_GONE"
        long = await session.start("x", max_tokens=5, credit=4, auto_credit=False)
        await anext(long)
        session.update(long, max_tokens=12)
        long.grant(100)
        await long.text()
        assert long.finished is not None
        assert long.finished.usage.output_tokens == 12


async def test_a_long_output_is_acknowledged_as_it_comes(start_front: Start) -> None:
    """Far more than what may be un-acknowledged."""
    front = await start_front(limits=SessionLimits(max_message_bytes=2**20, unacked_log_bytes=400))
    async with AsyncClient(front.server.addresses[0]) as client, client.session() as session:
        streams = [await session.start(f"p{index}", max_tokens=300) for index in range(4)]
        texts = await asyncio.gather(*(stream.text() for stream in streams))
    assert texts == [front.engine.expected(f"p{index}", 300) for index in range(4)]


async def test_no_server_left_fails_the_requests(start_front: Start) -> None:
    front = await start_front(step_seconds=0.01)
    async with AsyncClient(front.server.addresses[0], retries=1) as client, client.session() as session:
        stream = await session.start("x", max_tokens=1000)
        await anext(stream)
        await front.server.stop()
        with pytest.raises(Unavailable):
            async with asyncio.timeout(SECONDS):
                await stream.text()


async def test_the_blocking_client_has_the_same_sessions(start_front: Start) -> None:
    front = await start_front()

    def talk() -> tuple[str, int]:
        with Client(front.server.addresses[0]) as client, client.session() as session:
            first = session.start("hello", max_tokens=5, lease=60)
            text = first.text()
            turn = session.append(first, " and", max_tokens=3)
            turn.text()
            fork = session.fork(first, max_tokens=2)
            fork.text()
            assert turn.admitted is not None
            return text, turn.admitted.prompt_tokens

    text, prompt_tokens = await asyncio.to_thread(talk)
    assert text == front.engine.expected("hello", 5)
    assert prompt_tokens == 5 + 5 + 4
