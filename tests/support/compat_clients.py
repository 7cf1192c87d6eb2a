"""Other people's clients, each in an environment of its own, run as scripts against a real server."""

import socket
import subprocess
from pathlib import Path

import grpc.aio
import pytest
from served import Served, is_empty, load_when

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "compat" / "clients"
SECONDS = 100


def environment(client: str) -> Path:
    """The folder of the virtual environment that has this client."""
    folder = ROOT / ".cache" / "compat" / client
    if not (folder / ".installed").exists():
        pytest.fail(f"the client {client} is not installed: make .cache/compat/{client}/.installed")
    return folder


def try_feature(client: str, feature: str, address: str) -> None:
    """One feature, as the client's own Python sees it; what its script says is the failure's text."""
    done = subprocess.run(
        [environment(client) / "bin" / "python", "-P", SCRIPTS / f"{client}.py", feature, address],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def port_of(server: Served) -> str:
    """``HOST:PORT`` of its one TCP address."""
    addresses: list[str] = server.wait_for_log("ready")["addresses"]
    return next(address for address in addresses if not address.startswith("unix:"))


async def nothing_left(server: Served) -> None:
    """Wait until no request runs and no block is held."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        await load_when(channel, is_empty)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
