import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.settings import read_settings
from benchmarks.gpu import __main__ as report
from benchmarks.gpu import gpu_tests, page
from benchmarks.gpu.commit import UNKNOWN, read_commit
from benchmarks.gpu.kit import EXPORTER, SERVICE, TESTS, download_command, read_pins
from benchmarks.gpu.service import service_settings
from benchmarks.gpu.size import SIZES, SMOKE
from deploy.local.process import ROOT


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_smoke_runs_every_step(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    assert report.main(["--smoke", "--seconds", "200", "--out", str(out)]) == 0
    content = json.loads(out.with_suffix(".json").read_text())
    assert [step["outcome"] for step in content["steps"]] == ["done"] * len(report.plan(["deit-s"]))
    kinds = {row["kind"] for step in content["steps"] for row in step["rows"]}
    assert kinds >= {"machine", "forward", "training step", "export", "parity", "load", "bare loop", "test"}
    for row in page.rows_of(content, "parity"):
        assert row["logit_difference"] < 1e-4
        assert row["probability_difference"] < 1e-4
    for row in page.rows_of(content, "load"):
        assert set(row["statuses"]) == {"200"}
    assert "smoke run" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_step_that_takes_too_long_is_ended_and_its_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LEAST_SECONDS", 0.0)
    row = json.dumps({"kind": "machine", "card": None})
    code = f"import sys, time; open(sys.argv[-1], 'w').write({row + chr(10)!r} + '{{\"kind\": '); time.sleep(60)"
    start = subprocess.Popen

    def start_other(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", code, *command], **options)

    monkeypatch.setattr(subprocess, "Popen", start_other)
    with (tmp_path / "log").open("wb") as log:
        entry = report.run_step(report.Step("machine", 3), {"steps": []}, "smoke", "torchscript", tmp_path, log, 100)
    assert (entry["outcome"], entry["reason"]) == ("cut short", "took more than 3 s")
    assert entry["rows"] == [json.loads(row)]


def test_a_step_is_skipped_with_its_reason(tmp_path: Path) -> None:
    step = report.Step("service", 9, "deit-s", needs="store deit-s")
    failed: dict[str, Any] = {"steps": [{"step": "store deit-s", "outcome": "failed"}]}
    with (tmp_path / "log").open("wb") as log:
        assert (
            report.run_step(step, failed, "smoke", "torchscript", tmp_path, log, 100)["reason"] == "needs store deit-s"
        )
        done: dict[str, Any] = {"steps": [{"step": "store deit-s", "outcome": "done"}]}
        assert report.run_step(step, done, "smoke", "torchscript", tmp_path, log, 1)["reason"] == "no time left"


@pytest.mark.parametrize("size", SIZES)
def test_the_service_accepts_its_settings(size: str) -> None:
    settings = service_settings(SIZES[size])
    assert read_settings({f"DTEM_{name.upper()}": value for name, value in settings.items()}).engine == "torchscript"


def test_a_report_without_rows_is_still_a_page(tmp_path: Path) -> None:
    step = {
        "step": "machine",
        "outcome": "failed",
        "reason": "RuntimeError: no | such\ncard",
        "seconds": 1.0,
        "rows": [],
    }
    text = page.write_page({"size": "full", "date": "2026-11-27", "steps": [step]}, tmp_path / "gpu", is_final=True)
    assert "| machine | failed | RuntimeError: no / such card | 1 |" in text


def test_failed_tests_are_run_again_with_warnings_as_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(work: Path, options: list[str]) -> list[dict[str, Any]]:
        asked.append(options)
        return [{"kind": "test", "outcome": "passed" if options else "failed"}]

    monkeypatch.setattr(gpu_tests, "_run", run)
    found = [row["outcome"] for row in gpu_tests.rows(SMOKE, "", tmp_path)]
    assert (asked, found) == ([[], ["-W", "default"]], ["failed", "passed"])


def test_every_wheel_of_the_kit_is_pinned() -> None:
    pins = read_pins((ROOT / "constraints.txt").read_text())
    command = download_command(pins, Path("kit"))
    assert all(f"{name}=={pins[name]}" in command for name in (*SERVICE, *EXPORTER, *TESTS))
    assert "3.12" in command


def test_the_commit_is_the_kit_s_where_there_is_no_git(tmp_path: Path) -> None:
    assert read_commit(tmp_path) == UNKNOWN
    (tmp_path / ".gpu-kit").mkdir()
    (tmp_path / ".gpu-kit" / "commit").write_text("0" * 40 + "\n")
    assert read_commit(tmp_path) == "0" * 40
