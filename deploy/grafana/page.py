"""The panels as a table: `python -m deploy.grafana.table` writes docs/dashboard.md from the dashboard's file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.grafana.dashboard import FILE

PAGE = Path(__file__).parents[2] / "docs/dashboard.md"
HEAD = """# The dashboard

Made by `python -m deploy.grafana.table` from [dtem-serve.json](../deploy/grafana/dashboards/dtem-serve.json), which
`python -m deploy.grafana.dashboard` builds and Grafana reads when it starts. At an alert: [runbook.md](runbook.md).

The lists at the top choose models, policies and rates; policies that choose for each image have `adapts` as their rate.
`$__rate_interval` is at least four scrapes. A threshold gives its colour from that value on. The row *GPU* is closed at
first: it needs dcgm-exporter.

![all panels but the GPU's](dashboard.png)

Drawn without Grafana by `python -m tests.deploy.draw_dashboard`: what a real Prometheus answered to the same queries
about a real service, the reference model under every kind of request. A minute of few callers, one of many, one of few,
on 2 cores that others used too: it shows what the panels show, not how fast the service is.
"""
UNITS = {
    "none": "",
    "s": "seconds",
    "dtdurations": "duration",
    "reqps": "requests/s",
    "percentunit": "%",
    "percent": "%",
    "celsius": "°C",
    "watt": "W",
}


def render(dashboard: dict[str, Any]) -> str:
    return "\n".join([HEAD, *_lines(dashboard)])


def _lines(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield f"## {panel['title']}\n"
            yield "| panel | what it says | query | unit | thresholds |\n|---|---|---|---|---|"
            yield from map(_line, panel.get("panels", []))
        else:
            yield _line(panel)
        if _ends_row(dashboard, panel):
            yield ""


def _ends_row(dashboard: dict[str, Any], panel: dict[str, Any]) -> bool:
    following = dashboard["panels"][dashboard["panels"].index(panel) + 1 :]
    return not following or following[0]["type"] == "row"


def _line(panel: dict[str, Any]) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    queries = "<br>".join(f"`{target['expr']}`" for target in panel["targets"])
    colours = [_step(step, defaults["unit"]) for step in defaults["thresholds"]["steps"][1:]]
    for mapping in defaults.get("mappings", []):
        colours += [f"{key}: {word['text']}, {word['color']}" for key, word in mapping["options"].items()]
    cells = (panel["title"], panel["description"], queries, unit_name(defaults["unit"]), "; ".join(colours))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _step(step: dict[str, Any], unit: str) -> str:
    value = f"{100 * step['value']:g} %" if unit == "percentunit" else f"{step['value']:g}"
    return f"{step['color']} from {value}"


def unit_name(unit: str) -> str:
    """Say Grafana's name of a unit in words."""
    return UNITS.get(unit, unit.removeprefix("suffix:").removeprefix("si:"))


if __name__ == "__main__":
    PAGE.write_text(render(json.loads(FILE.read_text(encoding="utf-8"))), encoding="utf-8")
