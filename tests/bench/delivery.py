"""What it costs the front to deliver: an engine that makes tokens on a timer, the front, and a client.

    export PYTHONPATH=tests/support
    python tests/bench/delivery.py --requests 512 --sessions 4 --tokens-per-second 102400 --seconds 60
    python tests/bench/delivery.py --requests 512 --rpcs --tokens-per-second 102400 --seconds 60

Three processes (see ``timed_front.py``). Text, credit and stop strings are on. A process's CPU is user and
system, of all its threads, between the two ends of the measurement. A message's latency is that of its
oldest token, from the stamp of the step to the client's turn to read it, and counts for all its tokens.
``--rpcs`` runs each request as a ``Generate`` of its own instead.
"""

import argparse
import asyncio
import json
import time
from array import array
from typing import Any

import grpc.aio
import psutil
import uvloop
from timed_front import MAX_MODEL_LEN, TimedFront, serving, stamps

from tidegate.service.life import spare_collector
from tidegate.v1 import inference_pb2, inference_pb2_grpc, session_pb2

STOPS = ("\n\nUser:", "<|stop|>", "###")
CREDIT = 4096
ACK_TOKENS = 2560
"""A quarter of what a session may owe, as with our own client."""


class Meter:
    """What the client sees."""

    def __init__(self) -> None:
        self.tokens = 0
        self.messages = 0
        self._latencies: array[int] = array("q")
        self._weights: array[int] = array("q")
        self._stamps = stamps()

    def take(self, deltas: Any) -> int:
        """How many tokens these were; the first of them is the oldest."""
        now = time.monotonic_ns()
        number = 0
        for delta in deltas:
            number += len(delta.token_ids)
        self.tokens += number
        self.messages += 1
        self._latencies.append(now - self._stamps[deltas[0].token_ids[0]])
        self._weights.append(number)
        return number

    def begin(self) -> None:
        """Forget the warm-up."""
        self.tokens = self.messages = 0
        del self._latencies[:], self._weights[:]

    def percentile(self, part: float) -> float:
        """Milliseconds, of tokens."""
        pairs = sorted(zip(self._latencies, self._weights, strict=True))
        left = part * sum(self._weights)
        for latency, weight in pairs:
            left -= weight
            if left <= 0:
                return latency / 1e6
        return 0.0


async def session(address: str, number: int, requests: int, meter: Meter) -> None:
    """Read, acknowledge and give credit for all requests together, now and then."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Session()
        await call.write(session_pb2.SessionRequest(open={}))
        await call.read()
        sampling = {"max_tokens": MAX_MODEL_LEN - 100, "stop": STOPS}
        for index in range(requests):
            start = {
                "request_id": f"{number}-{index}",
                "prompt": {"token_ids": {"ids": [1, 2, 3]}},
                "sampling": sampling,
                "credit": CREDIT,
            }
            await call.write(session_pb2.SessionRequest(start=start))
        unacked = 0
        granted = dict.fromkeys((f"{number}-{index}" for index in range(requests)), CREDIT)
        try:
            while isinstance(response := await call.read(), session_pb2.SessionResponse):
                if response.WhichOneof("event") != "batch":
                    continue
                deltas = response.batch.deltas
                unacked += meter.take(deltas)
                if unacked < ACK_TOKENS:
                    continue
                unacked = 0
                message = session_pb2.SessionRequest()
                add = message.commands.commands.add
                for delta in deltas:
                    request_id, upto = delta.request_id, delta.offset + len(delta.token_ids)
                    add(ack={"request_id": request_id, "upto": upto})
                    if granted[request_id] - upto < CREDIT // 2:
                        granted[request_id] = upto + CREDIT
                        add(credit={"request_id": request_id, "upto": upto + CREDIT})
                await call.write(message)
        finally:
            call.cancel()


async def rpcs(address: str, requests: int, meter: Meter) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one() -> None:
            request = inference_pb2.GenerateRequest(
                prompt={"token_ids": {"ids": [1, 2, 3]}},
                sampling={"max_tokens": MAX_MODEL_LEN - 100, "stop": STOPS},
            )
            async for response in stub.Generate(request):
                if response.WhichOneof("event") == "batch":
                    meter.take(response.batch.deltas)

        await asyncio.gather(*(one() for _ in range(requests)))


async def measure(options: argparse.Namespace, front: TimedFront) -> dict[str, Any]:
    meter = Meter()
    if options.rpcs:
        loads = [asyncio.create_task(rpcs(front.address, options.requests, meter))]
    else:
        each = options.requests // options.sessions
        loads = [
            asyncio.create_task(session(front.address, number, each, meter))
            for number in range(options.sessions)
        ]
    await asyncio.sleep(options.warm_up)
    for load in loads:
        if load.done():
            load.result()
    spare_collector()
    processes = {"front": front.process, "engine": front.engine, "client": psutil.Process()}
    meter.begin()
    before, began = {name: cpu_seconds(process) for name, process in processes.items()}, time.monotonic()
    await asyncio.sleep(options.seconds)
    seconds = time.monotonic() - began
    cpu = {name: cpu_seconds(process) - before[name] for name, process in processes.items()}
    result = {
        "way": "one RPC a request" if options.rpcs else f"{options.sessions} sessions",
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(meter.tokens / seconds),
        "messages_per_second": round(meter.messages / seconds),
        "cpu_percent": {name: round(100 * used / seconds, 1) for name, used in cpu.items()},
        "front_us_per_token": round(1e6 * cpu["front"] / max(1, meter.tokens), 2),
        "p50_ms": round(meter.percentile(0.5), 2),
        "p99_ms": round(meter.percentile(0.99), 2),
    }
    for load in loads:
        load.cancel()
    await asyncio.gather(*loads, return_exceptions=True)
    return result


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--rpcs", action="store_true")
    parser.add_argument("--tokens-per-second", type=float, default=102_400)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=3)
    options = parser.parse_args()
    with serving(options.requests / options.tokens_per_second) as front:
        # Not closed, for the reason that the front is not (see there).
        loop = uvloop.new_event_loop()
        print(json.dumps(loop.run_until_complete(measure(options, front)), indent=1), flush=True)


if __name__ == "__main__":
    main()
