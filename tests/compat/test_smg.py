"""An SMG gateway in front of us: with it, every tool that speaks OpenAI's or Anthropic's API."""

from collections.abc import Iterator

import pytest
from compat_clients import environment, free_port, nothing_left, port_of, running, try_feature, wait_for_model
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
    "choices",
    "two_at_once",
    "logprobs",
    "errors",
    "reasons",
    "client_drop",
    "anthropic_messages",
    "anthropic_stream",
)


@pytest.fixture(scope="module")
def gateway(demo: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL, once it knows our model."""
    port, metrics_port = free_port(), free_port()
    with running(
        tmp_path_factory.mktemp("gateway"),
        environment("smg") / "bin" / "smg",
        "launch",
        *("--worker-urls", f"grpc://{port_of(demo)}"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)),
        *("--worker-startup-check-interval", "1"),
    ) as log:
        url = f"http://127.0.0.1:{port}"
        wait_for_model(url, log)
        yield url


@pytest.mark.parametrize("feature", FEATURES)
async def test_smg(feature: str, demo: Served, gateway: str) -> None:
    try_feature("smg", feature, gateway)
    await nothing_left(demo)
