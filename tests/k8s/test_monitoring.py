"""The dashboard and the alert rules: every metric they name is one that a live server shows."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import yaml
from served import served
from wire import Seen, connect, generate

MONITORING = Path(__file__).parents[2] / "k8s" / "monitoring"
METRIC = re.compile(r"\b(?:tidegate_|vllm:)[a-z_:]+")


def expressions() -> dict[str, str]:
    """Every expression, by the panel or the alert that it belongs to."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = {
        f"panel {panel['title']}, {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    for group in rules()["groups"]:
        found |= {f"alert {rule['alert']}": rule["expr"] for rule in group["rules"]}
    return found


def rules() -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    spec: dict[str, list[dict[str, list[dict[str, str]]]]] = yaml.safe_load(
        (MONITORING / "alerts.yaml").read_text()
    )["spec"]
    return spec


async def test_every_metric_that_is_named_exists_in_a_live_scrape(tmp_path: Path) -> None:
    with served(tmp_path, "demo", "--metrics-port", "127.0.0.1:0") as server:
        async with connect(server.address) as channel:
            sampling = {"max_tokens": 5}
            await generate(channel, Seen("one", "", {"prompt": {"text": "The tide"}, "sampling": sampling}))
        scrape = read(server.wait_for_log("ready")["metrics"])
    # By its type, too: a counter with labels has no sample before the first event.
    shown = set(re.findall(r"^(?:# TYPE )?([a-z_:]+)(?:\{| )", scrape, re.M))
    unknown = {
        where: metric
        for where, expression in expressions().items()
        for metric in METRIC.findall(expression)
        if metric not in shown
    }
    assert unknown == {}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool; Debian has it in `prometheus`")
def test_prometheus_takes_the_rules_and_every_panels_expression(tmp_path: Path) -> None:
    """A panel's expression is checked as a recording rule, with Grafana's variables filled in."""
    panels = [
        {"record": f"panel:number_{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions().values())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [*rules()["groups"], {"name": "panels", "rules": panels}]}))
    check = subprocess.run(
        ["promtool", "check", "rules", file], capture_output=True, text=True, timeout=60, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def read(address: str) -> str:
    url = f"http://{address}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text
