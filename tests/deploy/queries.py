"""Queries: every expression of the dashboard and the alerts, asked of a Prometheus, and whether the answers make sense.

`complaints(query, ask(url, query.expr))` is empty for each of `dashboard_queries(file)` and `alert_queries(file)` after
traffic of all kinds (tests/deploy/traffic.py). Those with `needs_gpu` read dcgm-exporter.
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

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/dtem-serve.json"
ALERTS = DEPLOY / "prometheus/alerts.yml"
THRESHOLD = re.compile(r"\s(==|[<>]=?)\s+([\d.]+)$")
WINDOW = "20s"  # $__rate_interval at a scrape interval of 5 s
# Largest values that make sense, by unit; and least of the largest, where it is not just above 0.
MOST = {"percentunit": 1 + 1e-9, "s": 60.0, "percent": 100.0, "celsius": 120.0, "watt": 2000.0}
LEAST = {"bytes": 1e6}
# May be 0 all the time: nothing is wrong, or it lasts too short to be seen.
ZERO_IS_WELL = {
    "Alerts firing",
    "From which rate on does load push?",
    "Failed",
    "How many images wait?",
    "Versions since the start",
    "DtemServeFailing",
    "DtemServeStalled",
    "DtemServeReloadRefused",
    "DtemServeRestarting",
}


@dataclass(frozen=True)
class PanelQuery:
    """condition: of an alert, as `> 0.05`, which is not in its expr; empty of a panel."""

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
    """A series over time; what could not be computed is missing. Units: times in seconds of the epoch."""

    labels: dict[str, str]
    values: list[float]
    times: Sequence[float] = ()


def panels(dashboard: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every panel with the title of its row."""
    row = ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            yield from ((row, nested) for nested in panel.get("panels", []))
        else:
            yield row, panel


def dashboard_queries(file: Path = DASHBOARD, window: str = WINDOW) -> list[PanelQuery]:
    """List the queries of all panels, as Grafana would send them with all variables at `All`."""
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
    """List the alerts' expressions without their thresholds, so that they answer also while all is well."""
    groups = yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    return [_alert_query(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def _alert_query(name: str, expr: str) -> PanelQuery:
    found = THRESHOLD.search(expr)
    if found is None:
        raise ValueError(f"{name} has no threshold at its end: {expr}")
    unit = "s" if expr.startswith("histogram_quantile") else "percentunit" if " / " in expr else "none"
    return PanelQuery(name, "alerts", "", expr[: found.start()], unit, condition=found[0].strip())


def fill_in(expr: str, window: str) -> str:
    """Put values in the place of Grafana's variables: all of the dashboard's, this window for its intervals."""
    return re.sub(r"\$(\w+)", lambda found: window if found[1].startswith("__") else ".*", expr)


def ask(prometheus_url: str, expr: str, seconds: float = 300, step: float = 5) -> list[Sample]:
    """Return what Prometheus says of the last seconds. Raises: urllib.error.HTTPError for what is no PromQL."""
    now = time.time() // step * step  # as Grafana: several answers have the same times
    asked = urllib.parse.urlencode({"query": expr, "start": now - seconds, "end": now, "step": step})
    with urllib.request.urlopen(f"{prometheus_url}/api/v1/query_range?{asked}", timeout=10) as answer:
        series = json.load(answer)["data"]["result"]
    return [_read_sample(one["metric"], [(at, float(value)) for at, value in one["values"]]) for one in series]


def _read_sample(labels: dict[str, str], points: Sequence[tuple[float, float]]) -> Sample:
    known = [(at, value) for at, value in points if not math.isnan(value)]
    return Sample(labels, [value for _, value in known], [at for at, _ in known])


def complaints(query: PanelQuery, samples: Sequence[Sample]) -> list[str]:
    """List what makes no sense in the answer to a query, after traffic; nothing if all does."""
    values = [value for sample in samples for value in sample.values]
    if not values:
        return [f"{query.title}: nothing came back for {query.expr}"]
    wrong = []
    if min(values) < 0:
        wrong.append(f"{min(values)} is negative")
    if not max(values) <= MOST.get(query.unit, math.inf) or math.isinf(max(values)):
        wrong.append(f"{max(values)} is too much for {query.unit}")
    if max(values) <= LEAST.get(query.unit, 0) and query.title not in ZERO_IS_WELL:
        wrong.append(f"never more than {max(values)}")
    named = set(re.findall(r"{{(\w+)}}", query.legend))
    shown = [sample.labels for sample in samples if sample.values]
    wrong += [f"no {', '.join(sorted(gone))} in {labels}" for labels in shown if (gone := named - set(labels))]
    return [f"{query.title}: {text}, of {query.expr}" for text in wrong]
