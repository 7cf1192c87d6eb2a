"""``tidegate serve --openai-port``: an OpenAI script works with nothing but its base URL changed."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from compat_clients import environment, free_port, openai_script, try_feature
from served import served


@pytest.fixture
def gateway_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``pip install 'tidegate[openai]'`` would have it."""
    monkeypatch.setenv("PATH", f"{environment('smg') / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.heavy_client
@pytest.mark.feature("one command", client="smg")
@pytest.mark.feature("base url only", client="smg")
@pytest.mark.usefixtures("gateway_on_path")
def test_one_command_gives_an_openai_endpoint_that_comes_back_and_ends_with_us(tmp_path: Path) -> None:
    port = free_port()
    with served(tmp_path, "demo", "--openai-port", str(port)) as server:
        server.wait_for_log("openai endpoint ready")
        url = f"http://127.0.0.1:{port}"
        try_feature("smg", "chat", url)
        assert openai_script(url)
        (gateway,) = gateways(server.process.pid)
        gateway.kill()
        server.wait_for_log("the gateway ended and is started again")
        try_feature("smg", "chat_stream_with_patience", url)
        (gateway,) = gateways(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert not gateway.is_running() or gateway.status() == psutil.STATUS_ZOMBIE


def test_a_gateway_that_does_not_get_ready_does_not_keep_the_server_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for the gateway's program: it never listens."""
    program = tmp_path / "smg"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with served(tmp_path, "demo", "--openai-port", str(free_port())) as server:
        assert server.wait_for_log("ready")["addresses"] == [server.address]  # and not the gateway's own
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0  # it would wait for the gateway for a minute


def gateways(pid: int) -> list[psutil.Process]:
    """Our children that are no Python of ours: the engine is one."""
    children = psutil.Process(pid).children()
    return [child for child in children if "tidegate.engine.process" not in " ".join(child.cmdline())]
