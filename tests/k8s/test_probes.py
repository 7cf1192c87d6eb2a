"""The manifests' own containers, run here: probed and stopped as a kubelet does it."""

import asyncio
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from manifests import Manifest, config, pods
from served import Served
from wire import Seen, generate

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ANSWER = {"prompt": {"text": "Once upon a time"}, "sampling": {"max_tokens": 1500, "ignore_eos": True}}

LONG_GRACE = "3600"
"""A machine that runs tests may be slower than the manifests expect of one that serves."""


@contextmanager
def started(container: Manifest, changes: Mapping[str, str], folder: Path) -> Iterator[Served]:
    """The container's command with other ports and folders, and its environment from the ConfigMap."""
    args = [re.sub(r"\$\((\w+)\)", lambda name: changes[name[1]], arg) for arg in container["args"]]
    for index, arg in enumerate(args):
        name, equals, _ = arg.partition("=")
        if name in changes:
            args[index] = f"{name}{equals}{changes[name]}"
    log_file = folder / "log"
    with log_file.open("wb") as log:
        command = [sys.executable, "-P", "-m", "tidegate.service.cli", *args]
        process = subprocess.Popen(command, stderr=log)
    server = Served(process, "", log_file)
    try:
        server.wait_for_log("ready")
        yield server
    finally:
        process.kill()
        process.wait()


async def probe(server: Served, probe: Manifest) -> int:
    """What a kubelet gets for a gRPC probe: in plaintext, without credentials."""
    (address,) = server.wait_for_log("ready")["health"]
    port = address.rpartition(":")[2]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
        response = await health_pb2_grpc.HealthStub(channel).Check(
            request, timeout=30 * probe.get("timeoutSeconds", 1)
        )
    status: int = response.status
    return status


async def drains_without_a_cut(server: Served, container: Manifest, channel: grpc.aio.Channel) -> None:
    """SIGTERM under a running stream: not ready, alive, the stream whole, the exit clean."""
    assert await probe(server, container["startupProbe"]) == SERVING
    assert await probe(server, container["readinessProbe"]) == SERVING
    assert await probe(server, container["livenessProbe"]) == SERVING
    running = Seen("running", "", ANSWER)
    stream = asyncio.create_task(generate(channel, running))
    await running.has_tokens(1)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for_log("draining")
    assert await probe(server, container["readinessProbe"]) == NOT_SERVING
    assert await probe(server, container["livenessProbe"]) == SERVING
    await stream
    assert running.ends == ["MAX_TOKENS"]
    assert len(running.tokens) == ANSWER["sampling"]["max_tokens"]
    assert await asyncio.to_thread(server.process.wait, 60) == 0


async def test_a_deployments_container_is_probed_and_drained(tmp_path: Path) -> None:
    ((_, container),) = pods("overlays/cpu")
    authority = Authority(tmp_path)
    own, client = authority.issue("server", dns=["tidegate"]), authority.issue("backend")
    own.key.chmod(0o440)  # as a Secret's files are
    changes: dict[str, Any] = {
        "--listen": "127.0.0.1:0",
        "--health-port": "127.0.0.1:0",
        "--metrics-port": "127.0.0.1:0",
        "--drain-grace": LONG_GRACE,
        "--tls-cert": str(own.cert),
        "--tls-key": str(own.key),
        "--tls-client-ca": str(authority.cert),
        **variables(container, config("overlays/cpu")),
    }
    with started(container, changes, tmp_path) as server:
        (address,) = server.wait_for_log("ready")["addresses"]
        credentials = grpc.ssl_channel_credentials(
            authority.cert.read_bytes(), client.key.read_bytes(), client.cert.read_bytes()
        )
        options = [("grpc.ssl_target_name_override", "tidegate")]
        async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
            await drains_without_a_cut(server, container, channel)


async def test_a_sidecar_serves_a_socket_of_the_pods_group_and_drains(tmp_path: Path) -> None:
    ((_, container),) = pods("overlays/sidecar")
    socket = tmp_path / "socket"
    changes = {
        "--listen": f"unix:{socket}",
        "--health-port": "127.0.0.1:0",
        "--metrics-port": "127.0.0.1:0",
        "--drain-grace": LONG_GRACE,
    }
    with started(container, changes, tmp_path) as server:
        assert stat.S_IMODE(socket.stat().st_mode) == 0o770
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            await drains_without_a_cut(server, container, channel)
    assert not socket.exists()


def variables(container: Manifest, data: Mapping[str, str]) -> dict[str, str]:
    return {
        variable["name"]: data[variable["valueFrom"]["configMapKeyRef"]["key"]]
        for variable in container["env"]
    }
