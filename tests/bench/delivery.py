"""What it costs the front to deliver: an engine that makes tokens on a timer, the front, and a client.

    python tests/bench/delivery.py --requests 512 --sessions 4 --tokens-per-second 100000 --seconds 60
    python tests/bench/delivery.py --requests 512 --rpcs --tokens-per-second 100000 --seconds 60

Three processes. Every engine step gives each request one token; the token's id is the number of the step,
so that the client, which looks up when the engine sent it, knows how long it took. Text, credit and stop
strings are on. The front's CPU is user and system, of all its threads, between the two ends of the
measurement. ``--rpcs`` runs each request as a ``Generate`` of its own instead.
"""

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import uvloop

from tidegate.engine.config import EngineConfig
from tidegate.engine.messages import (
    Admitted,
    Command,
    Delta,
    EngineInfo,
    Finish,
    Finished,
    Limit,
    StepOutput,
    Submit,
    Timings,
    Usage,
)
from tidegate.engine.process import ProcessClient
from tidegate.engine.request import Request
from tidegate.engine.text import Text
from tidegate.service.admission import AdmissionLimits
from tidegate.service.life import spare_collector
from tidegate.service.listener import open_listener
from tidegate.service.server import start_server
from tidegate.v1 import inference_pb2, inference_pb2_grpc, session_pb2

STAMPS = 1024
"""Steps whose time of sending is known at any moment: more than can be under way."""
MAX_MODEL_LEN = 10_000_000
STOPS = ("\n\nUser:", "<|stop|>", "###")
CREDIT = 4096
ACK_TOKENS = 1280
"""An eighth of what a session may owe."""


class TimedCore:
    """Gives each request that has credit one token a step."""

    def __init__(self, config: EngineConfig, progress: bool) -> None:
        self.info = EngineInfo(
            model="timed",
            architecture="none",
            vocab_size=STAMPS,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=[],
            block_size=16,
            device_blocks=10**6,
            host_blocks=10**6,
            kv_bytes_per_token=1,
            device="cpu",
            dtype="float32",
            load_seconds={},
        )
        self._interval = float(os.environ["STEP_SECONDS"])
        self._stamps = _stamps()
        self._step = 0
        self._due = time.monotonic()
        self._running: dict[str, Request] = {}
        self._offsets: dict[str, int] = {}
        self._commands: list[Command] = []

    def handle(self, command: Command) -> None:
        self._commands.append(command)

    def has_work(self) -> bool:
        return bool(self._running) or bool(self._commands)

    def next_deadline(self) -> float | None:
        return None

    def close(self) -> None:
        pass

    def step(self) -> StepOutput:
        output = StepOutput([], [], [], [], [])
        for command in self._commands:
            self._obey(command, output)
        self._commands.clear()
        self._due = max(self._due + self._interval, time.monotonic())
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._step = (self._step + 1) % STAMPS
        token = [self._step]
        offsets = self._offsets
        for request_id, request in self._running.items():
            offset = offsets[request_id]
            if request.emit_upto is None or offset < request.emit_upto:
                output.deltas.append(Delta(request_id, 0, offset, token))
                offsets[request_id] = offset + 1
        self._stamps[self._step] = time.monotonic_ns()
        return output

    def _obey(self, command: Command, output: StepOutput) -> None:
        match command:
            case Submit(request=request):
                self._running[request.id] = request
                self._offsets[request.id] = 0
                output.admitted.append(Admitted(request.id, 0, 0))
            case Limit(request_id=request_id, emit_upto=upto) if request_id in self._running:
                self._running[request_id].emit_upto = upto
            case Finish(request_id=request_id, reason=reason) if request_id in self._running:
                del self._running[request_id]
                usage, timings = Usage(0, 0, 0, 0, 0), Timings(0.0, None, 0.0)
                output.finished.append(Finished(request_id, 0, reason, usage, timings))
            case _:
                pass


def _stamps() -> memoryview:
    """Nanoseconds at which each step was sent, in a file that engine and client share."""
    with open(os.environ["STAMPS_FILE"], "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), STAMPS * 8)).cast("q")


async def front(address: str) -> None:
    text = Text.load("demo")
    engine = await ProcessClient.start(EngineConfig(model="demo"), factory="delivery:TimedCore")
    listener = await open_listener([address])
    server = await start_server(listener, engine, text, admission=AdmissionLimits(max_waiting=20_000))
    spare_collector()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop()
    await engine.close()
    text.close()


class Meter:
    """What the client sees."""

    def __init__(self) -> None:
        self.tokens = 0
        self.messages = 0
        self.latencies: array[int] = array("q")
        self.weights: array[int] = array("q")
        self._stamps = _stamps()

    def take(self, deltas: Any) -> int:
        """How many tokens these were."""
        now = time.monotonic_ns()
        number = sum(len(delta.token_ids) for delta in deltas)
        self.tokens += number
        self.messages += 1
        self.latencies.append(now - self._stamps[deltas[0].token_ids[0]])
        self.weights.append(number)
        return number

    def percentile(self, part: float) -> float:
        """Milliseconds, of tokens."""
        pairs = sorted(zip(self.latencies, self.weights, strict=True))
        left = part * sum(self.weights)
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


async def measure(options: argparse.Namespace, address: str, pid: int) -> dict[str, Any]:
    meter = Meter()
    process = psutil.Process(pid)
    if options.rpcs:
        loads = [asyncio.create_task(rpcs(address, options.requests, meter))]
    else:
        each = options.requests // options.sessions
        loads = [
            asyncio.create_task(session(address, number, each, meter)) for number in range(options.sessions)
        ]
    await asyncio.sleep(options.warm_up)
    for load in loads:
        if load.done():
            load.result()
    meter.tokens = meter.messages = 0
    del meter.latencies[:], meter.weights[:]
    before, began = process.cpu_times(), time.monotonic()
    await asyncio.sleep(options.seconds)
    after, seconds = process.cpu_times(), time.monotonic() - began
    cpu = after.user + after.system - before.user - before.system
    result = {
        "way": "one RPC a request" if options.rpcs else f"{options.sessions} sessions",
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(meter.tokens / seconds),
        "messages_per_second": round(meter.messages / seconds),
        "front_cpu_percent": round(100 * cpu / seconds, 1),
        "front_us_per_token": round(1e6 * cpu / max(1, meter.tokens), 2),
        "p50_ms": round(meter.percentile(0.5), 2),
        "p99_ms": round(meter.percentile(0.99), 2),
    }
    for load in loads:
        load.cancel()
    await asyncio.gather(*loads, return_exceptions=True)
    return result


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, int]]:
    """A front in a process of its own: its address, and its pid. ``STEP_SECONDS`` is set by the caller."""
    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder, "stamps")
        stamps.write_bytes(bytes(STAMPS * 8))
        os.environ["STAMPS_FILE"] = str(stamps)
        here = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        address = f"unix:{folder}/socket"
        server = subprocess.Popen(
            [sys.executable, "-P", __file__, "--front", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            if server.stdout.readline() != "ready\n":
                raise RuntimeError("the front did not start")
            yield address, server.pid
        finally:
            server.communicate("stop\n", timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--front", metavar="ADDRESS", help="be the front")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--rpcs", action="store_true")
    parser.add_argument("--tokens-per-second", type=float, default=100_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm-up", type=float, default=3)
    options = parser.parse_args()
    if options.front:
        uvloop.run(front(options.front))
    else:
        os.environ["STEP_SECONDS"] = str(options.requests / options.tokens_per_second)
        with serving() as (address, pid):
            print(json.dumps(uvloop.run(measure(options, address, pid)), indent=1))


if __name__ == "__main__":
    main()
