"""Dashboards and alerts query only existing metrics, and every metric is on the dashboard."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from app.observability.metrics import Metrics
from app.observability.record import RequestRecord
from tests.app.results import make_result
from tests.deploy.queries import alert_queries, dashboard_queries

DEPLOY = Path(__file__).parents[2] / "deploy"
VARIANT = ("vit", "dtem", "16")
ADDED_BY_PROMETHEUS = {"job", "instance"}
# Computed by the adapter for the autoscaler; see tests/deploy/test_queue_wait.py.
MADE_BY_ADAPTER = "dtem_queue_wait_seconds"
# Metrics that need no panel.
NOT_SHOWN: set[str] = set()
METRIC = re.compile(r"\b((?:dtem|process|python)_[a-z_]+)(?:{([^}]*)})?")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPING = re.compile(r"\bby \(([^)]*)\)")


class BusyEngine:
    def depths_by_label(self) -> dict[tuple[str, str, str], int]:
        return {VARIANT: 1}

    def floors(self) -> dict[tuple[str, str, str], int]:
        return {("vit", "1", "dtem"): 8}


def labels_by_series() -> dict[str, set[str]]:
    """Map the name of every possible series to its labels, by recording one of every event."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch(lambda: True, BusyEngine(), lambda: 1)
    metrics.announce_models([("vit", "1")], "onnx", "cpu")
    metrics.announce_default("vit", "1", is_configured=True)
    metrics.announce_refused({"vit": 0})
    result = make_result("dtem", 16, is_degraded=True)
    metrics.observe(RequestRecord(results=[result], decodes=[(0.0, 0.1)], total_seconds=0.3), 200)
    metrics.observe_run(VARIANT, 1, 0.1)
    families: Iterator[Metric] = iter(metrics.registry.collect())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


SERIES = labels_by_series()


def list_queries() -> list[tuple[str, str]]:
    """List every query, with the place where it is."""
    queries = dashboard_queries() + alert_queries()
    found = [(query.title, query.expr) for query in queries]
    others = [path for kind in ("yml", "yaml") for path in (DEPLOY / "kubernetes").rglob(f"*.{kind}")]
    names = [(path.name, name) for path in others for name in re.findall(r"\bdtem_[a-z_]+", path.read_text())]
    return found + [(where, name) for where, name in names if name != MADE_BY_ADAPTER]


@pytest.mark.parametrize(("where", "expr"), list_queries())
def test_queried_metrics_and_labels_exist(where: str, expr: str) -> None:
    for name, matchers in METRIC.findall(expr):
        assert name in SERIES, where
        labels = set(LABEL.findall(re.sub(r'"[^"]*"', "", matchers or "")))
        assert labels <= SERIES[name] | ADDED_BY_PROMETHEUS, (where, name)
    for grouping in GROUPING.findall(expr):
        known = set().union(*(SERIES[name] for name, _ in METRIC.findall(expr)))
        assert set(re.findall(r"\w+", grouping)) <= known | ADDED_BY_PROMETHEUS, where


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for query in dashboard_queries() for name, _ in METRIC.findall(query.expr)}
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in SERIES if name.startswith("dtem_")}
    shown_families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    missing = families - shown_families
    created_only = {name for name in missing if name + "_total" in families}
    assert missing - created_only == NOT_SHOWN
    assert families >= NOT_SHOWN
