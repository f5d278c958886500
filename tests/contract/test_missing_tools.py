"""Tests whose tools are missing are skipped with the reason, or fail where that is asked for."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTAINER_TEST = "tests/deploy/test_alerts.py"
REASON = (
    "missing here: a Docker engine that answers, Docker Compose, prometheus, promtool, kubectl, wrk, nginx, haproxy, "
    "java, node, curl"
)


def run_without_tools(*arguments: str) -> tuple[int, str]:
    """Run a file of container tests as if no program was installed. Returns the exit status and the output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "container", CONTAINER_TEST, *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_container_tests_are_skipped_where_their_tools_are_missing() -> None:
    status, output = run_without_tools()
    assert status == 0, output
    assert REASON in output
    assert "passed" not in output


def test_container_tests_fail_where_their_tools_are_missing_and_required() -> None:
    status, output = run_without_tools("--require-tools")
    assert status == 1, output
    assert REASON in output
    assert "skipped" not in output
