"""NVIDIA Dynamo in front of us: its frontend speaks HTTP, its sidecar ``openengine.v1``."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from compat_clients import (
    LONG_ANSWER,
    environment,
    free_port,
    nothing_left,
    port_of,
    running,
    try_feature,
    wait_for_model,
)
from served import Served, load_when, served

from tidegate.engine.demo import checkpoint_path

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
    "two_at_once",
    "logprobs",
    "errors",
    "client_drop",
    "anthropic_messages",
    "anthropic_stream",
)


@contextlib.contextmanager
def frontend_before(worker: str, folder: Path) -> Iterator[str]:
    """The URL of Dynamo's frontend, once it knows our model. ``worker``: our ``HOST:PORT``.

    Frontend and sidecar find each other through files.
    """
    port = free_port()
    python = environment("dynamo") / "bin" / "python"
    variables = {
        "HOME": str(folder),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "kv"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    # The model's name is the path that the sidecar is given, so both stand where a short one leads to it.
    (folder / "demo").symlink_to(checkpoint_path())
    with (
        running(
            folder,
            *(python, "-P", "-m", "dynamo.frontend"),
            *("--http-host", "127.0.0.1", "--http-port", str(port), "--enable-anthropic-api"),
            variables=variables,
        ) as log,
        running(
            folder,
            *(python, "-P", "-m", "dynamo.trtllm.sidecar"),
            *("--grpc-endpoint", worker, "--model-path", "demo"),
            variables=variables,
        ),
    ):
        url = f"http://127.0.0.1:{port}"
        wait_for_model(url, log)
        yield url


@pytest.fixture(scope="module")
def frontend(demo: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with frontend_before(port_of(demo), tmp_path_factory.mktemp("dynamo")) as url:
        yield url


@pytest.mark.parametrize("feature", FEATURES)
async def test_dynamo(feature: str, demo: Served, frontend: str) -> None:
    async with grpc.aio.insecure_channel(demo.address) as channel:
        before = await nothing_left(demo)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(try_feature, "dynamo", feature, frontend))
            if feature == "two_at_once":
                await load_when(channel, lambda load, totals: load.running == 2)
        tokens = await nothing_left(demo) - before
    if feature == "client_drop":
        assert 0 < tokens < LONG_ANSWER


@pytest.mark.feature("engine death")
async def test_an_answer_goes_on_where_the_engine_died(demo: Served, frontend: str) -> None:
    async with grpc.aio.insecure_channel(demo.address) as channel:
        before = await nothing_left(demo)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(try_feature, "dynamo", "twice", frontend))
            await load_when(channel, lambda load, totals: totals.output_tokens > before + 20)
            os.kill(demo.engine_pid, signal.SIGKILL)
        demo.wait_for_log("the engine serves again")
        await nothing_left(demo)


@pytest.mark.feature("worker restart")
def test_a_server_that_was_killed_and_started_again_serves_as_before(tmp_path: Path) -> None:
    worker = f"127.0.0.1:{free_port()}"
    folders = [tmp_path / name for name in ("dynamo", "first", "second")]
    for folder in folders:
        folder.mkdir()
    with contextlib.ExitStack() as stack:
        with served(folders[1], "demo", "--listen", worker):
            url = stack.enter_context(frontend_before(worker, folders[0]))
            try_feature("dynamo", "chat_stream", url)
        # Leaving `served` kills it.
        try_feature("dynamo", "unavailable", url)
        stack.enter_context(served(folders[2], "demo", "--listen", worker))
        try_feature("dynamo", "chat_stream_with_patience", url)
