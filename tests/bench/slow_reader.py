"""Whether clients that stop reading slow the others down: pairs of runs, without them and with them.

    PYTHONPATH=tests/support python tests/bench/slow_reader.py --pairs 5

A real ``tidegate serve demo`` with a host tier. The others are requests on sessions of their own, whose
gaps between two tokens are measured. Those that stop reading have generated as much as their session may
owe, have stalled, and have been moved to the host when the others begin; behind each run they read on, and
what they then have must be what they would have had. Half of the pairs begin with them.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import grpc.aio
import uvloop
from served import Load, Totals, load_when, served
from stopwatch import percentile
from wire import Seen, Session, connect

from tidegate.v1 import control_pb2, control_pb2_grpc, session_pb2

TIERS = ("demo", "--device-kv-tokens", "65536", "--host-kv-tokens", "65536")
SESSIONS, REQUESTS, TOKENS = 4, 8, 400
"""The others: requests of each session, and their length."""
SLOW, SLOW_TOKENS, LOGPROBS = 16, 100, 5
"""Those that stop reading: with so many logprobs, a session may owe 250 tokens of them."""


def story(name: str, max_tokens: int, **sampling: object) -> dict[str, Any]:
    sampling = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0, **sampling}
    return {"prompt": {"text": f"Tell me a story about {name}."}, "sampling": sampling}


class TimedSession(Session):
    """Notes when each token came."""

    def __init__(self, channel: grpc.aio.Channel, gaps: list[float]) -> None:
        super().__init__(channel)
        self._gaps = gaps
        self._last: dict[str, float] = {}

    async def _take(self, response: session_pb2.SessionResponse) -> None:
        now = time.perf_counter()
        for delta in response.batch.deltas:
            if delta.request_id in self._last:
                self._gaps.append(now - self._last[delta.request_id])
            self._last[delta.request_id] = now
        await super()._take(response)


async def others(channel: grpc.aio.Channel, run: int) -> float:
    """Milliseconds: the 99th percentile of the gaps between two tokens of a request."""
    gaps: list[float] = []
    requests, sessions = [], []
    for number in range(SESSIONS):
        session = TimedSession(channel, gaps)
        sessions.append((session, await session.open()))
        for index in range(REQUESTS):
            requests.append(Seen(f"{run}-{number}-{index}", "", story(f"{number} and {index}", TOKENS)))
            await session.start(requests[-1], credit=TOKENS)
    for request in requests:
        await request.has_ended()
    for session, reading in sessions:
        await session.done_writing()
        await reading
    if any(request.ends != ["MAX_TOKENS"] for request in requests):
        raise RuntimeError("a request did not end as it should")
    return percentile(gaps, 0.99) * 1e3


class SlowReaders:
    """One session, whose client reads when it is told to."""

    def __init__(self, channel: grpc.aio.Channel, run: int) -> None:
        self._session = Session(channel, ack_tokens=20)
        self._requests = [
            Seen(f"{run}-slow-{index}", "", story(f"lantern {index}", SLOW_TOKENS, logprobs=LOGPROBS))
            for index in range(SLOW)
        ]

    async def stop(self, channel: grpc.aio.Channel) -> int:
        """Let them stall and leave the device; the bytes that wait for them then."""
        await self._session.send(open={})
        for request in self._requests:
            await self._session.start(request, credit=SLOW_TOKENS)
        await load_when(channel, _is_off_the_device)
        control = control_pb2_grpc.ControlServiceStub(channel)
        sessions = (await control.ListSessions(control_pb2.ListSessionsRequest())).sessions
        (state,) = (state for state in sessions if state.running_requests == SLOW)
        return state.unacked_log_bytes + state.waiting_chars

    async def read(self) -> list[list[int]]:
        """All tokens of each."""
        reading = asyncio.create_task(self._session.read())
        for request in self._requests:
            await request.has_ended()
        for request in self._requests:
            await self._session.send(ack={"request_id": request.id, "upto": SLOW_TOKENS, "end": True})
        await self._session.send(close={})
        await reading
        return [request.tokens for request in self._requests]


def _is_off_the_device(load: Load, _: Totals) -> bool:
    """Some may have had no room in the session's log for a first token: they have stalled without KV."""
    device = load.device
    return load.swapped + load.stalled == SLOW and device.total == device.free + device.reclaimable


async def measure(address: str, pairs: int) -> dict[str, Any]:
    async with connect(address) as channel, connect(address) as lazy:
        await others(channel, -1)
        undisturbed = SlowReaders(lazy, -1)
        await undisturbed.stop(channel)
        expected = await undisturbed.read()
        figures: list[dict[str, float]] = []
        buffered, differing = 0, 0

        async def with_slow_readers(run: int) -> float:
            nonlocal buffered, differing
            slow = SlowReaders(lazy, run)
            buffered = max(buffered, await slow.stop(channel))
            p99 = await others(channel, 2 * run + 1)
            differing += await slow.read() != expected
            return p99

        for run in range(pairs):
            if run % 2:
                present = await with_slow_readers(run)
                absent = await others(channel, 2 * run)
            else:
                absent = await others(channel, 2 * run)
                present = await with_slow_readers(run)
            figures.append({"without_ms": round(absent, 2), "with_ms": round(present, 2)})
        control = control_pb2_grpc.ControlServiceStub(channel)
        totals = (await control.Inspect(control_pb2.InspectRequest())).totals
    return {
        "p99_of_the_others": figures,
        "median_ratio": round(median(one["with_ms"] / one["without_ms"] for one in figures), 3),
        "buffered_bytes": buffered,
        "runs_with_other_tokens": differing,
        "recomputed_tokens": totals.recomputed_tokens,
        "swapped_out_bytes": totals.swap_out_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), *TIERS) as server:
        print(json.dumps(uvloop.run(measure(server.address, options.pairs)), indent=1))


if __name__ == "__main__":
    main()
