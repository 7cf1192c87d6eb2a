"""Other people's clients, each in an environment of its own, run as scripts against a real server."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc.aio
import pytest
from served import Served, is_empty, load_when

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "compat" / "clients"
SCRIPTS = {"kserve": "kserve.py", "smg": "openai_tools.py", "dynamo": "openai_tools.py"}
"""What drives each client."""
LONG_ANSWER = 1900
"""Tokens of the answers that the scripts leave in the middle of."""
READY_SECONDS = 60.0
SECONDS = 100


def environment(client: str) -> Path:
    """The folder of the virtual environment that has this client."""
    folder = ROOT / ".cache" / "compat" / client
    if not (folder / ".installed").exists():
        pytest.fail(f"the client {client} is not installed: make .cache/compat/{client}/.installed")
    return folder


def try_feature(client: str, feature: str, address: str) -> None:
    """One feature, as the client's own Python sees it; what its script says is the failure's text."""
    run_script(client, SCRIPTS[client], feature, address)


def openai_script(url: str) -> str:
    """What an ordinary script for OpenAI's API prints, whose environment alone says where that is."""
    return run_script("smg", "openai_script.py", OPENAI_BASE_URL=f"{url}/v1", OPENAI_API_KEY="none").strip()


def run_script(client: str, script: str, *arguments: str, **variables: str) -> str:
    """What one of ``tests/compat/clients`` prints, run by the client's own Python."""
    done = subprocess.run(
        [environment(client) / "bin" / "python", "-P", CLIENTS / script, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def port_of(server: Served) -> str:
    """``HOST:PORT`` of its one TCP address."""
    addresses: list[str] = server.wait_for_log("ready")["addresses"]
    return next(address for address in addresses if not address.startswith("unix:"))


async def nothing_left(server: Served) -> int:
    """Wait until no request runs and no block is held; how many tokens the server has made so far."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        _, totals = await load_when(channel, is_empty)
    tokens: int = totals.output_tokens
    return tokens


@contextlib.contextmanager
def running(
    folder: Path, *command: str | Path, variables: Mapping[str, str] | None = None
) -> Iterator[Callable[[], str]]:
    """A gateway's process, with what it starts itself, in a folder of its own; gives what it has logged.

    ``variables`` of the environment come on top of ours.
    """
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield log.read_text
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_model(url: str, *logs: Callable[[], str]) -> None:
    """Until the gateway at ``url`` has found our model."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        # It may not listen yet.
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/v1/models")
            if b'"demo"' in connection.getresponse().read():
                return
        time.sleep(0.2)
    raise AssertionError("\n".join(("the gateway did not find the model:", *(log() for log in logs))))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
