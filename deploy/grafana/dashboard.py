"""The dashboard, built: `python -m deploy.grafana.dashboard` writes dashboards/dtem-serve.json, which Grafana reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from deploy.grafana import state, traffic
from deploy.grafana.panels import SOURCE

FILE = Path(__file__).parent / "dashboards/dtem-serve.json"
UID = "dtem-serve"


class Row(NamedTuple):
    title: str
    panels: Sequence[Any]  # builders of panels
    is_collapsed: bool = False


def build() -> dashboard.Dashboard:
    board = dashboard.Dashboard("dtem-serve").uid(UID).tags(["dtem-serve"]).readonly()
    board = board.description(
        "Vision Transformers whose callers choose the rate: what they ask for, get, and wait for."
    )
    board = board.time("now-30m", "now").refresh("10s").tooltip(model.DashboardCursorSync.CROSSHAIR)
    for name, label in (("model", "Model"), ("policy", "Policy"), ("r", "Rate")):
        board = board.with_variable(_variable(name, label))
    for row in _rows():
        board = _add(board, row)
    return board


def _rows() -> list[Row]:
    return [
        Row("At a glance", traffic.glance()),
        Row("Latency", traffic.latency()),
        Row("Throughput", traffic.throughput()),
        Row("Rates", traffic.rates()),
        Row("Batches and queue", state.queueing()),
        Row("Refusals", state.refusals()),
        Row("Process", state.process()),
        Row("GPU", state.gpu(), is_collapsed=True),
    ]


def _variable(name: str, label: str) -> dashboard.QueryVariable:
    """Let the reader choose among the values of a label; all of them includes the empty one."""
    query = f"label_values(dtem_images_total, {name})"
    asked: dict[str, object] = {"qryType": 1, "label": name, "metric": "dtem_images_total", "query": query}
    everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(asked | {"refId": name})
    variable = variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True)
    variable = variable.include_all(True).all_value(".*").current(everything)
    return variable.sort(model.VariableSort.NUMERICAL_ASC if name == "r" else model.VariableSort.ALPHABETICAL_ASC)


def _add(board: dashboard.Dashboard, row: Row) -> dashboard.Dashboard:
    """Put a row below the others; a collapsed one holds its panels, an open one stands before them."""
    if row.is_collapsed:
        header = dashboard.Row(row.title).collapsed(True)
        for panel in row.panels:
            header = header.with_panel(panel)
        return board.with_row(header)
    board = board.with_row(dashboard.Row(row.title))
    for panel in row.panels:
        board = board.with_panel(panel)
    return board


def render() -> str:
    """Return the file's content. Panels are numbered in their order: an id is where a link to a panel leads."""
    document: dict[str, Any] = json.loads(json.dumps(build().build(), cls=JSONEncoder))
    for variable in document["templating"]["list"]:
        for name in ("auto", "auto_min", "auto_count"):  # of other kinds of variables; the builder adds them to all
            variable.pop(name, None)
    panels = [nested for panel in document["panels"] for nested in (panel, *panel.get("panels", []))]
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
