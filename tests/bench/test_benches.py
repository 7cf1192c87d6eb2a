"""The benches run on the demo checkpoint, and what they count is so; how fast it was is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)


def run(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    figures = tmp_path / "figures.json"
    path = Path(__file__).with_name(script)
    command = [sys.executable, "-P", path, "--model", "demo", *arguments, "--json", figures]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, check=True, capture_output=True)
    return dict(json.loads(figures.read_text()))


CONVERSATIONS = (
    "--conversations",
    "6",
    "--turns",
    "4",
    "--resident",
    "2",
    "--new",
    "40",
    "--output-len",
    "8",
)


def test_a_turn_behind_its_parent_computes_nothing_again(tmp_path: Path) -> None:
    figures = run("turns.py", tmp_path, *CONVERSATIONS)
    assert figures["computed_again"] == 0
    assert all(one["loaded_bytes"] > 0 for one in figures["rounds"][1:]), "it was meant to lie on the host"


def test_text_that_is_sent_again_has_the_prefix_cache_alone(tmp_path: Path) -> None:
    assert run("turns.py", tmp_path, *CONVERSATIONS, "--resend")["computed_again"] > 0


def test_without_pressure_nothing_is_copied(tmp_path: Path) -> None:
    figures = run("pressure.py", tmp_path, "--pairs", "2", "--requests", "4", "--output-len", "24")
    assert (figures["copied_bytes"], figures["preemptions"]) == (0, 0)
    assert len(figures["pairs"]) == 2


def test_a_storm_is_weathered_in_each_way(tmp_path: Path) -> None:
    storm = (
        "--requests",
        "12",
        "--output-len",
        "64",
        "--device-kv-tokens",
        "512",
        "--host-kv-tokens",
        "4096",
    )
    ways = run("storm.py", tmp_path, *storm)["median"]
    assert ways["swap"]["swapped"] > 0
    assert ways["swap"]["recomputed"] == 0
    assert ways["recompute"]["recomputed"] > 0
    assert ways["batch"]["swapped"] + ways["batch"]["dropped"] == 0


def run_front(script: str, *arguments: str) -> dict[str, Any]:
    path = Path(__file__).with_name(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", path, *arguments], env=env, check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("way", [("--sessions", "2"), ("--rpcs",)])
def test_delivery_goes_on_both_ways(way: tuple[str, ...]) -> None:
    load = ("--requests", "32", "--tokens-per-second", "2000", "--seconds", "2", "--warm-up", "1")
    figures = run_front("delivery.py", *load, *way)
    assert figures["tokens_per_second"] > 0
    assert figures["p99_ms"] > 0


@pytest.mark.parametrize("way", [("--sessions", "4"), ()])
def test_every_stream_ends_as_it_should(way: tuple[str, ...]) -> None:
    figures = run_front("streams.py", "--requests", "200", "--hold", "1", *way)
    assert figures["ends"] == {"FINISH_REASON_MAX_TOKENS": 200}


def test_the_scheduler_runs_alone_with_two_groups() -> None:
    script = Path(__file__).with_name("scheduler.py")
    command = [sys.executable, "-P", script, "--turns", "1", "--groups", "full and windowed"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert [int(line.rsplit(",", 1)[1]) > 0 for line in printed.splitlines()] == [False, False, True, True]
