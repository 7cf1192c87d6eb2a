"""``tidegate demo``, which is what ``make demo`` runs once everything is set up."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

TIDEGATE = Path(sys.executable).with_name("tidegate")


@pytest.fixture(scope="module")
def transcript() -> list[str]:
    """The lines that it writes to a pipe."""
    run = subprocess.run([TIDEGATE, "demo"], capture_output=True, text=True, timeout=110, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.splitlines()


def said_by(number: int, transcript: list[str]) -> list[str]:
    return [line[2:] for line in transcript if line.startswith(f"{number} ")]


@pytest.mark.parametrize("number", range(1, 9))
def test_every_conversation_has_two_turns(transcript: list[str], number: int) -> None:
    lines = said_by(number, transcript)
    asked = [i for i, line in enumerate(lines) if line.startswith("> ")]
    assert len(asked) == 2
    for begin, end in ((asked[0], asked[1]), (asked[1], len(lines))):
        assert any(line.startswith("  ") and line.endswith(".") for line in lines[begin:end])


def test_all_eight_run_at_once(transcript: list[str]) -> None:
    """All have asked before the first long story is over."""
    openings = [line for line in transcript if line[1:4] == " > "][:8]
    assert sorted(line[0] for line in openings) == list("12345678")


def test_one_is_parked_for_lack_of_credit_and_goes_on_where_it_was(transcript: list[str]) -> None:
    lines = said_by(1, transcript)
    states = [line.split(":")[0][2:] for line in lines if line.startswith("* ")]
    assert [state for state in states if state in ("stalled", "parked", "released", "resumed")] == [
        "stalled",
        "parked",
        "released",
        "resumed",
    ]
    parked = next(i for i, line in enumerate(lines) if line.startswith("* parked"))
    released = next(i for i, line in enumerate(lines) if line.startswith("* released"))
    assert not [line for line in lines[parked + 1 : released] if not line.startswith("* ")]
    others = transcript[transcript.index(f"1 {lines[parked]}") : transcript.index(f"1 {lines[released]}")]
    assert [line for line in others if line.startswith(("2   ", "3   ", "4   "))]
    assert [line for line in lines[released:] if line.startswith("  ")]


def test_the_second_turn_knows_what_the_first_one_said(transcript: list[str]) -> None:
    assert said_by(5, transcript)[-1] == "  Your favourite colour is green."


def test_it_ends_with_a_table(transcript: list[str]) -> None:
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in transcript
        if len(cells := line.split("│")) == 4 and cells[1].strip()
    }
    assert set(rows) == {
        "output",
        "time to first token",
        "device tier",
        "host tier",
        "swaps",
        "recomputed",
        "prefix hits",
    }
    assert "tokens/s" in rows["output"]
    assert not rows["swaps"].endswith(" 0 KiB out, 0 KiB in")
    assert not rows["prefix hits"].startswith("0 ")
    assert transcript[-1] == "The server stopped cleanly."


def test_it_leaves_nothing_behind(transcript: list[str]) -> None:
    socket = Path(transcript[1].split("unix:")[1])
    assert socket.name == "socket"
    assert not socket.parent.exists()
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if any(str(socket) in word for word in command)]
