"""A server of one command's own: a real ``tidegate serve`` on a Unix socket that nobody else knows."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc

from tidegate.v1 import control_pb2, control_pb2_grpc

POLL_SECONDS = 0.05
STOP_SECONDS = 15.0


class LaunchFailed(Exception):
    """The server ended before it was ready, or did not end well; the message is its own last word."""


@contextlib.contextmanager
def private_server(arguments: Sequence[str]) -> Iterator[str]:
    """Run ``tidegate serve ARGUMENTS`` until the context ends; gives its address once it serves.

    Raises ``LaunchFailed``.
    """
    with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
        address = f"unix:{folder}/socket"
        log = Path(folder, "log")
        with log.open("wb") as log_file:
            command = [sys.executable, "-P", "-m", "tidegate.service.cli", "serve", *arguments]
            server = subprocess.Popen(
                [*command, "--listen", address, "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log_file,
                # Ctrl-C at the terminal is for the command, which stops the server in its own time.
                process_group=0,
            )
        try:
            _wait_until_ready(server, address, log)
            yield address
        finally:
            _stop(server, log)


def _wait_until_ready(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    # Not with the blocking client: its event loop beside the command's own makes grpc.aio complain.
    with grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        while True:
            try:
                control.GetServerInfo(control_pb2.GetServerInfoRequest())
                return
            except grpc.RpcError:
                if server.poll() is not None:
                    raise LaunchFailed(_last_word(log, server.returncode)) from None
                time.sleep(POLL_SECONDS)


def _stop(server: "subprocess.Popen[bytes]", log: Path) -> None:
    server.terminate()
    try:
        status = server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise LaunchFailed(f"the server did not stop within {STOP_SECONDS:.0f} s and was killed") from None
    if status != 0:
        raise LaunchFailed(_last_word(log, status))


def _last_word(log: Path, status: int) -> str:
    """Why the server ended: the last reason in its log, or the last line of whatever else it wrote."""
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}, without a word"]
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "reason" in entry:
                return str(entry["reason"])
    return f"the server ended: {lines[-1]}"
