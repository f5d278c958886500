"""Dashboard: the rows and variables, built into the JSON that Grafana reads. `python -m deploy.grafana` writes it."""

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from deploy.grafana import state, traffic
from deploy.grafana.panels import SOURCE, Row

FILE = Path(__file__).parent / "dashboards/dtem-serve.json"
UID = "dtem-serve"
# Grafana migrates panels without a plugin version as if they were old.
GRAFANA = "13.2.3"


def rows() -> list[Row]:
    return [
        Row("Overview", traffic.overview()),
        Row("Latency", traffic.latency()),
        Row("Throughput", traffic.throughput()),
        Row("Merging and compute", traffic.merging()),
        Row("Batches and queue", state.queueing()),
        Row("Refusals and degradation", state.refusals()),
        Row("Process", state.process()),
        Row("GPU", state.gpu(), is_collapsed=True),
    ]


def build() -> dashboard.Dashboard:
    board = dashboard.Dashboard("dtem-serve").uid(UID).tags(["dtem-serve"]).readonly()
    board = board.description("Vision Transformer inference with a token merging rate per request.")
    board = board.time("now-30m", "now").refresh("10s").tooltip(model.DashboardCursorSync.CROSSHAIR)
    for name, label in (("model", "Model"), ("policy", "Policy"), ("r", "r")):
        board = board.with_variable(_variable(name, label))
    for row in rows():
        board = _add(board, row)
    return board


def _variable(name: str, label: str) -> dashboard.QueryVariable:
    """Build a selector of a label's values. `All` includes the empty value."""
    query = f"label_values(dtem_images_total, {name})"
    fields: dict[str, object] = {"qryType": 1, "label": name, "metric": "dtem_images_total", "query": query}
    everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query(fields | {"refId": name})
    variable = variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True)
    variable = variable.include_all(True).all_value(".*").current(everything)
    return variable.sort(model.VariableSort.NUMERICAL_ASC if name == "r" else model.VariableSort.ALPHABETICAL_ASC)


def _add(board: dashboard.Dashboard, row: Row) -> dashboard.Dashboard:
    """Append a row. A collapsed row contains its panels; the panels of an open row follow it."""
    if row.is_collapsed:
        header = dashboard.Row(row.title).collapsed(True)
        for panel in row.panels:
            header = header.with_panel(panel.builder)
        return board.with_row(header)
    board = board.with_row(dashboard.Row(row.title))
    for panel in row.panels:
        board = board.with_panel(panel.builder)
    return board


def render() -> str:
    """Return the file's content. Panel ids follow the order of the panels; links to a panel use them."""
    document: dict[str, Any] = json.loads(json.dumps(build().build(), cls=JSONEncoder))
    for variable in document["templating"]["list"]:
        # The builder adds the fields of interval variables to all kinds.
        for name in ("auto", "auto_min", "auto_count"):
            variable.pop(name, None)
    panels = [nested for panel in document["panels"] for nested in (panel, *panel.get("panels", []))]
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
        if panel["type"] != "row":
            panel["pluginVersion"] = GRAFANA
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
