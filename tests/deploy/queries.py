"""Queries: run every expression of the dashboard and the alerts against a Prometheus, and check the results.

`find_faults(query, ask(url, query.expr))` is empty for each of `dashboard_queries(file)` and `alert_queries(file)`
after traffic of all kinds (tests/deploy/traffic.py). Queries with `needs_gpu` read dcgm-exporter.
"""

import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from deploy.grafana.dashboard import rows

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/dtem-serve.json"
ALERTS = DEPLOY / "prometheus/alerts.yml"
THRESHOLD = re.compile(r"\s(==|[<>]=?)\s+([\d.]+)$")
# $__rate_interval at a scrape interval of 5 s.
WINDOW = "20s"
# Plausible maxima by unit; and lower bounds of the maximum, where it is not just above 0.
UPPER_BOUNDS = {"percentunit": 1 + 1e-9, "s": 60.0, "percent": 100.0, "celsius": 120.0, "watt": 2000.0}
LOWER_BOUNDS = {"bytes": 1e6}
# May be 0 throughout: nothing is wrong, or it is too short to be scraped.
MAY_BE_ZERO = {panel.title for row in rows() for panel in row.panels if panel.may_be_zero} | {
    "DtemServeFailing",
    "DtemServeStalled",
    "DtemServeVersionRefused",
    "DtemServeDefaultUnnamed",
    "DtemServeRestarting",
}


@dataclass(frozen=True)
class PanelQuery:
    """A query of a panel or an alert. condition: an alert's threshold, such as `> 0.05`, removed from expr."""

    title: str
    row: str
    legend: str
    expr: str
    unit: str
    condition: str = ""

    @property
    def needs_gpu(self) -> bool:
        return "dcgm" in self.expr.lower()


class Sample(NamedTuple):
    """A series over time, without its NaN values. Units: times in seconds since the epoch."""

    labels: dict[str, str]
    values: list[float]
    times: Sequence[float] = ()


def panels(dashboard: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every panel with its row's title."""
    row = ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            yield from ((row, nested) for nested in panel.get("panels", []))
        else:
            yield row, panel


def dashboard_queries(file: Path = DASHBOARD, window: str = WINDOW) -> list[PanelQuery]:
    """List the queries of all panels, as Grafana sends them with every variable set to `All`."""
    return [
        PanelQuery(
            title=panel["title"],
            row=row,
            legend=target["legendFormat"],
            expr=fill_in(target["expr"], window),
            unit=panel["fieldConfig"]["defaults"]["unit"],
        )
        for row, panel in panels(json.loads(file.read_text(encoding="utf-8")))
        for target in panel["targets"]
    ]


def alert_queries(file: Path = ALERTS) -> list[PanelQuery]:
    """List the alerts' expressions without thresholds, so that they return data when no alert fires."""
    groups = yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    return [_alert_query(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def _alert_query(name: str, expr: str) -> PanelQuery:
    found = THRESHOLD.search(expr)
    if found is None:
        raise ValueError(f"{name} does not end with a threshold: {expr}")
    unit = "s" if expr.startswith("histogram_quantile") else "percentunit" if " / " in expr else "none"
    return PanelQuery(name, "alerts", "", expr[: found.start()], unit, condition=found[0].strip())


def fill_in(expr: str, window: str) -> str:
    """Substitute Grafana's variables: everything for the dashboard's, the window for its intervals."""
    return re.sub(r"\$(\w+)", lambda found: window if found[1].startswith("__") else ".*", expr)


def ask(prometheus_url: str, expr: str, seconds: float = 300, step: float = 5) -> list[Sample]:
    """Run a range query over the last seconds.

    Raises: urllib.error.HTTPError for invalid PromQL.
    """
    # Aligned, as Grafana does it, so that several results share their times.
    now = time.time() // step * step
    parameters = urllib.parse.urlencode({"query": expr, "start": now - seconds, "end": now, "step": step})
    with urllib.request.urlopen(f"{prometheus_url}/api/v1/query_range?{parameters}", timeout=10) as answer:
        series = json.load(answer)["data"]["result"]
    return [_read_sample(one["metric"], [(at, float(value)) for at, value in one["values"]]) for one in series]


def _read_sample(labels: dict[str, str], points: Sequence[tuple[float, float]]) -> Sample:
    known = [(at, value) for at, value in points if not math.isnan(value)]
    return Sample(labels, [value for _, value in known], [at for at, _ in known])


def find_faults(query: PanelQuery, samples: Sequence[Sample]) -> list[str]:
    """List what is implausible in a query's result after traffic."""
    values = [value for sample in samples for value in sample.values]
    if not values:
        return [f"{query.title}: no data for {query.expr}"]
    faults = []
    if min(values) < 0:
        faults.append(f"{min(values)} is negative")
    if not max(values) <= UPPER_BOUNDS.get(query.unit, math.inf) or math.isinf(max(values)):
        faults.append(f"{max(values)} is too large for {query.unit}")
    if max(values) <= LOWER_BOUNDS.get(query.unit, 0) and query.title not in MAY_BE_ZERO:
        faults.append(f"never above {max(values)}")
    named = set(re.findall(r"{{(\w+)}}", query.legend))
    shown = [sample.labels for sample in samples if sample.values]
    faults += [f"no {', '.join(sorted(gone))} in {labels}" for labels in shown if (gone := named - set(labels))]
    return [f"{query.title}: {text}, of {query.expr}" for text in faults]
