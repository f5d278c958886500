"""Queue wait: from the service's metrics through prometheus-adapter to the autoscaler."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from app.observability.metrics import Metrics
from app.observability.record import RequestRecord
from app.settings import Settings
from tests.app.results import make_result
from tests.deploy.manifests import Object, read_file

# A series and its values, in promtool's notation.
Samples = dict[str, str]


@pytest.fixture
def rule() -> Object:
    (only,) = read_file("components/prometheus/adapter.yaml")["rules"]["custom"]
    assert isinstance(only, dict)
    return only


def autoscaler() -> Object:
    item = read_file("components/prometheus/horizontalpodautoscaler.yaml")
    spec = item["spec"]
    assert isinstance(spec, dict)
    return spec


def fill_in(query: str) -> str:
    """Fill in the template as prometheus-adapter does for the pods of a namespace."""
    matchers = 'namespace="dtem-serve",pod=~"busy|idle|new"'
    return query.replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", "pod")


def expose() -> str:
    """Return the exposition of a service that has answered one request."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch(lambda: True, _Nothing(), lambda: 0)
    result = make_result("dtem", 16, model="reference", queue_seconds=0.25, inference_seconds=0.01)
    metrics.observe(RequestRecord(model="reference", policy="dtem", r="16", results=[result]), 200)
    return generate_latest(metrics.registry).decode()


class _Nothing:
    """An engine with empty queues."""

    def depths_by_label(self) -> dict[tuple[str, str, str], int]:
        return {}

    def floors(self) -> dict[tuple[str, str, str], int]:
        return {}


def test_autoscaler_uses_the_adapters_metric(rule: Object) -> None:
    (metric,) = autoscaler()["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metric["pods"]["target"]["type"] == "AverageValue"


def test_autoscaler_adds_replicas_before_requests_are_degraded() -> None:
    (metric,) = autoscaler()["metrics"]
    (target_ms,) = re.fullmatch(r"(\d+)m", metric["pods"]["target"]["averageValue"]).groups()  # type: ignore[union-attr]
    assert int(target_ms) < Settings().target_latency_ms / 2


def test_autoscaler_scales_up_fast_and_down_slowly() -> None:
    behavior = autoscaler()["behavior"]
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    assert up["stabilizationWindowSeconds"] == 0
    assert down["stabilizationWindowSeconds"] >= 300
    assert max(policy["value"] for policy in down["policies"]) == 1


def test_adapter_queries_series_that_the_service_exposes(rule: Object) -> None:
    exposed = expose()
    names = set(re.findall(r"dtem_\w+", rule["metricsQuery"] + rule["seriesQuery"]))
    assert names == {"dtem_stage_seconds_sum", "dtem_stage_seconds_count", "dtem_ready"}
    assert all(re.search(rf"^{name}[ {{]", exposed, re.MULTILINE) for name in names)
    waited = re.search(r'^dtem_stage_seconds_sum{.*stage="queue".*} 0.25$', exposed, re.MULTILINE)
    assert waited is not None


def stage(pod: str, wait: str, count: str, r: int = 0, name: str = "queue", namespace: str = "dtem-serve") -> Samples:
    """Make the sum and count of a pod's histogram of one stage at each scrape."""
    labels = f'{{namespace="{namespace}",pod="{pod}",stage="{name}",r="{r}"}}'
    return {f"dtem_stage_seconds_sum{labels}": wait, f"dtem_stage_seconds_count{labels}": count}


def evaluate(query: str, series: Samples, expected: dict[str, float], folder: Path) -> None:
    """Check a query's result with promtool, after two minutes of scrapes every 15 seconds."""
    samples = [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in expected.items()]
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "2m", "exp_samples": samples}],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}), encoding="utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.container
def test_adapter_query_is_the_mean_wait_of_each_pod_and_zero_without_traffic(rule: Object, tmp_path: Path) -> None:
    ready = {f'dtem_ready{{namespace="dtem-serve",pod="{pod}"}}': "1+0x8" for pod in ("busy", "idle", "new")}
    series = {
        # `new` has no other series: it has served no image yet.
        **ready,
        # In 15 s, 45 images that wait 0.2 s each, and 15 that wait 0.4 s.
        **stage("busy", "0+9x8", "0+45x8"),
        **stage("busy", "0+6x8", "0+15x8", r=16),
        **stage("busy", "0+900x8", "0+45x8", name="inference"),
        **stage("busy", "0+900x8", "0+1x8", namespace="other"),
        **stage("idle", "7+0x8", "30+0x8"),
    }
    evaluate(fill_in(rule["metricsQuery"]), series, {"busy": 0.25, "idle": 0, "new": 0}, tmp_path)
