"""Two real servers with one checkpoint: when one of them is stopped, the other one carries its streams on."""

import asyncio
import signal
from pathlib import Path
from typing import Any

from served import is_empty, load_when, served
from wire import connect

from tidegate.service.client import AsyncClient, SessionStream

NUM_STREAMS = 64
MAX_TOKENS = 120
CREDIT = 24
"""So far a stream gets before the test lets it go on: far from its end."""
PATIENCE = 300.0
"""Seconds; more, and something hangs."""

SERVER = ("demo", "--dtype", "float32", "--device-kv-tokens", "32768", "--drain-grace", f"{PATIENCE:.0f}")
"""With room for all streams, in the type in which tokens do not depend on the batch."""


async def test_a_stopped_server_hands_64_streams_over_and_no_token_changes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with served(folders[0], *SERVER) as first, served(folders[1], *SERVER) as second:
        async with AsyncClient(second.address) as client, client.session() as session:
            undisturbed = await asyncio.gather(*[read(await start(session, i)) for i in range(NUM_STREAMS)])
        assert len(set(map(tuple, undisturbed))) > NUM_STREAMS // 3

        async with AsyncClient([first.address, second.address]) as client, client.session() as session:
            streams = [await start(session, i, credit=CREDIT, auto_credit=False) for i in range(NUM_STREAMS)]
            beginnings = [[await anext(stream)] for stream in streams]
            first.process.send_signal(signal.SIGTERM)
            # It does not wait for the streams: they have left.
            assert await asyncio.to_thread(first.process.wait, PATIENCE) == 0
            for stream in streams:
                stream.grant(MAX_TOKENS)
            tokens = await asyncio.gather(*map(read, streams))
        told = [[*beginning[0].token_ids, *rest] for beginning, rest in zip(beginnings, tokens, strict=True)]
        assert told == undisturbed
        assert all(stream.finished and stream.finished.reason == "max_tokens" for stream in streams)
        async with connect(second.address) as channel:
            await load_when(channel, is_empty)
        assert first.faults == second.faults == []
    print(f"{NUM_STREAMS} streams carried on by another server, no token lost, doubled or changed")


async def start(session: Any, number: int, **options: Any) -> SessionStream:
    """Every other one greedy, the others with a seed."""
    stream: SessionStream = await session.start(
        f"Tell me a story about number {number}.",
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        temperature=number % 2 * 0.9,
        seed=number,
        **options,
    )
    return stream


async def read(stream: SessionStream) -> list[int]:
    async with asyncio.timeout(PATIENCE):
        return [token async for chunk in stream for token in chunk.token_ids]
