"""``tidegate serve --openai-port``: an OpenAI script works with nothing but its base URL changed."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from compat_clients import environment, free_port, try_feature
from served import served

pytestmark = pytest.mark.heavy_client


@pytest.fixture
def gateway_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``pip install 'tidegate[openai]'`` would have it."""
    monkeypatch.setenv("PATH", f"{environment('smg') / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("gateway_on_path")
def test_one_command_gives_an_openai_endpoint_that_comes_back_and_ends_with_us(tmp_path: Path) -> None:
    port = free_port()
    with served(tmp_path, "demo", "--openai-port", str(port)) as server:
        server.wait_for_log("openai endpoint ready")
        try_feature("smg", "chat", f"http://127.0.0.1:{port}")
        (gateway,) = gateways(server.process.pid)
        gateway.kill()
        server.wait_for_log("the gateway ended and is started again")
        try_feature("smg", "chat_stream_with_patience", f"http://127.0.0.1:{port}")
        (gateway,) = gateways(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert not gateway.is_running() or gateway.status() == psutil.STATUS_ZOMBIE


def gateways(pid: int) -> list[psutil.Process]:
    """Our children that are no Python of ours: the engine is one."""
    children = psutil.Process(pid).children()
    return [child for child in children if "tidegate.engine.process" not in " ".join(child.cmdline())]
