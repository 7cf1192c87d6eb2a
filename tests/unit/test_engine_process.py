"""The engine as a child process, and in a thread: the same client, over real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop
import zmq
from fake_core import FakeCore, hashed

from tidegate.engine.client import EngineClient, EngineGone, InProcessClient
from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.messages import Finish, Finished, Limit, Place, StepOutput, Submit
from tidegate.engine.process import ProcessClient
from tidegate.engine.request import FinishReason, Request, SamplingParams

FACTORY = "fake_core:build"
SUPPORT = Path(__file__).parents[1] / "support"
PATIENCE = 60.0
"""Seconds that nothing takes, however busy the machine is."""


@pytest.fixture(autouse=True)
def _child_finds_the_fake_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)


async def start_process() -> ProcessClient:
    return await ProcessClient.start(EngineConfig(model="fake"), factory=FACTORY)


@pytest.fixture
async def process() -> AsyncIterator[ProcessClient]:
    client = await start_process()
    yield client
    await client.close()


@pytest.fixture(params=["process", "thread"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    client: EngineClient
    if request.param == "process":
        client = await start_process()
    else:
        client = InProcessClient(FakeCore(EngineConfig(model="fake")))
    yield client
    await client.close()


def request(request_id: str, max_tokens: int = 5, **fields: object) -> Request:
    return Request(
        id=request_id,
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(max_tokens=max_tokens),
        seed=2**64 - 1,
        **fields,  # type: ignore[arg-type]
    )


def expected_tokens(count: int) -> list[int]:
    context = [1, 2, 3]
    for _ in range(count):
        context.append(hashed(context, 0))
    return context[3:]


class Record:
    """What an engine said, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, Finished] = {}
        self.outputs: list[StepOutput] = []

    def add(self, output: StepOutput) -> None:
        self.outputs.append(output)
        for delta in output.deltas:
            known = self.tokens.setdefault(delta.request_id, [])
            assert delta.offset == len(known)
            known += delta.token_ids
        for finished in output.finished:
            assert finished.request_id not in self.finished
            self.finished[finished.request_id] = finished


async def listen(
    client: EngineClient, until: Callable[[Record], bool] = lambda _: False, record: Record | None = None
) -> Record:
    record = record or Record()
    async with asyncio.timeout(PATIENCE):
        while not until(record):
            record.add(await client.receive())
    return record


def is_running(pid: int) -> bool:
    """False for a zombie, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    give_up = time.monotonic() + PATIENCE
    while is_running(pid):
        assert time.monotonic() < give_up, f"process {pid} is still there"
        time.sleep(0.005)


def child_pids() -> set[int]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in children.split()}


# The same in a process and in a thread


async def test_tokens_of_a_request_come_in_order_and_end_once(client: EngineClient) -> None:
    assert client.info.architecture == "FakeForCausalLM"
    client.send([Submit(request("r"))])
    record = await listen(client, lambda r: "r" in r.finished)
    assert record.tokens["r"] == expected_tokens(5)
    assert record.finished["r"].reason is FinishReason.MAX_TOKENS


async def test_a_thousand_requests_make_the_round_trip(client: EngineClient) -> None:
    for index in range(1000):
        client.send([Submit(request(f"r{index}"))])
    record = await listen(client, lambda r: len(r.finished) == 1000)
    assert all(tokens == expected_tokens(5) for tokens in record.tokens.values())


async def test_commands_sent_together_reach_one_step(client: EngineClient) -> None:
    client.send([Submit(request("a")), Submit(request("b"))])
    client.send([Submit(request("c"))])
    record = await listen(client, lambda r: len(r.finished) == 3)
    sizes = [len(output.admitted) for output in record.outputs if output.admitted]
    assert sizes == [3] or isinstance(client, InProcessClient)


async def test_an_idle_engine_wakes_for_credit_and_for_a_finish(client: EngineClient) -> None:
    client.send([Submit(request("r", max_tokens=100, emit_upto=2))])
    record = await listen(client, lambda r: len(r.tokens.get("r", [])) == 2)
    client.send([Limit("r", 4)])
    await listen(client, lambda r: len(r.tokens["r"]) == 4, record)
    assert record.tokens["r"] == expected_tokens(4)
    client.send([Finish("r", FinishReason.CANCELLED, at_offset=3)])
    await listen(client, lambda r: "r" in r.finished, record)
    assert record.finished["r"].usage.output_tokens == 3


async def test_an_idle_engine_wakes_for_a_deadline_of_its_own(client: EngineClient) -> None:
    deadline = time.monotonic() + 0.2
    client.send([Submit(request("r", emit_upto=1, deadline=deadline))])
    record = await listen(client, lambda r: "r" in r.finished)
    assert record.finished["r"].reason is FinishReason.DEADLINE
    assert time.monotonic() >= deadline


async def test_an_idle_engine_bears_a_deadline_of_years(client: EngineClient) -> None:
    """It lies further away than one poll can wait."""
    client.send([Submit(request("r", emit_upto=1, deadline=time.monotonic() + 1e9))])
    record = await listen(client, lambda r: "r" in r.tokens)
    await asyncio.sleep(0.1)
    client.send([Limit("r", 5)])
    await listen(client, lambda r: "r" in r.finished, record)
    assert record.finished["r"].reason is FinishReason.MAX_TOKENS


async def test_a_cancelled_receive_loses_nothing(client: EngineClient) -> None:
    client.send([Submit(request("r", max_tokens=50))])
    record = Record()
    while "r" not in record.finished:
        try:
            record.add(await asyncio.wait_for(client.receive(), 0.0005))
        except TimeoutError:
            continue
    assert record.tokens["r"] == expected_tokens(50)


async def test_a_closed_client_refuses_and_closes_again(client: EngineClient) -> None:
    await client.close()
    with pytest.raises(EngineGone):
        client.send([])
    for _ in range(2):
        with pytest.raises(EngineGone):
            await client.receive()
    await client.close()


async def test_closing_wakes_a_waiting_receiver(client: EngineClient) -> None:
    waiting = asyncio.ensure_future(client.receive())
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(EngineGone):
        await waiting


async def test_a_crash_in_a_step_is_the_engines_end(client: EngineClient) -> None:
    client.send([Submit(request("crash"))])
    with pytest.raises(EngineGone):
        await listen(client)
    with pytest.raises(EngineGone):
        client.send([Submit(request("late"))])


# In a thread


async def test_a_crash_in_a_thread_names_its_cause_and_closes_the_core() -> None:
    core = FakeCore(EngineConfig(model="fake"))
    client = InProcessClient(core)
    client.send([Submit(request("crash"))])
    with pytest.raises(EngineGone, match="crashes as told") as caught:
        await client.receive()
    assert isinstance(caught.value.__cause__, RuntimeError)
    await client.close()
    assert core.closed


# In a process


def child_pid(client: ProcessClient) -> int:
    return client._process.pid


async def test_a_crash_leaves_its_traceback_and_a_failure_status(capfd: pytest.CaptureFixture[str]) -> None:
    process = await start_process()
    process.send([Submit(request("crash"))])
    with pytest.raises(EngineGone, match="exit status 1") as caught:
        await process.receive()
    await process.close()
    assert caught.value.exit_code == 1
    assert "the fake engine crashes as told" in capfd.readouterr().err


async def test_a_silent_exit_is_noticed_with_its_status(process: ProcessClient) -> None:
    process.send([Submit(request("exit"))])
    with pytest.raises(EngineGone, match="exit status 7"):
        await process.receive()


async def test_sending_to_an_engine_whose_end_is_not_yet_noticed_raises_nowhere(
    process: ProcessClient,
) -> None:
    """The news comes to the readers; a send on its way meanwhile is lost, as it must be."""
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    os.kill(child_pid(process), signal.SIGKILL)
    # The loop stands still: it must not see the end before it sends.
    wait_for_end(child_pid(process))
    process.send([Limit("r", 1)])
    with pytest.raises(EngineGone, match="SIGKILL"):
        await process.receive()
    assert complaints == []


async def test_a_killed_engine_is_noticed_by_a_waiting_receiver(process: ProcessClient) -> None:
    """By its end, and not by its silence."""
    waiting = asyncio.ensure_future(process.receive())
    await asyncio.sleep(0)
    os.kill(child_pid(process), signal.SIGKILL)
    with pytest.raises(EngineGone, match="signal SIGKILL") as caught:
        await waiting
    assert caught.value.exit_code == -signal.SIGKILL


async def test_outputs_that_arrived_before_the_end_are_still_received(process: ProcessClient) -> None:
    process.send([Submit(request("r", max_tokens=1))])
    await asyncio.sleep(0)
    # The loop stands still: it learns of the token and of the end at the same moment.
    assert process._socket.poll(PATIENCE * 1000) or not process._frames._queue.empty()
    os.kill(child_pid(process), signal.SIGKILL)
    wait_for_end(child_pid(process))
    record = Record()
    with pytest.raises(EngineGone):
        await listen(process, record=record)
    assert record.tokens["r"] == expected_tokens(1)


def test_the_client_works_on_uvloop_as_the_server_runs_it() -> None:
    async def front() -> None:
        client = await start_process()
        client.send([Submit(request(f"r{index}")) for index in range(100)])
        await listen(client, lambda r: len(r.finished) == 100)
        os.kill(child_pid(client), signal.SIGKILL)
        with pytest.raises(EngineGone, match="SIGKILL"):
            await client.receive()
        await client.close()

    uvloop.run(front())


async def test_where_the_start_went_is_told(process: ProcessClient) -> None:
    assert process.info.load_seconds.keys() == {"imports", "load"}


async def test_sigterm_ends_an_idle_engine_in_good_order(process: ProcessClient) -> None:
    os.kill(child_pid(process), signal.SIGTERM)
    with pytest.raises(EngineGone, match="exit status 0"):
        await process.receive()


async def test_sigterm_ends_a_busy_engine_in_good_order(process: ProcessClient) -> None:
    process.send([Submit(request("r", max_tokens=10**9))])
    record = await listen(process, lambda r: "r" in r.tokens)
    os.kill(child_pid(process), signal.SIGTERM)
    with pytest.raises(EngineGone, match="exit status 0"):
        await listen(process, record=record)


async def test_sigint_is_left_to_the_front(process: ProcessClient) -> None:
    os.kill(child_pid(process), signal.SIGINT)
    process.send([Submit(request("r"))])
    await listen(process, lambda r: "r" in r.finished)
    assert os.getpgid(child_pid(process)) != os.getpgid(0)


async def test_an_engine_that_does_not_answer_is_killed_in_the_end(
    process: ProcessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.engine.process.CLOSE_SECONDS", 0.2)
    os.kill(child_pid(process), signal.SIGSTOP)
    await process.close()
    assert not is_running(child_pid(process))


@pytest.mark.parametrize("busy", [True, False])
async def test_a_frozen_engine_is_noticed_and_killed(busy: bool) -> None:
    """Also one that has nothing to do: the next request would wait for ever."""
    process = await ProcessClient.start(EngineConfig(model="fake"), hang_timeout=5, factory=FACTORY)
    record = Record()
    if busy:
        process.send([Submit(request("r", max_tokens=10**9))])
        await listen(process, lambda r: "r" in r.tokens, record)
    os.kill(child_pid(process), signal.SIGSTOP)
    with pytest.raises(EngineGone, match="no progress for 5 s"):
        await listen(process, record=record)
    await process.close()


async def test_an_engine_that_has_nothing_to_do_lives_on() -> None:
    process = await ProcessClient.start(EngineConfig(model="fake"), hang_timeout=8, factory=FACTORY)
    await asyncio.sleep(10)
    process.send([Submit(request("r"))])
    await listen(process, lambda r: "r" in r.finished)
    await process.close()


async def test_the_end_tells_what_was_being_computed(process: ProcessClient) -> None:
    process.send([Submit(request("done", max_tokens=1)), Submit(request("other", max_tokens=99))])
    process.send([Submit(request("die"))])
    with pytest.raises(EngineGone) as caught:
        await listen(process)
    assert caught.value.executing == [Place("other", 0, 4, 5), Place("die", 0, 4, 5)]


async def test_an_idle_engine_dies_of_nothing(process: ProcessClient) -> None:
    process.send([Submit(request("r"))])
    await listen(process, lambda r: "r" in r.finished)
    os.kill(child_pid(process), signal.SIGKILL)
    with pytest.raises(EngineGone) as caught:
        await process.receive()
    assert caught.value.executing == []


async def test_a_config_error_of_the_engine_is_raised_in_the_front() -> None:
    with pytest.raises(ConfigError, match=r"^wrong/config\.json: the field 'hidden_size' is missing$"):
        await ProcessClient.start(EngineConfig(model="wrong"), factory=FACTORY)


async def test_any_other_failure_to_start_leaves_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineGone, match="exit status 1"):
        await ProcessClient.start(EngineConfig(model="broken"), factory=FACTORY)
    assert "the fake engine cannot start" in capfd.readouterr().err


async def test_a_start_that_is_given_up_leaves_no_process() -> None:
    others = child_pids()
    starting = asyncio.ensure_future(ProcessClient.start(EngineConfig(model="slow"), factory=FACTORY))
    async with asyncio.timeout(PATIENCE):
        while not (children := child_pids() - others):  # noqa: ASYNC110  the kernel has no event for it
            await asyncio.sleep(0.005)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(is_running(pid) for pid in children)


async def test_only_the_main_thread_may_start_an_engine() -> None:
    raised: list[BaseException] = []

    def start_elsewhere() -> None:
        try:
            asyncio.run(start_process())
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=start_elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert "main thread" in str(raised[0])


async def test_the_sockets_folder_is_private_and_gone_once_both_ends_are_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modes = []
    bind = zmq.Socket.bind

    def look_and_bind(self: zmq.Socket[bytes], address: str) -> object:
        modes.extend(oct(folder.stat().st_mode & 0o777) for folder in tmp_path.iterdir())
        return bind(self, address)

    monkeypatch.setattr(zmq.Socket, "bind", look_and_bind)
    client = await start_process()
    assert modes == ["0o700"]
    assert os.listdir(tmp_path) == []
    client.send([Submit(request("r"))])
    await listen(client, lambda r: "r" in r.finished)
    await client.close()


FRONT = """
    import asyncio
    from tidegate.engine.config import EngineConfig
    from tidegate.engine.process import ProcessClient

    async def main():
        client = await ProcessClient.start(EngineConfig(model="fake"), factory="fake_core:build")
        print(client._process.pid, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


def test_the_engine_dies_with_its_front() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(FRONT)], stdout=subprocess.PIPE, text=True
    ) as front:
        assert front.stdout is not None
        engine_pid = int(front.stdout.readline())
        assert is_running(engine_pid)
        front.kill()
        wait_for_end(engine_pid)


def test_an_engine_whose_front_died_before_it_ran_ends_at_once() -> None:
    dead_parent = 2**22 + 1
    ended = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "tidegate.engine.process",
            "ipc:///nowhere",
            str(dead_parent),
            "0",
            "{}",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 1
    assert "the parent ended before its child started" in ended.stderr


def test_the_front_needs_no_torch() -> None:
    """Starting and holding an engine process must not load what the engine itself loads."""
    code = (
        "import sys, tidegate.engine.process, tidegate.engine.text_stream; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
