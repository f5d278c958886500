"""Every alert fires when it should and not otherwise, and the runbook says what to do."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.queries import ALERTS, alert_queries

TESTS = ALERTS.with_name("alerts_test.yml")
ROOT = Path(__file__).parents[2]
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}


def headings(file: Path) -> list[str]:
    """List the anchors of a page's headings, as Git hosts make them."""
    found = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in found]


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    cases: dict[str, set[bool]] = defaultdict(set)
    for test in yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]:
        for case in test["alert_rule_test"]:
            cases[case["alertname"]].add(bool(case["exp_alerts"]))
    assert cases == {name: {True, False} for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_every_alert_says_what_is_wrong_with_its_figure_and_where_to_read_on(name: str) -> None:
    rule = RULES[name]
    assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    summary, description, runbook = (rule["annotations"][key] for key in ("summary", "description", "runbook"))
    assert "{{" in summary or "$value" in description
    assert len(description) > len(summary) > 10
    page, anchor = runbook.split("#")
    assert anchor == name.lower()
    assert anchor in headings(ROOT / page)


def test_the_runbook_has_no_alert_that_is_gone() -> None:
    about = {anchor for anchor in headings(ROOT / "docs/runbook.md") if anchor.startswith("dtemserve")}
    assert about == {name.lower() for name in RULES}


def test_alerts_are_read_with_their_thresholds() -> None:
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
def test_promtool_agrees(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
