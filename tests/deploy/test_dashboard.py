"""The generated dashboard is up to date and valid for Grafana, and every query returns plausible data."""

import importlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from jsonschema import Draft7Validator

from deploy.grafana import dashboard, page
from tests.app.odd_images import encode, make_photo
from tests.app.store.test_loader import change_byte
from tests.app.store.test_watcher import publish
from tests.app.tiny_store import write_store
from tests.deploy.dcgm_exporter import run_dcgm_exporter
from tests.deploy.draw_dashboard import draw
from tests.deploy.prometheus import get, run_prometheus
from tests.deploy.queries import (
    DASHBOARD,
    PanelQuery,
    Sample,
    alert_queries,
    ask,
    dashboard_queries,
    find_faults,
    panels,
)
from tests.deploy.traffic import Address, send_all_kinds
from tests.integration.server import Server, wait_until

ROOT = Path(__file__).parents[2]
GRAFANA = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]["grafana"]
PROVISIONING = DASHBOARD.parents[1] / "provisioning"
BOARD = json.loads(DASHBOARD.read_text(encoding="utf-8"))
SCHEMA = json.loads((Path(__file__).parent / "grafana-schema.json").read_text(encoding="utf-8"))
PNG = encode(make_photo(64, 64), "PNG")
# Small queues, delayed batches and a low target, so that little traffic is enough to overload the service.
SETTINGS: dict[str, Any] = {
    "max_queue_images": 6,
    "max_files": 4,
    "max_batch_delay_ms": 30,
    "target_latency_ms": 20,
    "reload_seconds": 0.5,
}


def test_dashboard_file_is_up_to_date() -> None:
    assert DASHBOARD.read_text(encoding="utf-8") == dashboard.render()


def test_page_is_up_to_date_and_has_every_panel() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(BOARD)
    assert all(f"| {panel['title']} |" in page.PAGE.read_text(encoding="utf-8") for _, panel in panels(BOARD))


def test_dashboard_survives_a_round_trip_through_grafanas_model() -> None:
    plugins.register_default_plugins()
    # Imported late: it warns, unless deploy.grafana has been imported first.
    model = importlib.import_module("grafana_foundation_sdk.models.dashboard")
    again = json.loads(json.dumps(model.Dashboard.from_json(BOARD), cls=JSONEncoder))
    for variable in again["templating"]["list"]:
        for name in ("auto", "auto_min", "auto_count"):
            del variable[name]
    assert again == BOARD


def test_dashboard_matches_the_schema_of_the_pinned_grafana() -> None:
    assert list(errors(BOARD)) == []
    # Grafana 13.2's.
    assert BOARD["schemaVersion"] == 42


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("fieldConfig", {"defaults": {"thresholds": {"mode": "sometimes", "steps": []}}, "overrides": []}),
        ("fieldConfig", {"defaults": {"custom": {"showPoints": "perhaps"}}, "overrides": []}),
        ("options", {"legend": {"displayMode": "big"}}),
        ("gridPos", {"x": "left"}),
    ],
)
def test_invalid_panel_fails_the_schema(place: str, wrong: dict[str, Any]) -> None:
    (panel,) = [panel for _, panel in panels(BOARD) if panel["title"] == "CPU use by instance"]
    assert list(errors({**BOARD, "panels": [{**panel, place: wrong}]}))


def errors(board: dict[str, Any]) -> Iterator[str]:
    """Yield the violations of Grafana's schemas, of the dashboard and of each kind of panel."""
    parts = [(SCHEMA["dashboard"], board)]
    for _, panel in panels(board):
        known = SCHEMA[panel["type"]]
        parts.append((known["options"], panel["options"]))
        parts += [(known["custom"], panel["fieldConfig"]["defaults"].get("custom", {}))] if "custom" in known else []
    for schema, part in parts:
        yield from (error.message for error in Draft7Validator(schema).iter_errors(part))


def test_every_panel_has_a_unique_title_a_description_a_unit_and_legends() -> None:
    titles = [panel["title"] for _, panel in panels(BOARD)]
    assert len(titles) == len(set(titles)) > 30
    for _, panel in panels(BOARD):
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_panels_do_not_overlap_and_have_unique_ids() -> None:
    taken: Counter[tuple[int, int]] = Counter()
    for _, panel in panels(BOARD):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        taken.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
    assert set(taken.values()) == {1}
    numbers = [panel["id"] for panel in BOARD["panels"]] + [panel["id"] for _, panel in panels(BOARD)]
    assert len(set(numbers)) == len([p for p in BOARD["panels"] if p["type"] == "row"]) + len(list(panels(BOARD)))


def test_every_query_uses_the_provisioned_data_source() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    found = set(re.findall(r'"uid": "([^"]+)"', DASHBOARD.read_text(encoding="utf-8"))) - {BOARD["uid"]}
    assert found == {source["uid"]}
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards/dtem-serve.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in GRAFANA["volumes"])
    assert (provider["type"], provider["options"]["path"]) == ("file", mounts["./deploy/grafana/dashboards"])


def test_panels_have_the_version_of_the_deployed_grafana() -> None:
    assert GRAFANA["image"] == f"grafana/grafana:{dashboard.GRAFANA}"
    assert {panel["pluginVersion"] for _, panel in panels(BOARD)} == {dashboard.GRAFANA}


def query(**fields: str) -> PanelQuery:
    return PanelQuery(**({"title": "t", "row": "r", "legend": "{{r}}", "expr": "e", "unit": "s"} | fields))


@pytest.mark.parametrize(
    ("panel_query", "values"),
    [
        (query(), []),
        (query(), [-0.1, 1.0]),
        (query(), [61.0]),
        (query(), [float("inf")]),
        (query(), [0.0, 0.0]),
        (query(unit="percentunit"), [1.01]),
        (query(unit="bytes"), [1000.0]),
        (query(legend="{{r}} {{policy}}"), [1.0]),
    ],
)
def test_implausible_results_are_found(panel_query: PanelQuery, values: list[float]) -> None:
    assert find_faults(query(), [Sample({"r": "8"}, [0.0, 0.01])]) == []
    assert len(find_faults(panel_query, [Sample({"r": "8"}, values)])) == 1


class Watched(NamedTuple):
    """A service, the Prometheus that scrapes it, its model store, and the statuses of its answers."""

    server: Server
    prometheus_url: str
    store: Path
    statuses: Counter[int]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    write_store(folder / "store")
    with (
        Server(folder / "store", folder / "server.log", **SETTINGS) as server,
        run_dcgm_exporter() as gpu_port,
        run_prometheus(folder / "prometheus", server.port, gpu_port) as url,
    ):
        wait_until(lambda: all(sample.values[-1] == 1 for sample in ask(url, "up", 10, 1)) and bool(ask(url, "up")))
        # A scrape before the traffic: an increase needs a first value.
        time.sleep(2)
        statuses = send_all_kinds(Address("127.0.0.1", server.port), PNG, seconds=15, n_clients=32)
        time.sleep(2)
        yield Watched(server, url, folder / "store", statuses)


@pytest.mark.container
def test_every_query_returns_plausible_data_after_traffic(watched: Watched) -> None:
    assert {200, 404, 415, 422, 429, 504} <= set(watched.statuses), watched.statuses
    queries = dashboard_queries(window="5s") + alert_queries()
    found = [text for each in queries for text in find_faults(each, ask(watched.prometheus_url, each.expr, 60, 1))]
    assert found == []
    assert len(queries) > 50


@pytest.mark.container
def test_every_panel_can_be_drawn(watched: Watched) -> None:
    figure = draw(watched.prometheus_url, 60)
    collapsed = len(BOARD["panels"][-1]["panels"])
    assert len(figure.axes) == len(list(panels(BOARD))) - collapsed


@pytest.mark.container
def test_every_rule_evaluates_and_every_target_is_up(watched: Watched) -> None:
    (group,) = get(watched.prometheus_url, "rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert {target["health"] for target in get(watched.prometheus_url, "targets")["activeTargets"]} == {"up"}


@pytest.mark.container
def test_refused_version_fires_its_alert_and_no_other(watched: Watched) -> None:
    def firing() -> list[str]:
        alerts = get(watched.prometheus_url, "alerts")["alerts"]
        return [alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"]

    assert firing() == []
    publish(watched.store, spoil=change_byte)
    wait_until(lambda: firing() != [])
    assert firing() == ["DtemServeVersionRefused"]


@pytest.mark.container
def test_without_a_gpu_it_has_no_target_and_no_alert(watched: Watched, tmp_path: Path) -> None:
    with run_prometheus(tmp_path / "prometheus", watched.server.port) as url:
        wait_until(lambda: bool(ask(url, "up")))
        assert [target["labels"]["job"] for target in get(url, "targets")["activeTargets"]] == ["dtem-serve"]
        gpu = [each for each in dashboard_queries() if each.needs_gpu]
        assert len(gpu) == 4
        assert [ask(url, each.expr) for each in gpu] == [[], [], [], []]
        assert "DtemServeGpuUnseen" not in [alert["labels"]["alertname"] for alert in get(url, "alerts")["alerts"]]
