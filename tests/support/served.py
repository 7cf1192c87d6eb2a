"""A real ``tidegate serve`` as a child process, and what a test asks of it from outside."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from tidegate.engine.failpoints import VARIABLE
from tidegate.v1 import control_pb2, control_pb2_grpc, events_pb2

START_SECONDS = 60.0
LOAD_INTERVAL = 0.02

Totals = control_pb2.Totals
Load = events_pb2.Load


@dataclass
class Served:
    """A server that is ready, unless it ended since."""

    process: "subprocess.Popen[bytes]"
    address: str
    log_file: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """What the server and its engine have logged so far; libraries' own lines are left out, and so is
        one that is still being written.
        """
        whole, _, _ = self.log_file.read_text().rpartition("\n")
        lines = whole.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def faults(self) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry["level"] in ("error", "critical")]

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = map(int, children.read_text().split())
        return pid

    def wait_for_log(self, event: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        """The first entry of this event."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            for entry in self.log:
                if entry["event"] == event:
                    return entry
            assert not ended, f"the server ended before {event!r}:\n{self.log_file.read_text()}"
            time.sleep(0.01)
        raise AssertionError(f"no {event!r} within {seconds} s:\n{self.log_file.read_text()}")


@contextlib.contextmanager
def served(folder: Path, *arguments: str, failpoints: str = "") -> Iterator[Served]:
    """``tidegate serve ARGUMENTS`` on a Unix socket in ``folder``, ready; killed at the end."""
    address = f"unix:{folder}/socket"
    log_file = folder / "log"
    # To a file: a pipe that nobody reads would stop the server in the middle of its work.
    with log_file.open("wb") as log:
        command = [sys.executable, "-P", "-m", "tidegate.service.cli", "serve", *arguments]
        process = subprocess.Popen(
            [*command, "--listen", address, "--log-format", "json"],
            stderr=log,
            env={**os.environ, VARIABLE: failpoints},
        )
    server = Served(process, address, log_file)
    try:
        server.wait_for_log("ready")
        yield server
    finally:
        process.kill()
        process.wait()


async def load_when(
    channel: grpc.aio.Channel, holds: Callable[[Load, Totals], bool], seconds: float = 120.0
) -> tuple[Load, Totals]:
    """What ``WatchLoad`` says as soon as ``holds`` is true of it.

    Requests of a session that was lost are kept for half a minute.
    """
    control = control_pb2_grpc.ControlServiceStub(channel)
    request = control_pb2.WatchLoadRequest()
    request.min_interval.FromMilliseconds(round(LOAD_INTERVAL * 1000))
    last = control_pb2.WatchLoadResponse()
    call = control.WatchLoad(request)
    try:
        async with asyncio.timeout(seconds):
            async for last in call:
                if holds(last.load, last.totals):
                    return last.load, last.totals
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s; the last load:\n{last.load}") from None
    finally:
        call.cancel()
    raise AssertionError("the server ended WatchLoad")


def is_empty(load: Load, totals: Totals) -> bool:
    """Whether nothing is under way and no block of either tier is held: all are free, or mere cache."""
    requests = load.waiting + load.running + load.stalled + load.swapped
    held = [tier.total - tier.free - tier.reclaimable for tier in (load.device, load.host)]
    return requests == 0 and held == [0, 0]
