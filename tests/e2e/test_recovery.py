"""Engines that die under load: the streams pause, go on, and end as if nothing had happened.

How often CI lets it happen is little; ``TIDEGATE_KILLS`` and ``TIDEGATE_SIGTERMS`` say otherwise.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

import grpc.aio
import pytest
from served import Served, is_empty, load_when
from wire import Seen, Session, client_process, connect, generate

from tidegate.v1 import events_pb2

KILLS = int(os.environ.get("TIDEGATE_KILLS", "4"))
SIGTERMS = int(os.environ.get("TIDEGATE_SIGTERMS", "1"))
NUM_STREAMS = 64
NUM_SESSIONS = 8
DEADLY = 2
"""A token that no story below holds."""
CREDIT = 18
"""Tokens of each stream between two kills, at most."""
KILLS_OF_A_ROUND = 100
"""What a stream lives through before it reaches the length of the context."""
PATIENCE = 300.0
"""Seconds without a token for anybody. More, and something hangs."""
RECOVERED = events_pb2.PROGRESS_KIND_RECOVERED

ENGINE = ("demo", "--dtype", "float32", "--block-size", "16", "--device-kv-tokens", "32768")
"""With room for all streams at their full length, in the type in which tokens do not depend on the batch."""

pytestmark = pytest.mark.timeout(600)
"""Engines start several times in a test, which takes a busy machine its time."""

NUMBERS = itertools.count()
"""An id names one request: the same again would only be read again."""

Serve = Callable[..., Served]


def stories(number: int, max_tokens: int) -> list[Seen]:
    """Prompts of several lengths; every other one greedy, the others with a seed."""
    return [
        Seen(
            f"story {next(NUMBERS)}",
            "",
            {
                "prompt": {"text": f"Tell me a story about number {index}. " * (1 + index % 5)},
                "sampling": {
                    "max_tokens": max_tokens,
                    "ignore_eos": True,
                    "temperature": index % 2 * 0.9,
                    "seed": index,
                },
            },
        )
        for index in range(number)
    ]


@contextlib.asynccontextmanager
async def running(
    channel: grpc.aio.Channel, requests: list[Seen], credit: int = 10_000
) -> AsyncGenerator[list[Session]]:
    """Each with a first token, on a few sessions, which end with them."""
    sessions = [Session(channel) for _ in range(NUM_SESSIONS)]
    readings = [await session.open() for session in sessions]
    for index, request in enumerate(requests):
        await sessions[index % NUM_SESSIONS].start(request, credit=credit)
    await all_have_more(requests, 1)
    yield sessions
    # Behind its Close a session of these acknowledges nothing more, and long streams would stall.
    await unless_it_hangs((request.has_ended() for request in requests), requests)
    for session in sessions:
        await session.send(close={})
    await unless_it_hangs(readings, requests)


async def unless_it_hangs(events: Iterable[Awaitable[None]], requests: list[Seen]) -> None:
    """Wait for all of them, as long as tokens come: how fast they do is the machine's affair."""
    waiting, before = {asyncio.ensure_future(event) for event in events}, -1
    while waiting:
        now = sum(len(request.tokens) for request in requests)
        assert now > before, f"{len(waiting)} wait, and nobody had a token for {PATIENCE:.0f} s"
        done, waiting = await asyncio.wait(waiting, timeout=PATIENCE, return_when=asyncio.FIRST_EXCEPTION)
        before = now
        for one in done:
            one.result()


async def all_have_more(requests: list[Seen], number: int) -> None:
    """Wait until each has so many more tokens, or its end."""
    await unless_it_hangs((r.has_tokens(len(r.tokens) + number) for r in requests), requests)


@pytest.mark.timeout(KILLS * 60 + 600)
async def test_kills_of_the_engine_change_no_token_of_any_stream(serve: Serve) -> None:
    server = serve(*ENGINE, "--max-restarts", "1000000")
    pauses: list[float] = []
    async with connect(server.address) as channel:
        undisturbed = stories(NUM_STREAMS, CREDIT * (min(KILLS, KILLS_OF_A_ROUND) + 1))
        async with running(channel, undisturbed):
            pass
        while len(pauses) < KILLS:
            kills = min(KILLS - len(pauses), KILLS_OF_A_ROUND)
            requests = stories(NUM_STREAMS, CREDIT * (kills + 1))
            pauses += await kill_under(channel, requests, server, kills)
            for request, other in zip(requests, undisturbed, strict=True):
                assert request.ends == ["MAX_TOKENS"], request.id
                assert request.tokens == other.tokens[: len(request.tokens)], request.id
                assert request.progress.count(RECOVERED) == kills, request.id
        await load_when(channel, is_empty)
    restarts = [entry["after_s"] for entry in server.log if entry["event"] == "the engine serves again"]
    print(f"{KILLS} kills under {NUM_STREAMS} streams: 0 hung, 0 tokens lost, doubled or changed")
    print(
        f"serving again after {spread(restarts)} s; every stream had its next token after {spread(pauses)} s"
    )
    assert len(restarts) == KILLS
    assert server.faults == []


async def kill_under(
    channel: grpc.aio.Channel, requests: list[Seen], server: Served, kills: int
) -> list[float]:
    """Seconds from each kill until every stream had a token more. Credit paces them, or they would end."""
    pauses = []
    async with running(channel, requests, credit=CREDIT) as sessions:
        for kill in range(kills):
            # Each has as much credit left as a few steps use up: they run.
            await grant(sessions, CREDIT * kill + CREDIT)
            await all_reach(requests, CREDIT * kill + 3)
            marks = [len(request.tokens) for request in requests]
            os.kill(server.engine_pid, signal.SIGKILL)
            killed = time.perf_counter()
            await grant(sessions, CREDIT * kill + CREDIT + 3)
            more = (r.has_tokens(mark + 1) for r, mark in zip(requests, marks, strict=True))
            await unless_it_hangs(more, requests)
            pauses.append(time.perf_counter() - killed)
        await grant(sessions, 10_000)
    return pauses


async def grant(sessions: list[Session], upto: int) -> None:
    for session in sessions:
        for request_id in session.requests:
            await session.send(credit={"request_id": request_id, "upto": upto})


async def all_reach(requests: list[Seen], number: int) -> None:
    await unless_it_hangs((request.has_tokens(number) for request in requests), requests)


def spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f} (median {ordered[len(ordered) // 2]:.2f})"


async def test_requests_that_kill_the_engine_are_refused_and_all_others_finish(serve: Serve) -> None:
    """A failpoint kills it wherever one token is computed: the last of a short and of a long prompt."""
    server = serve(*ENGINE, "--max-step-tokens", "128", failpoints=f"step=kill@{DEADLY}")
    innocent = stories(24, 120)
    async with connect(server.address) as channel:
        async with running(channel, innocent):
            for length in (3, 300):
                content = {"prompt": {"token_ids": {"ids": [*[7] * length, DEADLY]}}}
                poison = Seen(f"poison {length}", "", content)
                await generate(channel, poison)
                assert poison.ends == ["POISON_SUSPECTED"]
        await load_when(channel, is_empty)
    deaths = sum(entry["event"] == "the engine died" for entry in server.log)
    print(f"2 deadly requests refused after {deaths} deaths")
    assert [request.ends for request in innocent] == [["MAX_TOKENS"]] * len(innocent)


async def test_a_frozen_engine_is_replaced(serve: Serve) -> None:
    server = serve(*ENGINE, "--hang-timeout", "5")
    requests = stories(8, 60)
    async with connect(server.address) as channel, running(channel, requests):
        os.kill(server.engine_pid, signal.SIGSTOP)
    assert [request.ends for request in requests] == [["MAX_TOKENS"]] * 8
    assert "no progress for 5 s" in server.wait_for_log("the engine died")["reason"]


@pytest.mark.timeout(SIGTERMS * 90 + 600)
async def test_sigterm_cuts_none_of_256_streams(serve: Serve) -> None:
    """Half of them sessions, half of them ``Generate``; each has begun when the signal comes."""
    seconds, running_then = [], []
    for _ in range(SIGTERMS):
        # The grace is for the machine's other work; what the drain took is printed.
        server = serve(*ENGINE, "--drain-grace", f"{PATIENCE:.0f}")
        requests = stories(256, 40)
        async with connect(server.address) as channel, connect(server.address) as other:
            sessions = [Session(channel) for _ in requests[::2]]
            readings = [await session.open() for session in sessions]
            for session, request in zip(sessions, requests[::2], strict=True):
                await session.start(request)
            readings += [asyncio.create_task(generate(other, request)) for request in requests[1::2]]
            await all_have_more(requests, 1)
            # On a busy machine the first are at their end before the last have begun.
            running_then.append(sum(not request.ends for request in requests))
            assert running_then[-1] > 0
            for session in sessions:
                await session.send(close={})
            server.process.send_signal(signal.SIGTERM)
            signalled = time.perf_counter()
            await unless_it_hangs(readings, requests)
            assert await asyncio.to_thread(server.process.wait, PATIENCE) == 0
            seconds.append(time.perf_counter() - signalled)
        assert [request.ends for request in requests] == [["MAX_TOKENS"]] * 256
        assert all(session.was_told_to_go for session in sessions)
        assert server.faults == []
    print(
        f"{SIGTERMS} SIGTERMs under 256 streams, {min(running_then)} or more of them running: 0 cut; gone "
        f"after {min(seconds):.1f} to {max(seconds):.1f} s"
    )


async def test_killed_clients_leave_nothing_behind_while_others_go_on(serve: Serve) -> None:
    server = serve(*ENGINE)
    requests = stories(16, 200)
    async with connect(server.address) as channel:
        async with running(channel, requests):
            for _ in range(2):
                with client_process(server.address, 20, 1500, credit=2000) as client:
                    await client.has_tokens()
                    client.process.kill()
        assert [request.ends for request in requests] == [["MAX_TOKENS"]] * 16
        await load_when(channel, is_empty)
    assert server.faults == []
