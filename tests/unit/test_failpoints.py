"""Faults on demand."""

import os
import subprocess
import sys
import time

import pytest

from tidegate.engine import failpoints
from tidegate.engine.failpoints import VARIABLE, Failpoint, parse, reach


def test_nothing_is_armed_without_the_variable() -> None:
    assert failpoints.ARMED == {}
    reach("step", [1])


def test_a_place_fails_for_a_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "ARMED", parse("step=fail@7"))
    reach("step", [1, 2])
    reach("copy")
    with pytest.raises(Failpoint, match="'step'"):
        reach("step", [6, 7])


def test_a_place_fails_every_so_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "ARMED", parse("copy=fail/3"))
    failed = 0
    for _ in range(30):
        try:
            reach("copy")
        except Failpoint:
            failed += 1
    assert failed == 10


def test_a_place_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "ARMED", parse("step=wait:0.05"))
    started = time.monotonic()
    reach("step")
    assert time.monotonic() - started >= 0.05


def test_the_variable_arms_a_process_to_kill_itself() -> None:
    code = "from tidegate.engine.failpoints import reach; reach('copy'); reach('step', [7])"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, VARIABLE: "step=kill@7"}, check=False
    )
    assert ended.returncode == -9


@pytest.mark.parametrize("text", ["nowhere=kill", "step=explode", "step", "step=wait:", "step=fail@x"])
def test_a_mistake_in_the_variable_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        parse(text)
