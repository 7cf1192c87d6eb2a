"""A front for benches, in a process of its own, with an engine that makes tokens on a timer.

A request gets its first token in the engine's next step, and the others ``pace`` steps apart. A token's id is
the number of its step, so that a client, which looks up when the engine sent it, knows how long it took. The
text is the demo checkpoint's; everything else of the front is as it is served.
"""

import asyncio
import contextlib
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from tidegate.engine.config import EngineConfig
from tidegate.engine.flight import FlightRecorder
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
from tidegate.engine.request import FinishReason
from tidegate.engine.text import Text
from tidegate.service.life import spare_collector
from tidegate.service.listener import open_listener
from tidegate.service.server import start_server

STAMPS = 1024
"""Steps whose time of sending is known at any moment: more than can be under way."""
MAX_MODEL_LEN = 10_000_000
READY = "ready\n"


@dataclass(slots=True)
class _Running:
    offset: int
    due: int
    """The step of its next token."""
    upto: int
    """By credit, or by max_tokens where that is less."""
    max_tokens: int


class TimedCore:
    """Steps ``STEP_SECONDS`` apart; a request with credit gets a token in every ``PACE``-th one."""

    recorder: FlightRecorder

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
        self._pace = int(os.environ["PACE"])
        self._stamps = stamps()
        self._step = 0
        self._due = time.monotonic()
        self._running: dict[str, _Running] = {}
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
        output = StepOutput()
        for command in self._commands:
            self._obey(command, output)
        self._commands.clear()
        # A step that is late is not caught up with: the next one is due an interval behind it.
        self._due = max(self._due + self._interval, time.monotonic())
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._step = step = self._step + 1
        token, deltas, ended = [step % STAMPS], output.deltas, []
        for request_id, running in self._running.items():
            offset = running.offset
            if running.due <= step and offset < running.upto:
                deltas.append(Delta(request_id, 0, offset, token))
                running.offset, running.due = offset + 1, step + self._pace
                if running.offset == running.max_tokens:
                    ended.append(request_id)
        for request_id in ended:
            self._end(request_id, FinishReason.MAX_TOKENS, output)
        self._stamps[step % STAMPS] = time.monotonic_ns()
        return output

    def _obey(self, command: Command, output: StepOutput) -> None:
        match command:
            case Submit(request=request):
                most = request.params.max_tokens or MAX_MODEL_LEN
                upto = most if request.emit_upto is None else min(most, request.emit_upto)
                self._running[request.id] = _Running(0, 0, upto, most)
                output.admitted.append(Admitted(request.id, 0, 0))
            case Limit(request_id=request_id, emit_upto=upto) if request_id in self._running:
                running = self._running[request_id]
                running.upto = min(running.max_tokens, upto)
            case Finish(request_id=request_id, reason=reason) if request_id in self._running:
                self._end(request_id, reason, output)
            case _:
                pass

    def _end(self, request_id: str, reason: FinishReason, output: StepOutput) -> None:
        del self._running[request_id]
        usage, timings = Usage(0, 0, 0, 0, 0), Timings(0.0, None, 0.0)
        output.finished.append(Finished(request_id, 0, reason, usage, timings))


def stamps() -> memoryview:
    """Nanoseconds at which each step was sent, in a file that engine and client share."""
    with open(os.environ["STAMPS_FILE"], "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), STAMPS * 8)).cast("q")


@dataclass(frozen=True, slots=True)
class TimedFront:
    """One that serves."""

    address: str
    process: psutil.Process
    engine: psutil.Process


@contextlib.contextmanager
def serving(step_seconds: float, pace: int = 1) -> Iterator[TimedFront]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "stamps")
        file.write_bytes(bytes(STAMPS * 8))
        os.environ["STAMPS_FILE"] = str(file)
        os.environ["STEP_SECONDS"], os.environ["PACE"] = str(step_seconds), str(pace)
        address = f"unix:{folder}/socket"
        here = str(Path(__file__).parent)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-P", __file__, address]
        with subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as front:
            try:
                if front.stdout is None or front.stdout.readline() != READY:
                    raise RuntimeError("the front did not start")
                process = psutil.Process(front.pid)
                (engine,) = process.children()
                yield TimedFront(address, process, engine)
            finally:
                front.communicate("stop\n", timeout=60)


async def _serve(address: str) -> None:
    text = Text.load("demo")
    engine = await ProcessClient.start(EngineConfig(model="demo"), factory="timed_front:TimedCore")
    listener = await open_listener([address])
    server = await start_server(listener, engine, text)
    spare_collector()
    sys.stdout.write(READY)
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop()
    await engine.close()
    text.close()
    # Not by the loop's end: where hundreds of RPCs were just cancelled, gRPC's poller waits for the loop to
    # read of them, and the end of the loop for the poller.
    os._exit(0)


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
