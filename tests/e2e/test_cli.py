"""The command line as its users run it: real processes, the demo checkpoint, no special doors."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted_server import start_scripted_server
from served import served

from tidegate import Client
from tidegate.engine.config import EngineConfig
from tidegate.service import cli
from tidegate.service.config import ServerConfig
from tidegate.service.security import SecurityConfig

TIDEGATE = Path(sys.executable).with_name("tidegate")
REFERENCE = Path(__file__).parents[2] / "service" / "README.md"

SERVE_FLAGS = [
    "--admin-listen",
    "--auth-tokens",
    "--block-size",
    "--device",
    "--device-kv-tokens",
    "--device-memory-fraction",
    "--drain-grace",
    "--dtype",
    "--hang-timeout",
    "--health-port",
    "--host-kv-tokens",
    "--insecure",
    "--jwt-audience",
    "--jwt-issuer",
    "--jwt-keys",
    "--listen",
    "--log-format",
    "--max-model-len",
    "--max-num-seqs",
    "--max-restarts",
    "--max-step-tokens",
    "--max-waiting",
    "--max-waiting-tokens",
    "--metrics-port",
    "--no-prefix-caching",
    "--openai-port",
    "--otlp-endpoint",
    "--park-grace",
    "--pipeline-depth",
    "--preemption",
    "--protocols",
    "--reflection",
    "--tenant-requests",
    "--tenant-tokens",
    "--tls-cert",
    "--tls-client-ca",
    "--tls-key",
]
"""A new flag costs every user a decision. Think twice, then add its line here and in service/README.md."""

USER_FACT = ["My favourite colour is green.", "What is my favourite colour?"]


def tidegate(*arguments: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [TIDEGATE, *arguments], input=stdin, capture_output=True, text=True, timeout=110, check=False
    )


async def subprocess_of(*arguments: str) -> asyncio.subprocess.Process:
    """With pipes to talk through."""
    return await asyncio.create_subprocess_exec(
        TIDEGATE,
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def flags_of(*command: str) -> list[str]:
    """The flags that a command's help lists."""
    shown = tidegate(*command, "--help").stdout
    return sorted(set(re.findall(r"^  (--[a-z-]+)", shown, flags=re.MULTILINE)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``tidegate serve demo``; it must end well when it is told to."""
    with served(tmp_path_factory.mktemp("server"), "demo", "--device-kv-tokens", "4096") as running:
        yield running.address
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, running.log_file.read_text()
        assert not Path(running.address.removeprefix("unix:")).exists()


# --- serve ------------------------------------------------------------------------------------------------


def test_the_flags_of_serve_are_these() -> None:
    assert [flag for flag in flags_of("serve") if flag != "--help"] == SERVE_FLAGS


def test_without_flags_the_configurations_own_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerConfig] = []
    monkeypatch.setattr(cli.life, "run", lambda config: served.append(config) or 0)
    assert cli.main(["serve", "demo"]) == 0
    assert served == [ServerConfig(engine=EngineConfig(model="demo"))]


def test_every_flag_of_serve_reaches_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerConfig] = []
    monkeypatch.setattr(cli.life, "run", lambda config: served.append(config) or 0)
    given = (
        "--listen unix:/tmp/a --listen 0.0.0.0:1 --insecure --reflection --drain-grace 3 --log-format json "
        "--device cpu --dtype float32 --max-model-len 100 --block-size 16 --device-kv-tokens 200 "
        "--host-kv-tokens 0 --preemption swap --no-prefix-caching --max-num-seqs 3 --max-step-tokens 64 "
        "--max-waiting 5 --park-grace 0.25 --pipeline-depth 1 --max-restarts 7 --hang-timeout 9 "
        "--tls-cert c --tls-key k --tls-client-ca a --device-memory-fraction 0.5 "
        "--auth-tokens t --jwt-keys j --jwt-issuer i --jwt-audience u --health-port 9 --metrics-port 8 "
        "--admin-listen unix:/tmp/d --otlp-endpoint http://c:1 "
        "--protocols vllm --max-waiting-tokens 7 --tenant-requests 8 --tenant-tokens 6"
    ).split()
    # The one that cannot be had beside TLS stands below.
    assert {word for word in given if word.startswith("--")} == {*SERVE_FLAGS} - {"--openai-port"}
    assert cli.main(["serve", "m", *given]) == 0
    engine = EngineConfig(
        model="m",
        device="cpu",
        dtype="float32",
        max_model_len=100,
        block_size=16,
        device_kv_tokens=200,
        device_memory_fraction=0.5,
        host_kv_tokens=0,
        preemption="swap",
        prefix_caching=False,
        max_num_seqs=3,
        max_step_tokens=64,
        max_waiting=5,
        park_grace=0.25,
        pipeline_depth=1,
    )
    assert served == [
        ServerConfig(
            engine=engine,
            security=SecurityConfig(
                tls_cert=Path("c"),
                tls_key=Path("k"),
                tls_client_ca=Path("a"),
                auth_tokens=Path("t"),
                jwt_keys=Path("j"),
                jwt_issuer="i",
                jwt_audience="u",
            ),
            addresses=("unix:/tmp/a", "0.0.0.0:1"),
            insecure=True,
            health_port="9",
            admin_addresses=("unix:/tmp/d",),
            metrics_port="8",
            otlp_endpoint="http://c:1",
            max_waiting_tokens=7,
            tenant_requests=8,
            tenant_tokens=6,
            reflection=True,
            protocols=("vllm",),
            max_restarts=7,
            hang_timeout=9.0,
            drain_grace=3.0,
            log_format="json",
        )
    ]


def test_an_openai_port_is_of_loopback_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerConfig] = []
    monkeypatch.setattr(cli.life, "run", lambda config: served.append(config) or 0)
    assert cli.main(["serve", "demo", "--openai-port", "8000"]) == 0
    assert cli.main(["serve", "demo", "--openai-port", "0.0.0.0:80", "--insecure"]) == 0
    assert [config.openai_address for config in served] == ["127.0.0.1:8000", "0.0.0.0:80"]


def test_without_the_gateway_an_openai_port_says_what_to_install() -> None:
    run = tidegate("serve", "demo", "--openai-port", "8000", "--log-format", "json")
    assert run.returncode == 1
    assert json.loads(run.stderr.splitlines()[-1])["reason"] == (
        "openai_port needs the SMG gateway: pip install 'tidegate[openai]'"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "demo", "--max-num-seqs", "0"], "--max-num-seqs must be between 1 and 4096"),
        (["serve", "demo", "--listen", "0.0.0.0:1"], "--insecure"),
        (["serve", "demo", "--tls-cert", "c.pem"], "--tls-cert needs tls_key"),
        (["serve", "demo", "--health-port", "here"], "HOST:PORT"),
        (["serve", "demo", "--protocols", "thrift"], "--protocols must be of kserve, openengine, vllm"),
        (["serve", "demo", "--openai-port", "1", "--auth-tokens", "t"], "--openai-port cannot be had beside"),
        (["serve", "demo", "--openai-port", "0.0.0.0:1"], "--insecure"),
        (["serve", "demo", "--openai-port", "1", "--protocols", "kserve"], "--openai-port needs vllm"),
        (["serve", "demo", "--otlp-endpoint", "c:1"], "--otlp-endpoint must be http://HOST:PORT"),
        (["serve", "demo", "--tenant-tokens", "0"], "--tenant-tokens must be at least 1"),
        (["generate", "x", "--model", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["generate", "x", "--server", "unix:/no/socket"], "start one with: tidegate serve demo"),
    ],
)
def test_what_cannot_work_is_one_line_and_a_status(arguments: list[str], said: str) -> None:
    run = tidegate(*arguments)
    assert run.returncode == 1
    assert run.stdout == ""
    assert said in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert run.stderr.startswith(f"tidegate {arguments[0]}")


def test_starting_the_command_line_loads_no_torch() -> None:
    """Neither help nor the serving front may wait for it."""
    script = (
        "import sys, tidegate.service.cli;"
        "print({'torch', 'transformers', 'numpy', 'triton'} & {name.split('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_without_the_server_installed_the_command_says_so() -> None:
    script = "import sys; sys.modules['msgspec'] = None; import tidegate.service.cli"
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert len(run.stderr.splitlines()) == 1
    assert "pip install 'tidegate[server]'" in run.stderr


# --- generate and chat ------------------------------------------------------------------------------------


def test_generate_is_the_same_from_a_server_and_alone(server: str) -> None:
    arguments = ["generate", "Once upon a time", "--max-tokens", "24", "--temperature", "0"]
    served = tidegate(*arguments, "--server", server)
    alone = tidegate(*arguments, "--model", "demo")
    assert served.returncode == alone.returncode == 0, served.stderr + alone.stderr
    assert served.stdout == alone.stdout
    with Client(server) as client:
        text = client.generate_unary("Once upon a time", max_tokens=24, temperature=0).text
    assert served.stdout == text + "\n"


def test_generate_reads_stdin_and_ends_before_a_stop_text(server: str) -> None:
    run = tidegate(
        "generate", "-", "--temperature=0", "--stop=.", "--server", server, stdin="Once upon a time"
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) > 3
    assert "." not in run.stdout


def test_the_same_seed_gives_the_same_text(server: str) -> None:
    def run(seed: int) -> str:
        sampling = ["--seed", str(seed), "--temperature", "1.5", "--top-p", "0.95", "--max-tokens", "32"]
        return tidegate("generate", "There is", *sampling, "--server", server).stdout

    assert run(1) == run(1) != run(2)


def test_an_invalid_request_names_its_field(server: str) -> None:
    run = tidegate("generate", "x", "--top-p", "7", "--server", server)
    assert run.returncode == 1
    assert run.stderr.startswith("tidegate generate: error: sampling.top_p: ")


def test_a_reader_that_leaves_is_no_error(server: str) -> None:
    process = subprocess.Popen(
        [TIDEGATE, "generate", "There is", "--max-tokens=500", "--server", server],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), errors) == (0, b"")


def test_chat_remembers_what_was_said(server: str) -> None:
    run = tidegate("chat", "--temperature", "0", "--server", server, stdin="\n".join([*USER_FACT, ""]))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "Your favourite colour is green."
    assert run.stderr == ""


def test_a_command_that_is_told_to_stop_stops_its_own_server() -> None:
    process = subprocess.Popen([TIDEGATE, "chat", "--model", "demo"], stdin=subprocess.PIPE)
    children: list[psutil.Process] = []
    while len(children) < 2:  # the server, and its engine
        assert process.poll() is None
        time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert process.stdin is not None
    process.stdin.close()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


async def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path: Path) -> None:
    scripted, grpc_server = await start_scripted_server(f"unix:{tmp_path}/socket")
    scripted.token_delay = 0.3
    process = await subprocess_of("chat", "--max-tokens", "200", "--server", f"unix:{tmp_path}/socket")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    assert await process.stdout.readexactly(3) == b"w0 "
    process.send_signal(signal.SIGINT)
    await scripted.cancelled.wait()
    process.stdin.write(b"again\n")
    process.stdin.write_eof()
    scripted.token_delay = 0
    rest, errors = await process.communicate()
    await grpc_server.stop(0)
    assert process.returncode == 0
    assert errors == b" [stopped]"
    first, second = rest.decode().splitlines()
    assert len(first.split()) < 150
    assert len(second.split()) == 200
    heard = [[m.role for m in request.prompt.chat.messages] for request in scripted.requests]
    assert heard == [["user"], ["user", "assistant", "user"]]


# --- bench ------------------------------------------------------------------------------------------------


def test_bench_offline_writes_its_figures(tmp_path: Path) -> None:
    """With KV for a fraction of the work, so that something is preempted."""
    work = ["--requests", "12", "--input-len", "32", "--output-len", "48"]
    tiers = ["--device-kv-tokens", "256", "--host-kv-tokens", "2048", "--preemption", "swap"]
    path = tmp_path / "new" / "figures.json"
    run = tidegate("bench", "offline", "--model", "demo", *work, *tiers, "--json", path)
    assert run.returncode == 0, run.stderr
    figures = json.loads(path.read_text())
    assert figures["output_tokens"] == 12 * 48
    assert figures["output_tokens_per_s"] == pytest.approx(12 * 48 / figures["wall_s"])
    assert figures["load_s"] > 0
    assert figures["preemptions"]["swap"] > 0
    assert figures["preemptions"]["recompute"] == 0
    assert figures["swapped_bytes"]["out"] > 0
    assert figures["swapped_bytes"]["in"] > 0
    assert figures["recomputed_tokens"] == 0
    assert figures["config"]["device_kv_tokens"] == 256
    assert "output_tokens_per_s" in run.stdout


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--rate", "50"]])
def test_bench_serve_writes_its_figures(server: str, tmp_path: Path, load: list[str]) -> None:
    work = ["--requests", "12", "--input-len", "16", "--output-len", "8"]
    path = tmp_path / "figures.json"
    run = tidegate("bench", "serve", "--server", server, *work, *load, "--json", path)
    assert run.returncode == 0, run.stderr
    figures: dict[str, Any] = json.loads(path.read_text())
    assert (figures["completed"], figures["errors"]) == (12, {})
    assert figures["output_tokens"] == 12 * 8
    for name in ("ttft_s", "itl_s", "tpot_s", "latency_s"):
        times = figures[name]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    assert figures["ttft_s"]["p50"] < figures["latency_s"]["p50"]
    assert "tpot" in run.stdout


def test_bench_serve_counts_what_failed(server: str) -> None:
    """Prompts longer than the context are refused, each on its own."""
    run = tidegate(
        "bench", "serve", "--server", server, "--requests=3", "--input-len=4090", "--output-len=64"
    )
    assert run.returncode == 1
    assert "INVALID_REQUEST 3" in run.stdout


# --- the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("serve",),
        ("generate",),
        ("chat",),
        ("batch",),
        ("demo",),
        ("top",),
        ("bench", "offline"),
        ("bench", "serve"),
    ],
)
def test_the_reference_lists_every_flag_with_its_default(command: tuple[str, ...]) -> None:
    section = REFERENCE.read_text().split(f"### `tidegate {' '.join(command)}")[1].split("\n#")[0]
    listed = dict(re.findall(r"^\| `(--[a-z-]+)(?:\\\||[^|])*\| ([^|]*?) ?\|", section, re.MULTILINE))
    assert sorted(listed) == [flag for flag in flags_of(*command) if flag != "--help"]
    shown = re.split(r"^  (?=-)", tidegate(*command, "--help").stdout, flags=re.MULTILINE)[1:]
    for option in (" ".join(lines.split()) for lines in shown):
        default = re.search(r"\(default: ([^)]*)\)", option)
        if default is not None:
            written = listed[option.split()[0]].replace("`", "").replace(",", "")
            assert written.removesuffix(".0") == default[1].replace(",", "").removesuffix(".0"), option
