"""The Kubernetes manifests: every overlay builds, is valid, and keeps what the pages promise of it."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import BUILT, ROOT, Manifest, build, config, flag, pods

from tidegate.engine.demo import checkpoint_path

NEWEST_MINOR = int(kubernetes_validate.latest_version().split(".")[1])
KUBERNETES_VERSIONS = tuple(f"1.{NEWEST_MINOR - age}" for age in (2, 1, 0))
"""The last three."""
OUR_DRAIN_END = 10
"""Seconds that a server may take behind its drain grace, to write the last messages and to end."""
SCHEMAS = Path(__file__).parent / "schemas"


def complaints(manifest: Manifest, version: str) -> Iterator[str]:
    """What is wrong with one object, by the schema of its kind; unknown fields are wrong."""
    vendored = SCHEMAS / f"{manifest['kind']}.json"
    if vendored.exists():
        validator = jsonschema.Draft202012Validator(json.loads(vendored.read_text()))
        for error in validator.iter_errors(manifest):
            yield f"{manifest['kind']} {error.json_path}: {error.message}"
        return
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{manifest['kind']} {list(error.path)}: {error.message}"


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("folder", [*BUILT, "monitoring"])
def test_every_overlay_builds_and_is_valid(folder: str, version: str) -> None:
    manifests = (*build(folder), yaml.safe_load((ROOT / "k8s" / "namespace.yaml").read_text()))
    assert len(manifests) > 1
    assert [line for manifest in manifests for line in complaints(manifest, version)] == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readinesProbe"), {}),
        ("Deployment", ("spec", "replicas"), "two"),
        ("HorizontalPodAutoscaler", ("spec", "maxReplicas"), "8"),
        ("ServiceMonitor", ("spec", "endpoints", 0, "intervall"), "15s"),
        ("NetworkPolicy", ("spec", "podSelectors"), {}),
        ("PodDisruptionBudget", ("spec", "maxUnavailable"), [1]),
        ("InferencePool", ("spec", "targetPorts"), 8000),
        ("HTTPRoute", ("spec", "rules", 0, "backendRefs", 0, "kind"), 1),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "expression"), "up"),
    ],
)
def test_a_planted_mistake_is_caught(kind: str, path: tuple[str | int, ...], value: object) -> None:
    everything = (*build("examples/inference-pool"), *build("monitoring"))
    manifest = copy.deepcopy(next(m for m in everything if m["kind"] == kind))
    assert not list(complaints(manifest, KUBERNETES_VERSIONS[-1]))
    place: Any = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert list(complaints(manifest, KUBERNETES_VERSIONS[-1]))


@pytest.mark.parametrize("folder", BUILT)
def test_pods_fit_the_restricted_security_standard(folder: str) -> None:
    for spec, _ in pods(folder):
        assert not any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC"))
        assert spec["automountServiceAccountToken"] is False
        allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected"}
        assert {kind for volume in spec.get("volumes", ()) for kind in volume if kind != "name"} <= allowed
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            security = {**spec["securityContext"], **container["securityContext"]}
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] != 0
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("folder", BUILT)
def test_memory_is_guaranteed_and_counts_the_volumes_in_memory(folder: str) -> None:
    for spec, container in pods(folder):
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        in_memory = [
            v["emptyDir"] for v in spec["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"
        ]
        assert any(v["name"].endswith("shm") for v in spec["volumes"])
        assert sum(size_of(volume["sizeLimit"]) for volume in in_memory) < size_of(
            resources["limits"]["memory"]
        )


@pytest.mark.parametrize("folder", BUILT)
def test_the_memory_limit_holds_the_tiers_the_processes_and_the_shared_memory(folder: str) -> None:
    """By the formula in k8s/README.md; the pinned tier counts, and a GPU's device tier is not the host's."""
    demo = json.loads((checkpoint_path() / "config.json").read_text())
    demo_bytes = 4 * demo["num_hidden_layers"] * demo["num_key_value_heads"] * demo["head_dim"]
    for spec, container in pods(folder):
        resources = container["resources"]
        on_gpu = "nvidia.com/gpu" in resources["limits"]
        tokens = setting(folder, container, "host-kv-tokens")
        if not on_gpu:
            tokens += setting(folder, container, "device-kv-tokens")
        # What is in the volume is somebody else's; its ConfigMap says for which KV the sizes are.
        tiers = tokens * (128 * 1024 if on_gpu else demo_bytes)
        processes = (8 if on_gpu else 3) * 2**30
        shared = sum(
            size_of(volume["emptyDir"]["sizeLimit"])
            for volume in spec["volumes"]
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        )
        assert tiers + processes + shared <= size_of(resources["limits"]["memory"])


@pytest.mark.parametrize("folder", BUILT)
def test_the_pod_outlives_the_drains_that_follow_each_other(folder: str) -> None:
    """A sidecar is told to end when its application has ended."""
    for spec, container in pods(folder):
        before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if container in spec.get("initContainers", ()):
            (application,) = spec["containers"]
            before += next(float(v["value"]) for v in application["env"] if v["name"] == "DRAIN_SECONDS")
        grace = setting(folder, container, "drain-grace")
        assert spec["terminationGracePeriodSeconds"] >= before + grace + OUR_DRAIN_END


def setting(folder: str, container: Manifest, name: str) -> float:
    """What a flag says, itself or by the ConfigMap."""
    given = flag(container, name) or ""
    return float(config(folder)[name] if given.startswith("$(") else given)


def test_a_sidecar_starts_first_ends_last_and_has_no_pre_stop() -> None:
    ((spec, container),) = pods("overlays/sidecar")
    assert container in spec["initContainers"]
    assert container["restartPolicy"] == "Always"
    assert "lifecycle" not in container
    (application,) = spec["containers"]
    (shared,) = {mount["name"] for mount in application["volumeMounts"]} & {
        mount["name"] for mount in container["volumeMounts"]
    }
    (mount,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == shared)
    address = flag(container, "listen")
    assert address is not None
    assert address.startswith(f"unix:{mount}/")
    assert {"name": "TIDEGATE_ADDRESS", "value": address} in application["env"]


@pytest.mark.parametrize("folder", BUILT)
def test_probes_ask_the_health_port_and_liveness_does_not_ask_for_readiness(folder: str) -> None:
    for _, container in pods(folder):
        port = int(flag(container, "health-port") or 0)
        for probe in ("startupProbe", "readinessProbe"):
            assert container[probe]["grpc"] == {"port": port}
        assert container["livenessProbe"]["grpc"] == {"port": port, "service": "liveness"}


@pytest.mark.parametrize("folder", ["overlays/cpu", "overlays/gpu", "overlays/multi-gpu"])
def test_selectors_select_the_pods_and_clients_are_asked_for_one_label_only(folder: str) -> None:
    manifests = {manifest["kind"]: manifest["spec"] for manifest in build(folder) if "spec" in manifest}
    labels = manifests["Deployment"]["template"]["metadata"]["labels"].items()
    for selector in (
        manifests["Deployment"]["selector"]["matchLabels"],
        manifests["Service"]["selector"],
        manifests["PodDisruptionBudget"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["podSelector"]["matchLabels"],
        manifests["ServiceMonitor"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels
    client = manifests["NetworkPolicy"]["ingress"][0]["from"]
    assert client == [{"podSelector": {"matchLabels": {"tidegate.dev/client": "true"}}}]
    assert manifests["Service"]["clusterIP"] == "None"


def size_of(quantity: str) -> float:
    """Bytes of a Kubernetes quantity such as ``4Gi``."""
    for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1):
        if quantity.endswith(suffix):
            return float(quantity[:-2]) * 1024**power
    return float(quantity)
