"""The Kubernetes manifests as a cluster would get them."""

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ("cpu", "gpu", "sidecar", "multi-gpu")
BUILT = (*(f"overlays/{overlay}" for overlay in OVERLAYS), "examples/inference-pool")

Manifest = dict[str, Any]


@functools.cache
def build(folder: str) -> tuple[Manifest, ...]:
    """All objects of a kustomization below ``k8s/``."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.fail("install kustomize, or kubectl 1.27 or later: the manifests are built with it")
    built = subprocess.run(
        [*command, str(ROOT / "k8s" / folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert built.returncode == 0, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


def pods(folder: str) -> Iterator[tuple[Manifest, Manifest]]:
    """Each Deployment's pod template, and the container in it that is Tidegate."""
    for manifest in build(folder):
        if manifest["kind"] == "Deployment":
            spec = manifest["spec"]["template"]["spec"]
            containers = [*spec.get("initContainers", ()), *spec["containers"]]
            yield spec, next(container for container in containers if container["name"] == "tidegate")


def flag(container: Manifest, name: str) -> str | None:
    """What a flag of the server was given last."""
    given = [arg.partition("=")[2] for arg in container["args"] if arg.startswith(f"--{name}=")]
    return given[-1] if given else None


def config(folder: str) -> dict[str, str]:
    """The data of its ConfigMap."""
    data: dict[str, str] = next(m["data"] for m in build(folder) if m["kind"] == "ConfigMap")
    return data
