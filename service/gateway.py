"""An OpenAI endpoint in one command: the SMG gateway as our child, in front of a port of ours.

It speaks HTTP to the world, tokenizes, and speaks ``vllm.grpc.engine`` to us. Where it ends it is started
again; our own streams do not notice.
"""

import asyncio
import contextlib
import http.client
import os
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from tidegate.engine.config import ConfigError
from tidegate.engine.process import die_with_parent

READY_SECONDS = 60.0
POLL_SECONDS = 0.2
RESTART_SECONDS = 2.0
"""Between its end and its next start: long enough to read the log of one that cannot start."""
STOP_SECONDS = 5.0

_log = structlog.get_logger(__name__)


def find_program() -> str:
    """The gateway's program. Raises ``ConfigError`` that says how to install it."""
    beside_us = Path(sys.executable).with_name("smg")
    program = str(beside_us) if beside_us.is_file() else shutil.which("smg")
    if program is None:
        raise ConfigError("openai_port needs the SMG gateway: pip install 'tidegate[openai]'")
    return program


class Gateway:
    """The child, from ``start`` to ``stop``."""

    def __init__(self, program: str, worker: str, address: str) -> None:
        """``worker``: our own ``HOST:PORT``, without TLS. ``address``: where to listen, ``HOST:PORT``."""
        host, _, port = address.rpartition(":")
        self._address = address
        self._command = [
            *(sys.executable, "-P", "-m", "tidegate.service.gateway", str(os.getpid())),
            *(program, "launch", "--worker-urls", f"grpc://{worker}"),
            *("--host", host, "--port", port),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(_free_port())),
            *("--worker-startup-check-interval", "1", "--log-level", "warn"),
            # There is one worker, and it says itself what it cannot take: after ten refusals in a row the
            # gateway would send it nothing for a minute.
            "--disable-circuit-breaker",
        ]
        self._process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None

    async def start(self, model: str) -> None:
        """Start it and wait until it offers the model. Raises ``ConfigError`` where it does not."""
        self._running = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not await asyncio.to_thread(_offers, self._address, model):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise ConfigError(
                f"openai_port {self._address}: the gateway did not get ready; its log is above"
            ) from None

    async def stop(self) -> None:
        if self._running is None:
            return
        self._running.cancel()
        await asyncio.wait({self._running})
        if self._process is None or self._process.returncode is not None:
            return
        self._kill(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._kill(signal.SIGKILL)
            await self._process.wait()

    async def _run(self) -> None:
        while True:
            # What it prints goes to stderr, beside our own log.
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
            )
            status = await self._process.wait()
            _log.error("the gateway ended and is started again", status=status, address=self._address)
            await asyncio.sleep(RESTART_SECONDS)

    def _kill(self, number: signal.Signals) -> None:
        """The gateway and whatever it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def _offers(address: str, model: str) -> bool:
    """Whether the gateway's list of models has ours."""
    connection = http.client.HTTPConnection(address, timeout=POLL_SECONDS * 10)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/v1/models")
            return f'"{model}"'.encode() in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False  # it does not listen yet


def _free_port() -> int:
    """For the gateway's own metrics, which it insists on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(arguments: Sequence[str]) -> None:
    """``PARENT_PID PROGRAM ARGUMENTS``: become the program, as a child that ends with its parent."""
    parent, *command = arguments
    die_with_parent(int(parent))
    os.execv(command[0], command)  # noqa: S606  found by ``find_program``


if __name__ == "__main__":
    main(sys.argv[1:])
