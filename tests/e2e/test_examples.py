"""The examples, run as their first lines say; what they print is what they claim."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, served

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "service" / "examples"
NOTEBOOK = ROOT / "engine" / "examples" / "llm.ipynb"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("server"), "demo") as running:
        yield running


def output_of(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def example(name: str, server: Served) -> str:
    # A task or a connection that it leaves behind would be said on stderr.
    command = [sys.executable, "-P", "-W", "error", EXAMPLES / f"{name}.py", server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_a_chat_backend_serves_a_hundred_users_on_one_stream(server: Served) -> None:
    said = example("chat_backend", server)
    assert "100 users got 200 answers on one stream" in said
    assert "user 0: What color is the kite?\nmodel:" in said
    figures = re.search(r"Of (\d+) prompt tokens (\d+) had been computed before", said)
    assert figures is not None
    # Of a second turn all but its question was there; of a first one, at most a block.
    assert int(figures[2]) > int(figures[1]) / 2


def test_a_reader_does_not_notice_that_the_cable_was_pulled(server: Served) -> None:
    said = example("resume", server)
    assert "[the cable is pulled]" in said
    connections = re.search(r"(\d+) connections carried them", said)
    assert connections is not None
    assert int(connections[1]) > 1
    assert "100 tokens, 0 computed twice" in said
    assert "The same text as without the break: yes" in said


def test_the_best_of_the_branches_is_the_likeliest(server: Served) -> None:
    said = example("best_of_n", server)
    scores = [float(score) for score in re.findall(r"^ *(-\d+\.\d+)  …", said, re.MULTILINE)]
    assert len(scores) == 6
    assert scores == sorted(scores, reverse=True)
    beginning = said.partition(" …\n")[0]
    assert beginning
    assert said.rpartition("The best of 6:\n")[2].startswith(beginning)


def test_a_batch_file_in_gives_a_batch_file_out(server: Served, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    tidegate = Path(sys.executable).with_name("tidegate")
    output_of(tidegate, "batch", EXAMPLES / "batch.jsonl", answers, "--server", server.address)
    asked, answered = (
        {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}
        for path in (EXAMPLES / "batch.jsonl", answers)
    )
    assert answered.keys() == asked.keys()
    assert [line["error"] for line in answered.values()] == [None] * len(asked)
    assert len(answered["three beginnings"]["response"]["body"]["choices"]) == 3


def test_the_notebook_runs_from_top_to_bottom() -> None:
    """Its code in one process, cell by cell, as a kernel would run it; it prints all that it shows."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    said = output_of(sys.executable, "-P", "-c", "\n".join("".join(cell["source"]) for cell in cells))
    assert "the same again: True" in said
    assert re.search(r"\((?!0)\d+ of \d+ prompt tokens were cached\)", said)
    assert "200 answers" in said
