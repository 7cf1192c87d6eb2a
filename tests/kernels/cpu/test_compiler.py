"""Compiling the native kernels: once for each machine, safely side by side, and plainly where it fails."""

import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
import torch
from checkpoints import make_checkpoint

from tidegate.engine.build import build_engine
from tidegate.engine.config import EngineConfig
from tidegate.engine.model.weights import load_model
from tidegate.kernels.cpu.compiler import CompilerError, compile_kernels

DEFINITIONS = {"SCALAR_FP32": "1", "HEAD_DIM": "16"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "tidegate").iterdir())


@pytest.fixture
def _needs_compiler() -> None:
    try:
        compile_kernels(DEFINITIONS)
    except CompilerError as error:
        pytest.skip(f"no native kernels on this machine: {error}")


@pytest.mark.usefixtures("_needs_compiler")
def test_a_library_is_compiled_once_and_found_again(cache: Path):
    again = compile_kernels(DEFINITIONS)
    assert again.seconds == 0
    other = compile_kernels({**DEFINITIONS, "HEAD_DIM": "24"})
    assert other.seconds > 0
    assert libraries(cache) == sorted([again.path, other.path])


@pytest.mark.usefixtures("_needs_compiler")
def test_the_cache_is_its_owners_alone(cache: Path):
    assert stat.S_IMODE((cache / "tidegate").stat().st_mode) == 0o700


@pytest.mark.usefixtures("_needs_compiler")
def test_no_library_is_taken_from_a_folder_that_others_can_write_to(cache: Path):
    (cache / "tidegate").chmod(0o777)
    assert cache not in compile_kernels(DEFINITIONS).path.parents


@pytest.mark.usefixtures("_needs_compiler")
def test_processes_that_start_together_leave_one_whole_library(cache: Path):
    for path in libraries(cache):
        path.unlink()
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = {compiled.path for compiled in pool.map(compile_kernels, [DEFINITIONS] * 3, chunksize=1)}
    assert libraries(cache) == list(paths)


@pytest.mark.usefixtures("_needs_compiler")
def test_without_a_home_to_write_to_a_temporary_folder_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As in a container whose file system is read-only but for /tmp: one compilation for the whole process,
    which leaves nothing behind.
    """
    blocked, temporary = tmp_path / "a file, not a folder", tmp_path / "tmp"
    blocked.write_text("")
    temporary.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("TMPDIR", str(temporary))
    code = (
        "from tidegate.kernels.cpu.compiler import compile_kernels\n"
        f"first, again = compile_kernels({DEFINITIONS}), compile_kernels({DEFINITIONS})\n"
        "print(first.seconds > 0, again.seconds > 0, oct(again.path.parent.stat().st_mode), again.path)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, again, mode, path = done.stdout.split()
    assert (first, again, mode) == ("True", "False", oct(stat.S_IFDIR | 0o700))
    assert temporary in Path(path).parents
    assert list(temporary.iterdir()) == []


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "broken-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'attention.c:1: error: planted' >&2; exit 1", "attention.c:1: error: planted"),
        ("exit 0", "No such file"),
        ("kill -9 $$", "status -9"),
    ],
    ids=["refuses", "makes nothing", "is killed"],
)
def test_a_broken_compiler_is_said_in_one_line(tmp_path: Path, monkeypatch, cache: Path, script, says):
    monkeypatch.setenv("CC", fake_compiler(tmp_path, script))
    with pytest.raises(CompilerError, match=says) as caught:
        compile_kernels(DEFINITIONS)
    assert "\n" not in str(caught.value)
    assert libraries(cache) == []


def test_without_a_compiler_torch_serves_and_the_log_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    folder = make_checkpoint(tmp_path, "qwen2")
    with structlog.testing.capture_logs() as logs:
        build_engine(EngineConfig(model=str(folder), dtype="float32", device_kv_tokens=256)).close()
    (line,) = [entry for entry in logs if entry["event"] == "kernels"]
    assert (line["log_level"], line["path"]) == ("warning", "torch")
    assert "no-such-compiler" in line["slower_because"]


def test_a_library_that_cannot_be_loaded_leaves_torch_to_serve(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CC", fake_compiler(tmp_path, 'for last; do :; done; echo "no library" > "$last"'))
    folder = make_checkpoint(tmp_path, "qwen2")
    operations = load_model(folder, torch.float32).operations
    assert operations.path == "torch"
    assert "cannot be loaded" in operations.slower_because


@pytest.mark.usefixtures("_needs_compiler")
def test_a_compiler_that_was_updated_compiles_anew(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CC", fake_compiler(tmp_path, 'exec cc "$@"'))
    first = compile_kernels(DEFINITIONS)
    os.utime(tmp_path / "broken-cc", (1, 1))
    assert compile_kernels(DEFINITIONS).path != first.path
