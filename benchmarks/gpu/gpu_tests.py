"""The tests marked `gpu`, with the reason of each that does not pass.

Only their files are collected: others need packages that a GPU machine may lack. Warnings are errors, as ever; where
tests fail so, they run once more with warnings as warnings, and the report has both.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.size import Size
from deploy.local.process import ROOT

MARK = "pytest.mark.gpu"
MAX_CHARACTERS = 400
Row = dict[str, Any]


def rows(size: Size, model: str, work: Path) -> Iterator[Row]:
    strict = _run(work, [])
    yield from strict
    if any(row["outcome"] in ("failed", "error") for row in strict):
        yield from _run(work, ["-W", "default"])


def _run(work: Path, options: list[str]) -> list[Row]:
    found = work / "gpu-tests.xml"
    found.unlink(missing_ok=True)
    files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_*.py")) if _is_marked(file)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={found}"]
    done = subprocess.run([*command, *options, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    warnings = "default" if options else "error"
    cases = list(ElementTree.parse(found).getroot().iter("testcase")) if found.is_file() else []
    if not cases:
        reason = f"ended with {done.returncode}: {(done.stderr or done.stdout)[-MAX_CHARACTERS:]}"
        about = {"kind": "test", "warnings": warnings, "test": "pytest", "outcome": "error"}
        return [{**about, "reason": reason, "seconds": 0.0}]
    return [{"kind": "test", "warnings": warnings, **_describe(case)} for case in cases]


def _is_marked(file: Path) -> bool:
    return MARK in file.read_text(encoding="utf-8")


def _describe(case: ElementTree.Element) -> Row:
    about = {"test": f"{case.get('classname')}::{case.get('name')}", "seconds": float(case.get("time", "0"))}
    for outcome, name in (("failed", "failure"), ("error", "error"), ("skipped", "skipped")):
        if (found := case.find(name)) is not None:
            return {**about, "outcome": outcome, "reason": (found.get("message") or "")[:MAX_CHARACTERS]}
    return {**about, "outcome": "passed", "reason": ""}
