"""``serve`` as a process of its own, with a real engine process behind it: its start and its ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from checkpoints import make_checkpoint
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.v1 import inference_pb2, inference_pb2_grpc

SERVE = """
import sys
from tidegate.engine.config import EngineConfig
from tidegate.service.config import ServerConfig
from tidegate.service.life import run
engine = EngineConfig(model=sys.argv[1], device_kv_tokens=4096, host_kv_tokens=0)
config = ServerConfig(
    engine=engine,
    addresses=(sys.argv[2],),
    log_format="json",
    drain_grace=100,
    max_restarts=int(sys.argv[3]),
)
sys.exit(run(config))
"""

Serve = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path / 'tidegate.sock'}"


@pytest.fixture
def serve(address: str) -> Iterator[Serve]:
    started: list[subprocess.Popen[str]] = []

    def start(model: str, max_restarts: int = 20) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-c", SERVE, model, address, str(max_restarts)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def log_until(process: "subprocess.Popen[str]", event: str) -> dict[str, Any]:
    """The first line of the log with this event."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{"):
            entry: dict[str, Any] = json.loads(line)
            if entry["event"] == event:
                return entry
    raise AssertionError(f"the log ended without {event!r}")


def generate(channel: grpc.Channel, max_tokens: int) -> Any:
    request = inference_pb2.GenerateRequest(
        prompt={"text": "the tide"}, sampling={"max_tokens": max_tokens, "ignore_eos": True}
    )
    return inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60)


def reason_of(error: Any) -> str:
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    reason: str = info.reason
    return reason


def engine_pid(process: "subprocess.Popen[str]") -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (pid,) = map(int, children)
    return pid


def test_sigterm_lets_a_stream_finish_and_exits_with_0(serve: Serve, checkpoint: Path, address: str) -> None:
    process = serve(str(checkpoint))
    loaded = log_until(process, "loaded")
    assert {"imports_s", "load_s", "pool_s", "total_s"} <= loaded.keys()
    log_until(process, "ready")
    with grpc.insecure_channel(address) as channel:
        stream = generate(channel, 300)
        events = [next(stream)]
        process.send_signal(signal.SIGTERM)
        log_until(process, "draining")
        events += stream
    assert sum(len(d.token_ids) for e in events for d in e.batch.deltas) == 300
    assert events[-1].WhichOneof("event") == "finished"
    assert process.wait(60) == 0
    assert not os.path.exists(address.removeprefix("unix:"))


def test_without_restarts_the_engines_end_is_told_to_clients_and_ends_the_server(
    serve: Serve, checkpoint: Path, address: str
) -> None:
    process = serve(str(checkpoint), 0)
    log_until(process, "ready")
    with grpc.insecure_channel(address) as channel:
        stream = generate(channel, 400)
        next(stream)
        os.kill(engine_pid(process), signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert reason_of(caught.value) == "ENGINE_RESTARTING"
    assert log_until(process, "the engine has ended")["exit_code"] == -signal.SIGKILL
    assert process.wait(60) == 1


@pytest.mark.parametrize("model", ["/nowhere/at/all", "{tmp_path}"])
def test_a_model_that_cannot_be_loaded_is_one_line_and_status_1(
    serve: Serve, tmp_path: Path, model: str
) -> None:
    """No folder, and a folder without a checkpoint."""
    process = serve(model.format(tmp_path=tmp_path))
    _, log = process.communicate(timeout=60)
    (line,) = log.splitlines()
    assert json.loads(line)["event"] == "cannot start"
    assert model.format(tmp_path=tmp_path) in json.loads(line)["reason"]
    assert process.returncode == 1


def engine_that_starts(process: "subprocess.Popen[str]") -> int:
    deadline = time.monotonic() + 30
    while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return engine_pid(process)


def test_while_the_model_loads_the_port_is_open_and_says_so(
    serve: Serve, checkpoint: Path, address: str
) -> None:
    process = serve(str(checkpoint))
    engine = engine_that_starts(process)
    os.kill(engine, signal.SIGSTOP)
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        whole, liveness = (health_pb2.HealthCheckRequest(service=name) for name in ("", "liveness"))
        assert health.Check(whole, timeout=60).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert health.Check(liveness, timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            list(generate(channel, 3))
        assert reason_of(caught.value) == "MODEL_LOADING"
        os.kill(engine, signal.SIGCONT)
        log_until(process, "ready")
        assert health.Check(whole, timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        assert sum(len(d.token_ids) for e in generate(channel, 3) for d in e.batch.deltas) == 3


def test_a_signal_while_the_model_loads_ends_the_start(serve: Serve, checkpoint: Path) -> None:
    process = serve(str(checkpoint))
    engine_that_starts(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_file_of_tls_that_cannot_be_read_ends_the_start_at_once(checkpoint: Path, tmp_path: Path) -> None:
    """In one line, before the model loads, and without a port in plaintext instead."""
    command = ["serve", str(checkpoint), "--listen", "127.0.0.1:0", "--log-format", "json"]
    files = ["--tls-cert", str(tmp_path / "none.pem"), "--tls-key", str(tmp_path / "none.key")]
    run = subprocess.run(
        [sys.executable, "-P", "-m", "tidegate.service.cli", *command, *files],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    (line,) = run.stderr.splitlines()
    assert json.loads(line)["event"] == "cannot start"
    assert "none.pem: No such file" in json.loads(line)["reason"]
    assert run.returncode == 1
