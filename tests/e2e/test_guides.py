"""The guides' commands, as a newcomer types them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served import Served, served

ROOT = Path(__file__).parents[2]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served(tmp_path_factory.mktemp("server"), "demo") as running:
        yield running


def commands(guide: Path, heading: str) -> list[str]:
    """The lines of the first shell block under a heading."""
    section = guide.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1].splitlines()


@pytest.mark.parametrize("language", ["Python", "TypeScript"])
@pytest.mark.timeout(300)
def test_five_commands_lead_to_a_streamed_answer(language: str, server: Served, tmp_path: Path) -> None:
    if language == "TypeScript" and shutil.which("npm") is None:
        pytest.skip("needs Node with npm: install nodejs 18.3 or later")
    lines = commands(ROOT / "protos" / "README.md", f"A first answer in {language}")
    assert len(lines) == 5
    assert lines[:2] == ["pip install '.[server]'", "tidegate serve demo &"]  # done: by `make`, by `served`
    ours = shutil.ignore_patterns("node_modules", "build", "generated", "*_pb2*", "__pycache__")
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=ours)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONSAFEPATH", None)  # a newcomer has not set it: stubs lie beside the script
    *preparing, last = [line for line in lines[2:] if not line.startswith("pip install")]
    for line in (*preparing, f"{last} {server.address}"):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()[-1].split()) > 10
