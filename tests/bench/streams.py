"""How many streams the front holds: all opened at once, each with a token, and what each costs in memory.

    export PYTHONPATH=tests/support
    python tests/bench/streams.py --requests 10000
    python tests/bench/streams.py --requests 10000 --sessions 8

The engine, the front and the client are processes of their own (see ``timed_front.py``). Without
``--sessions`` each request is a ``Generate``. A request gets its first token at once and its last one when
all have long been open. How each ended is counted: anything but max_tokens is unexplained here.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import Any

import grpc.aio
import psutil
import uvloop
from timed_front import TimedFront, serving

from tidegate.v1 import events_pb2, inference_pb2, inference_pb2_grpc, session_pb2

CHANNELS = 8
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
TOKENS = 2
STEP_SECONDS = 0.02
AT_ONCE = 50
"""Requests that one message of a session starts."""


class Tally:
    def __init__(self, expected: int) -> None:
        self.ends: Counter[str] = Counter()
        self.ended_early = 0
        """Before all were open."""
        self.all_open = asyncio.Event()
        self._expected = expected
        self._open: set[str] = set()

    def end(self, how: str) -> None:
        self.ends[how] += 1
        self.ended_early += not self.all_open.is_set()

    def token(self, request_id: str) -> None:
        self._open.add(request_id)
        if len(self._open) == self._expected:
            self.all_open.set()


async def one_rpc(stub: Any, number: int, tally: Tally) -> None:
    request_id = f"r{number}"
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        prompt={"token_ids": {"ids": [1, 2, 3]}},
        sampling={"max_tokens": TOKENS},
    )
    try:
        async for response in stub.Generate(request):
            if response.HasField("batch"):
                tally.token(request_id)
            elif response.HasField("finished"):
                tally.end(events_pb2.FinishReason.Name(response.finished.choices[0].reason))
    except grpc.aio.AioRpcError as error:
        tally.end(f"{error.code().name}: {error.details()}")


async def one_session(channel: grpc.aio.Channel, number: int, requests: int, tally: Tally) -> None:
    call = inference_pb2_grpc.InferenceServiceStub(channel).Session()
    await call.write(session_pb2.SessionRequest(open={}))
    await call.read()

    async def write() -> None:
        for first in range(0, requests, AT_ONCE):
            message = session_pb2.SessionRequest()
            for index in range(first, min(first + AT_ONCE, requests)):
                start = {
                    "request_id": f"{number}-{index}",
                    "prompt": {"token_ids": {"ids": [1, 2, 3]}},
                    "sampling": {"max_tokens": TOKENS},
                }
                message.commands.commands.add(start=start)
            await call.write(message)

    writing = asyncio.create_task(write())
    left = requests
    while left and isinstance(response := await call.read(), session_pb2.SessionResponse):
        match response.WhichOneof("event"):
            case "batch":
                for delta in response.batch.deltas:
                    tally.token(delta.request_id)
            case "finished":
                tally.end(events_pb2.FinishReason.Name(response.finished.choices[0].reason))
                left -= 1
            case "request_error":
                tally.end(str(response.request_error.status.message))
                left -= 1
            case _:
                pass
    await writing
    await call.write(session_pb2.SessionRequest(close={}))
    while isinstance(await call.read(), session_pb2.SessionResponse):
        pass


async def measure(options: argparse.Namespace, front: TimedFront) -> dict[str, Any]:
    process, address = front.process, front.address
    tally = Tally(options.requests)
    channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(CHANNELS)]
    # What a first request brings along is no stream's.
    warm_up = Tally(1)
    await one_rpc(inference_pb2_grpc.InferenceServiceStub(channels[0]), -1, warm_up)
    cpu_before = _cpu(process)
    before, began = process.memory_info().rss, time.monotonic()
    if options.sessions:
        each = options.requests // options.sessions
        loads = [
            asyncio.create_task(one_session(channels[number % CHANNELS], number, each, tally))
            for number in range(options.sessions)
        ]
    else:
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
        loads = [
            asyncio.create_task(one_rpc(stubs[number % CHANNELS], number, tally))
            for number in range(options.requests)
        ]
    async with asyncio.timeout(options.patience):
        await tally.all_open.wait()
        opened, rss, cpu = time.monotonic() - began, process.memory_info().rss, _cpu(process)
        await asyncio.gather(*loads)
    for channel in channels:
        await channel.close()
    return {
        "way": f"{options.sessions} sessions" if options.sessions else "one RPC a request",
        "requests": options.requests,
        "all_have_a_token_after_s": round(opened, 2),
        "front_cpu_until_then_s": round(cpu - cpu_before, 2),
        "kb_each": round((rss - before) / options.requests / 1024, 1),
        "ended_before_all_were_open": tally.ended_early,
        "ends": dict(tally.ends),
    }


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=0)
    parser.add_argument("--patience", type=float, default=120)
    parser.add_argument("--hold", type=float, default=15, help="seconds from the first token to the last")
    options = parser.parse_args()
    with serving(STEP_SECONDS, round(options.hold / STEP_SECONDS)) as front:
        print(json.dumps(uvloop.run(measure(options, front)), indent=1))


if __name__ == "__main__":
    main()
