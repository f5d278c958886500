"""Measure what only a GPU can show, in one call of minutes: `python -m benchmarks.gpu`, or `make gpu-report`.

Every step is a process of its own with a limit of its own. <out>.json and <out>.md are written anew after each, so a
run that is cut short leaves what it had; `python -m benchmarks.gpu.page <out>.json` draws them again. `--smoke` runs
the same steps with tiny models on a CPU, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from app.backends import ENGINES
from benchmarks.gpu.page import write_page
from benchmarks.gpu.step import STEPS
from deploy.local.process import ROOT

# A step is not begun with less.
LEAST_SECONDS = 10.0
Report = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A step, of a model or of none. needs: another step's key without which it is not begun."""

    name: str
    limit_seconds: float
    model: str = ""
    needs: str = ""

    @property
    def key(self) -> str:
        return f"{self.name} {self.model}".strip()


def plan(models: list[str], names: Sequence[str] = tuple(STEPS)) -> list[Step]:
    """List the steps of these names, the first model's first: what comes last is the first to be lost."""
    steps = [Step("machine", 90), Step("tests", 90)]
    for index, model in enumerate(models):
        steps.append(Step("offline", 110, model))
        steps += [Step("training", 60, model)] if index == 0 else []
        steps += [Step("store", 120, model), Step("service", 110, model, needs=f"store {model}")]
    return [step for step in steps if step.name in names]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 where every step is done, 1 where one is not; the report says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--seconds", type=float, default=460, help="limit for all steps together")
    parser.add_argument("--out", type=Path, help="<out>.json, .md, .png and .log; default docs/results/gpu")
    parser.add_argument("--engine", choices=ENGINES, default="torchscript", help="of the service; default %(default)s")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: all")
    options = parser.parse_args(arguments)
    size = "smoke" if options.smoke else "full"
    out = options.out or ROOT / ("runs/gpu-smoke" if options.smoke else "docs/results/gpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    models = ["deit-s"] if options.smoke else ["deit-s", "vit-b"]
    report: Report = {
        "size": size,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "engine": options.engine,
        "steps": [],
    }
    ends_at = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as work, out.with_suffix(".log").open("wb") as log:
        for step in plan(models, options.steps):
            entry = run_step(step, report, size, options.engine, Path(work), log, ends_at - time.monotonic())
            report["steps"].append(entry)
            write_page(report, out, is_final=False)
            print(f"{entry['step']}: {entry['outcome']}, {entry['seconds']:.0f} s {entry['reason']}", flush=True)
    print(write_page(report, out, is_final=True))
    return int(any(entry["outcome"] != "done" for entry in report["steps"]))


def run_step(
    step: Step, report: Report, size: str, engine: str, work: Path, log: IO[bytes], left_seconds: float
) -> Report:
    """Run a step and return its entry: outcome, reason, seconds and rows."""
    entry: Report = {"step": step.key, "outcome": "skipped", "reason": "", "seconds": 0.0, "rows": []}
    done = [other["step"] for other in report["steps"] if other["outcome"] == "done"]
    if step.needs and step.needs not in done:
        return {**entry, "reason": f"needs {step.needs}"}
    if left_seconds < LEAST_SECONDS:
        return {**entry, "reason": "no time left"}
    found = work / f"{step.key.replace(' ', '-')}.jsonl"
    found.touch()
    command = [sys.executable, "-m", "benchmarks.gpu.step", step.name, "--size", size, "--engine", engine]
    started_at, limit = time.monotonic(), min(step.limit_seconds, left_seconds)
    log.write(f"\n== {step.key}\n".encode())
    log.flush()
    process = subprocess.Popen(
        [*command, "--model", step.model, "--work", str(work), "--rows", str(found)],
        cwd=ROOT,
        env={**os.environ, **({"OMP_NUM_THREADS": "1"} if size == "smoke" else {})},  # threads that wait for each other
        stdout=log,
        stderr=subprocess.STDOUT,
        # So that a server it started ends with it.
        start_new_session=True,
    )
    outcome, reason = "done", ""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        outcome, reason = "cut short", f"took more than {limit:.0f} s"
    finally:
        _end(process)
    rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    if outcome == "done" and process.returncode:
        errors = [row["reason"] for row in rows if row["kind"] == "error"]
        outcome, reason = "failed", errors[-1] if errors else f"ended with {process.returncode}"
    return {**entry, "outcome": outcome, "reason": reason, "seconds": time.monotonic() - started_at, "rows": rows}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started, which may have outlived it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
