"""What the protos promise to clients in other languages."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
TEMPLATE = PROTOS / "buf.gen.yaml"
BUFS = [Path(sys.executable).with_name("buf"), ROOT / ".venv/bin/buf"]
"""The built wheel's environment borrows libraries from .venv, and no commands."""


def buf(*arguments: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    found = [path for path in BUFS if path.exists()]
    if not found:
        pytest.skip("needs buf, of the development extra, in .venv or beside this Python")
    return subprocess.run([found[0], *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def plugins() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(TEMPLATE.read_text())["plugins"]
    return found


def test_stubs_are_made_for_four_languages_by_pinned_plugins() -> None:
    assert {plugin["out"] for plugin in plugins()} == {
        f"gen/{name}" for name in ("go", "java", "ts", "python")
    }
    assert all(":v" in plugin["remote"] for plugin in plugins())


def test_the_template_generates_what_can_be_generated_without_a_network(tmp_path: Path) -> None:
    """Python's messages, by the generator that is installed here in place of buf's own."""
    template = yaml.safe_load(TEMPLATE.read_text())
    protoc = [sys.executable, "-P", "-m", "grpc_tools.protoc"]
    template["plugins"] = [{"protoc_builtin": "python", "protoc_path": protoc, "out": "gen/python"}]
    (tmp_path / "buf.gen.yaml").write_text(yaml.safe_dump(template))
    done = buf("generate", PROTOS, "--template", "buf.gen.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {path.stem for path in (tmp_path / "gen/python/tidegate/v1").glob("*_pb2.py")}
    assert made == {f"{path.stem}_pb2" for path in (PROTOS / "tidegate/v1").glob("*.proto")}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("uint32 max_waiting = 6;", "uint64 max_waiting = 6;"),
        ("uint32 max_waiting = 6;", "uint32 max_waiting = 60;"),
        ("rpc Abort(AbortRequest) returns (AbortResponse);", ""),
        ("rpc ListSessions(ListSessionsRequest) returns (ListSessionsResponse);", ""),
    ],
)
def test_a_change_that_breaks_clients_is_caught(tmp_path: Path, before: str, after: str) -> None:
    changed = tmp_path / "protos"
    shutil.copytree(PROTOS, changed)
    assert buf("breaking", changed, "--against", PROTOS / "baseline.binpb").returncode == 0
    path = changed / "tidegate/v1/control.proto"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    done = buf("breaking", changed, "--against", PROTOS / "baseline.binpb")
    assert done.returncode != 0
    assert "control.proto" in done.stdout
