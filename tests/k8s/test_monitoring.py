"""The dashboard and the alert rules: every metric they name is one that a live server shows."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import yaml
from manifests import BUILT, build
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


def scaled_by() -> dict[str, str]:
    """The metrics that the autoscalers follow, by their object."""
    return {
        f"autoscaler {manifest['metadata']['name']} of {folder}": metric["pods"]["metric"]["name"]
        for folder in BUILT
        for manifest in build(folder)
        if manifest["kind"] == "HorizontalPodAutoscaler"
        for metric in manifest["spec"]["metrics"]
    }


PICKED_BY = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
"""What a Gateway's endpoint picker reads by default."""


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
    assert set(PICKED_BY) <= shown
    unknown = {
        where: metric
        for where, expression in (expressions() | scaled_by()).items()
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


HEALTHY = {
    **{
        f'tidegate_{name}_seconds_bucket{{le="{le}"}}': "0+10x120"
        for name in ("time_to_first_token", "inter_token_latency", "preempt_stall")
        for le in ("0.1", "10", "+Inf")
    },
    'tidegate_requests_total{code="OK"}': "0+100x120",
    "tidegate_requests_waiting": "1x120",
    "tidegate_preemptions_total": "0+1x120",
    "tidegate_generated_tokens_total": "0+1000x120",
    "tidegate_recomputed_tokens_total": "0+1x120",
    "tidegate_parked_dropped_total": "0x120",
    "tidegate_engine_restarts_total": "0x120",
    "tidegate_draining": "0x120",
    "vllm:kv_cache_usage_perc": "0.5x120",
    'tidegate_kv_blocks{tier="host", state="free"}': "80x120",
    'tidegate_kv_blocks{tier="host", state="clean"}': "20x120",
    'tidegate_kv_blocks_reclaimable{tier="host"}': "10x120",
    'tidegate_kv_link_utilization_ratio{direction="in"}': "0.2x120",
}
"""Two hours of a server without troubles, a sample a minute."""
TROUBLES = {
    "SlowFirstToken": {'tidegate_time_to_first_token_seconds_bucket{le="0.1"}': "0x120"},
    "SlowTokens": {'tidegate_inter_token_latency_seconds_bucket{le="0.1"}': "0x120"},
    "QueueGrows": {"tidegate_requests_waiting": "40x120"},
    "Thrashes": {"tidegate_preemptions_total": "0+200x120"},
    "StandsStill": {'tidegate_preempt_stall_seconds_bucket{le="0.1"}': "0x120"},
    "DeviceTierIsFull": {"vllm:kv_cache_usage_perc": "1x120"},
    "HostTierIsFull": {
        'tidegate_kv_blocks{tier="host", state="free"}': "0x120",
        'tidegate_kv_blocks_reclaimable{tier="host"}': "0x120",
    },
    "SwapsWithoutPause": {'tidegate_kv_link_utilization_ratio{direction="in"}': "0.95x120"},
    "EngineDies": {"tidegate_engine_restarts_total": "0x40 1x10 3x70"},
    "LosesParkedConversations": {"tidegate_parked_dropped_total": "0+1x120"},
    "Recomputes": {"tidegate_recomputed_tokens_total": "0+100x120"},
    "Fails": {'tidegate_requests_total{code="INTERNAL"}': "0+5x120"},
    "DrainsForEver": {"tidegate_draining": "1x120"},
}
"""For each alert what must differ for it to fire."""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool; Debian has it in `prometheus`")
def test_each_alert_fires_in_its_trouble_and_none_without(tmp_path: Path) -> None:
    alerts = [rule["alert"] for group in rules()["groups"] for rule in group["rules"]]
    assert set(alerts) == {f"Tidegate{name}" for name in TROUBLES}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": rules()["groups"]}))
    cases = [(name, HEALTHY | trouble) for name, trouble in TROUBLES.items()]
    tests = [
        {
            "interval": "1m",
            "input_series": [
                {"series": labelled(series), "values": values} for series, values in samples.items()
            ],
            # An alert is checked by the number of its kind that fire; their texts are for people.
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
                    "eval_time": "1h",
                    "exp_samples": [{"value": int(alert == f"Tidegate{trouble}"), "labels": "{}"}],
                }
                for alert in alerts
            ],
        }
        for trouble, samples in [("None", HEALTHY), *cases]
    ]
    file = tmp_path / "tests.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    check = subprocess.run(
        ["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr


def labelled(series: str) -> str:
    """As Prometheus finds it at a pod."""
    name, _, labels = series.removesuffix("}").partition("{")
    return f"{name}{{{', '.join(filter(None, (labels, POD)))}}}"


POD = 'namespace="tidegate", pod="tidegate-0"'


def read(address: str) -> str:
    url = f"http://{address}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text
