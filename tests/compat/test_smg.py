"""An SMG gateway in front of us: with it, every tool that speaks OpenAI's or Anthropic's API."""

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from compat_clients import environment, free_port, nothing_left, port_of, try_feature
from served import Served

pytestmark = pytest.mark.heavy_client

FEATURES = (
    "models",
    "chat",
    "chat_stream",
    "conversation",
    "completions",
    "responses",
    "sampling",
    "logprobs",
    "errors",
    "client_drop",
    "anthropic_messages",
    "anthropic_stream",
)
READY_SECONDS = 60.0


@pytest.fixture(scope="module")
def gateway(demo: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL, once it knows our model."""
    port, metrics_port = free_port(), free_port()
    log = tmp_path_factory.mktemp("gateway") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                environment("smg") / "bin" / "smg",
                "launch",
                *("--worker-urls", f"grpc://{port_of(demo)}"),
                *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)),
                *("--worker-startup-check-interval", "1"),
            ],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_model(url, process, log.read_text)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("feature", FEATURES)
async def test_smg(feature: str, demo: Served, gateway: str) -> None:
    try_feature("smg", feature, gateway)
    await nothing_left(demo)


def wait_for_model(url: str, process: "subprocess.Popen[bytes]", log: Callable[[], str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        # It may not listen yet.
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/v1/models")
            if b'"demo"' in connection.getresponse().read():
                return
        time.sleep(0.2)
    raise AssertionError(f"the gateway did not find the model:\n{log()}")
