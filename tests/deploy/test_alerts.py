"""Every alert fires when it should and only then, and has a section in the runbook."""

import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.queries import ALERTS, DASHBOARD, alert_queries, panels

TESTS = ALERTS.with_name("alerts_test.yml")
ROOT = Path(__file__).parents[2]
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}


def headings(file: Path) -> list[str]:
    """List the anchors of a page's headings, as Git hosts generate them."""
    found = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in found]


def test_every_alert_has_a_firing_and_a_quiet_test_case() -> None:
    cases: dict[str, set[bool]] = defaultdict(set)
    for test in yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]:
        for case in test["alert_rule_test"]:
            cases[case["alertname"]].add(bool(case["exp_alerts"]))
    assert cases == {name: {True, False} for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_every_alert_has_a_severity_a_value_and_a_runbook_section(name: str) -> None:
    rule = RULES[name]
    assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    summary, description, runbook = (rule["annotations"][key] for key in ("summary", "description", "runbook"))
    assert "{{" in summary or "$value" in description
    assert len(description) > len(summary) > 10
    page, anchor = runbook.split("#")
    assert anchor == name.lower()
    assert anchor in headings(ROOT / page)


def test_runbook_has_no_section_for_a_removed_alert() -> None:
    about = {anchor for anchor in headings(ROOT / "docs/runbook.md") if anchor.startswith("dtemserve")}
    assert about == {name.lower() for name in RULES}


def test_runbook_names_existing_panels_and_rows() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    known = {name for row, panel in panels(board) for name in (row, panel["title"])}
    # Pages of Prometheus and Grafana.
    elsewhere = {"Alerts", "Alerting", "Targets", "Configuration"}
    named = re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", (ROOT / "docs/runbook.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert {" ".join(name.split()) for name in named} <= known | elsewhere


def test_alert_queries_separate_expressions_from_thresholds() -> None:
    queries = {query.title: query for query in alert_queries()}
    assert set(queries) == set(RULES)
    memory = queries["DtemServeMemory"]
    assert (memory.condition, memory.unit) == ("> 0.9", "percentunit")
    assert f"{memory.expr} {memory.condition}" == RULES["DtemServeMemory"]["expr"]


@pytest.mark.container
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_accepts(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
