"""How often and how fast an engine is started again."""

import asyncio

import pytest
from fake_engine import FakeEngine, byte_text

from tidegate.engine.client import EngineClient, EngineGone
from tidegate.engine.config import ConfigError
from tidegate.engine.messages import Release
from tidegate.service import supervisor
from tidegate.service.supervisor import WINDOW_SECONDS, Supervisor

GONE = EngineGone("the engine process ended with signal SIGKILL", -9)


class Starts:
    """A clock, and starts of an engine that fail as often as they are told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.failures: list[Exception] = []
        self.number = 0
        self.engines: list[FakeEngine] = []

    async def __call__(self) -> EngineClient:
        self.number += 1
        if self.failures:
            raise self.failures.pop(0)
        self.engines.append(FakeEngine(byte_text()))
        return self.engines[-1]


@pytest.fixture
def starts() -> Starts:
    return Starts()


async def supervise(starts: Starts, max_restarts: int) -> Supervisor:
    return Supervisor(FakeEngine(byte_text()), starts, max_restarts, now=lambda: starts.now)


async def test_too_many_deaths_within_the_window_are_the_end(starts: Starts) -> None:
    supervised = await supervise(starts, 3)
    for _ in range(3):
        await supervised.restart(GONE)
    starts.now = WINDOW_SECONDS - 1
    with pytest.raises(EngineGone) as caught:
        await supervised.restart(GONE)
    assert caught.value is GONE
    await supervised.close()


async def test_deaths_of_long_ago_do_not_count(starts: Starts) -> None:
    supervised = await supervise(starts, 2)
    for death in range(20):
        starts.now = death * WINDOW_SECONDS / 2
        await supervised.restart(GONE)
    assert starts.number == 20
    await supervised.close()


async def test_starts_that_fail_are_tried_again_after_longer_and_longer_waits(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of the dead engine may not be free yet, for instance."""
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (1.0, 3.0))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    starts.failures = [GONE, ConfigError("device_kv_tokens: no room"), GONE, GONE]
    supervised = await supervise(starts, 10)
    await supervised.restart(GONE)
    assert waits == [1.0, 2.0, 3.0, 3.0]
    assert starts.number == 5
    await supervised.close()


async def test_starts_that_fail_count(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.0, 0.0))
    starts.failures = [GONE] * 10
    supervised = await supervise(starts, 4)
    with pytest.raises(EngineGone):
        await supervised.restart(GONE)
    assert starts.number == 4
    await supervised.close()


async def test_the_new_engine_takes_the_place_of_the_old_one(starts: Starts) -> None:
    supervised = await supervise(starts, 1)
    await supervised.restart(GONE)
    supervised.send([Release(["r"])])
    (engine,) = starts.engines
    assert engine.commands == [Release(["r"])]
    engine.kill()
    with pytest.raises(EngineGone):
        await supervised.receive()
    await supervised.close()
