"""Messages from no sane client, a real server, a real engine: each is answered, and none does harm.

``TIDEGATE_FUZZ`` says how many messages; CI sends a few thousand.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from checkpoints import make_checkpoint
from front import read_error, read_status
from fuzzing import SESSION, Fuzzer
from google.rpc import status_pb2
from served import Served, is_empty, load_when
from wire import connect

from tidegate.v1 import session_pb2

MESSAGES = int(os.environ.get("TIDEGATE_FUZZ", "4000"))
SEED = int(os.environ.get("TIDEGATE_FUZZ_SEED", "0"))
NUM_CLIENTS = 12
CALLS = 10
"""With one message each, between two sessions."""
SESSION_LENGTH = 150
ANSWER_SECONDS = 600.0
"""More, and something hangs."""
PATIENCE = 10.0
"""Of a session that was closed; a broken id may have started a request without credit, which goes on."""

FORBIDDEN = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
"""No message of a client may bring these about."""

Serve = Callable[..., Served]


class Client:
    """Sends what its fuzzer makes, and checks every answer. Runs in a thread of its own.

    With the blocking API: in the asyncio one, a write that meets the stream's end hides its status.
    """

    def __init__(self, address: str, seed: int, model: str) -> None:
        self._address = address
        self._fuzzer = Fuzzer(seed, model)
        self.seen: Counter[str] = Counter()
        self.num_sent = 0

    def run(self, number: int) -> None:
        with grpc.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            while self.num_sent < number:
                for _ in range(CALLS):
                    self._call(channel)
                self._session(channel)

    def _call(self, channel: grpc.Channel) -> None:
        method, data = self._fuzzer.unary()
        self.num_sent += 1
        call = channel.unary_stream(method)(data, timeout=ANSWER_SECONDS)
        with self._end_of(call, method.rpartition("/")[2]):
            for _ in call:
                pass

    def _session(self, channel: grpc.Channel) -> None:
        leaves_at = None
        if self._fuzzer.random.random() < 0.3:
            leaves_at = self._fuzzer.random.randrange(50)
        patience = threading.Timer(PATIENCE, lambda: call.cancel())
        call = channel.stream_stream(SESSION)(self._commands(patience), timeout=ANSWER_SECONDS)
        with self._end_of(call, "Session"):
            for number, data in enumerate(call):
                self._check(session_pb2.SessionResponse.FromString(data))
                if number == leaves_at:
                    call.cancel()
        patience.cancel()

    def _commands(self, patience: threading.Timer) -> Iterator[bytes]:
        """As fast as the server takes them."""
        fuzzer = self._fuzzer
        opening = fuzzer.opening()
        body = [fuzzer.command() for _ in range(fuzzer.random.randrange(2 * SESSION_LENGTH))]
        for data in [opening, *body, *fuzzer.closing()]:
            self.num_sent += 1
            yield data
        patience.start()

    @contextlib.contextmanager
    def _end_of(self, call: Any, name: str) -> Iterator[None]:
        """Check how the call ends, whatever the body finds on the way."""
        began = time.monotonic()
        try:
            yield
        except grpc.RpcError as error:
            if call.code() is grpc.StatusCode.CANCELLED:
                self.seen[f"{name} CANCELLED by the client"] += 1
            else:
                refusal = read_error(error)
                assert refusal.code not in FORBIDDEN, (name, refusal)
                self.seen[f"{name} {refusal.code.name} {refusal.reason}"] += 1
        else:
            self.seen[f"{name} OK"] += 1
        assert time.monotonic() - began < ANSWER_SECONDS - 5, f"{name} hangs"

    def _check(self, response: session_pb2.SessionResponse) -> None:
        kind = response.WhichOneof("event")
        status: status_pb2.Status | None = None
        if kind == "request_error":
            status = response.request_error.status
        elif kind == "command_rejected":
            status = response.command_rejected.status
        if status is not None:
            refusal = read_status(status)
            assert refusal.code not in FORBIDDEN, refusal
            self.seen[f"{kind} {refusal.code.name} {refusal.reason}"] += 1
        elif kind == "finished":
            self.seen[f"request {kind}"] += 1


@pytest.mark.timeout(1200 + MESSAGES // 500)
async def test_no_message_crashes_the_server_or_leaves_anything_behind(serve: Serve, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    limits = ("--max-model-len", "128", "--max-step-tokens", "128", "--max-restarts", "0")
    server = serve(str(checkpoint), *limits)
    front = psutil.Process(server.process.pid)
    engine_pid = server.engine_pid
    model = server.wait_for_log("ready")["model"]
    clients = [Client(server.address, SEED + index, model) for index in range(NUM_CLIENTS)]
    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        for done in [threads.submit(client.run, MESSAGES // NUM_CLIENTS) for client in clients]:
            await asyncio.wrap_future(done)
    seconds = time.perf_counter() - started
    async with connect(server.address) as channel:
        await load_when(channel, is_empty, 120)
    for outcome, number in sorted(sum((client.seen for client in clients), Counter()).items()):
        print(f"{number:8d} {outcome}")
    num_sent = sum(client.num_sent for client in clients)
    print(f"{num_sent} messages in {seconds:.0f} s; front's memory {front.memory_info().rss / 2**20:.0f} MB")
    assert num_sent >= MESSAGES // NUM_CLIENTS * NUM_CLIENTS
    assert server.engine_pid == engine_pid
    assert server.faults == []
