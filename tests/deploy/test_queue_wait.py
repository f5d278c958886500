"""The queue's wait, on its way from the service's metrics through prometheus-adapter to the autoscaler."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from app.metrics import Exchange, Metrics, Run
from app.settings import Settings
from tests.deploy.manifests import Object, read_file

VARIANT = ("reference", "dtem", "16")
SERIES = 'dtem_stage_seconds_{part}{{namespace="dtem-serve",pod="{pod}",stage="{stage}",r="{r}"}}'


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
    """Fill the template in as prometheus-adapter does when asked for pods of a namespace."""
    matchers = 'namespace="dtem-serve",pod=~"busy|idle|new"'
    return query.replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", "pod")


def expose() -> str:
    """Say what a service that has answered one request exposes."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch(lambda: True, _Nothing(), lambda: 0)
    run = Run(VARIANT, 1, 0.0, 0.25, 0.01, kept_tokens=11, gmacs=0.3, gmacs_saved=0.3, is_degraded=False)
    metrics.observe(Exchange(model="reference", policy="dtem", r="16", runs=[run]), 200)
    return generate_latest(metrics.registry).decode()


class _Nothing:
    """An engine in which nothing waits."""

    def depths_by_label(self) -> dict[tuple[str, str, str], int]:
        return {}

    def floors(self) -> dict[tuple[str, str, str], int]:
        return {}


def test_autoscaler_asks_for_the_metric_that_the_adapter_offers(rule: Object) -> None:
    (metric,) = autoscaler()["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metric["pods"]["target"]["type"] == "AverageValue"


def test_autoscaler_adds_replicas_before_requests_are_degraded() -> None:
    (metric,) = autoscaler()["metrics"]
    (target_ms,) = re.fullmatch(r"(\d+)m", metric["pods"]["target"]["averageValue"]).groups()  # type: ignore[union-attr]
    assert int(target_ms) < Settings().patience_ms / 2


def test_autoscaler_is_quick_to_add_and_slow_to_remove() -> None:
    behavior = autoscaler()["behavior"]
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    assert up["stabilizationWindowSeconds"] == 0
    assert down["stabilizationWindowSeconds"] >= 300
    assert max(policy["value"] for policy in down["policies"]) == 1


def test_adapter_reads_series_that_the_service_exposes(rule: Object) -> None:
    exposed = expose()
    names = set(re.findall(r"dtem_\w+", rule["metricsQuery"] + rule["seriesQuery"]))
    assert names == {"dtem_stage_seconds_sum", "dtem_stage_seconds_count", "dtem_ready"}
    assert all(re.search(rf"^{name}[ {{]", exposed, re.MULTILINE) for name in names)
    waited = re.search(r'^dtem_stage_seconds_sum{.*stage="queue".*} 0.25$', exposed, re.MULTILINE)
    assert waited is not None


@pytest.mark.container
def test_adapter_query_is_the_mean_wait_of_each_pod_and_zero_without_traffic(rule: Object, tmp_path: Path) -> None:
    """Scraped every 15 s for two minutes, on made-up series: `busy` has two rates, whose images wait 0.2 s and 0.4 s,
    three of the former for one of the latter; `idle` had traffic before; `new` has never had any. A pod of another
    namespace, and the other stages, must not count.
    """
    values = {
        SERIES.format(part="sum", pod="busy", stage="queue", r="0"): "0+9x8",  # 45 images every 15 s
        SERIES.format(part="count", pod="busy", stage="queue", r="0"): "0+45x8",
        SERIES.format(part="sum", pod="busy", stage="queue", r="16"): "0+6x8",  # 15
        SERIES.format(part="count", pod="busy", stage="queue", r="16"): "0+15x8",
        SERIES.format(part="sum", pod="busy", stage="inference", r="0"): "0+900x8",
        SERIES.format(part="count", pod="busy", stage="inference", r="0"): "0+45x8",
        SERIES.format(part="sum", pod="idle", stage="queue", r="0"): "7+0x8",
        SERIES.format(part="count", pod="idle", stage="queue", r="0"): "30+0x8",
        SERIES.format(part="sum", pod="busy", stage="queue", r="0").replace("dtem-serve", "other"): "0+900x8",
        SERIES.format(part="count", pod="busy", stage="queue", r="0").replace("dtem-serve", "other"): "0+1x8",
        **{f'dtem_ready{{namespace="dtem-serve",pod="{pod}"}}': "1+0x8" for pod in ("busy", "idle", "new")},
        'dtem_ready{namespace="other",pod="new"}': "1+0x8",
    }
    expected = [("busy", 0.25), ("idle", 0), ("new", 0)]
    document = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": series, "values": steps} for series, steps in values.items()],
                "promql_expr_test": [
                    {
                        "expr": fill_in(rule["metricsQuery"]),
                        "eval_time": "2m",
                        "exp_samples": [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in expected],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    command = ["promtool", "test", "rules", str(tmp_path / "test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
