"""An SMG gateway in front of us: with it, every tool that speaks OpenAI's or Anthropic's API."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from compat_clients import (
    LONG_ANSWER,
    environment,
    free_port,
    nothing_left,
    openai_script,
    port_of,
    running,
    try_feature,
    wait_for_model,
)
from served import Served, served

pytestmark = pytest.mark.heavy_client

FEATURES = (
    "models",
    "chat",
    "chat_stream",
    "conversation",
    "completions",
    "responses",
    "sampling",
    "json_schema",
    "choices",
    "two_at_once",
    "logprobs",
    "errors",
    "reasons",
    "anthropic_messages",
    "anthropic_stream",
)
SOON = ("--health-check-interval-secs", "1", "--cb-timeout-duration-secs", "1")
"""Look for a server that was away again at once; by itself the gateway takes a minute or two."""


@contextlib.contextmanager
def gateway_before(worker: str, folder: Path, *options: str) -> Iterator[str]:
    """Its URL, once it knows our model. ``worker``: our ``HOST:PORT``."""
    port, metrics_port = free_port(), free_port()
    with running(
        folder,
        environment("smg") / "bin" / "smg",
        "launch",
        *("--worker-urls", f"grpc://{worker}"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)),
        *("--worker-startup-check-interval", "1"),
        *options,
    ) as log:
        url = f"http://127.0.0.1:{port}"
        wait_for_model(url, log)
        yield url


@pytest.fixture(scope="module")
def gateway(demo: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway_before(port_of(demo), tmp_path_factory.mktemp("gateway")) as url:
        yield url


@pytest.mark.parametrize("feature", FEATURES)
async def test_smg(feature: str, demo: Served, gateway: str) -> None:
    try_feature("smg", feature, gateway)
    await nothing_left(demo)


@pytest.mark.feature("base url only")
def test_an_ordinary_openai_script_gets_its_story(gateway: str) -> None:
    assert len(openai_script(gateway).split()) > 10


@pytest.mark.feature("client drop")
async def test_a_client_that_leaves_ends_its_request(demo: Served, gateway: str) -> None:
    before = await nothing_left(demo)
    try_feature("smg", "client_drop", gateway)
    assert 0 < await nothing_left(demo) - before < LONG_ANSWER


@pytest.mark.feature("worker restart")
def test_a_server_that_was_killed_and_started_again_serves_as_before(tmp_path: Path) -> None:
    worker = f"127.0.0.1:{free_port()}"
    folders = [tmp_path / name for name in ("gateway", "first", "second")]
    for folder in folders:
        folder.mkdir()
    with contextlib.ExitStack() as stack:
        with served(folders[1], "demo", "--listen", worker):
            url = stack.enter_context(gateway_before(worker, folders[0], *SOON))
            try_feature("smg", "chat_stream", url)
        # Leaving `served` kills it.
        try_feature("smg", "unavailable", url)
        stack.enter_context(served(folders[2], "demo", "--listen", worker))
        try_feature("smg", "chat_stream_with_patience", url)
