"""Reports: a table, the figures behind it and a picture, under one name."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.served import MeasurementError, n_cores


@dataclass(frozen=True)
class Spread:
    """Of some rounds: the median, the least and the most."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 1, unit: str = "") -> str:
        median, least, most = (f"{value:.{digits}f}" for value in (self.median, self.least, self.most))
        return f"{median}{unit} ({least} … {most})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return it by linear interpolation, None of no values."""
    return float(np.percentile(values, percent)) if len(values) else None


def write_report(out: Path, table: str, content: dict[str, Any], figure: Figure) -> None:
    """Write <out>.md, <out>.json and <out>.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(table)
    out.with_suffix(".json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    figure.savefig(out.with_suffix(".png"), dpi=150)


def report(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    draw_figure: Callable[[dict[str, Any]], Figure],
) -> int:
    """Measure, print the table, and write the report to `options.out`, if there is one.

    Returns the exit status: 1, with one line that says why, where a figure would mislead.
    """
    try:
        content = measure(options)
    except (MeasurementError, ValueError) as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    table = markdown(content)
    print(table)
    if options.out:
        write_report(options.out, table, content, draw_figure(content))
    return 0


def describe_host() -> dict[str, Any]:
    """Say where the figures were measured, and what else ran there."""
    return {"cores": n_cores(), "machine": platform.machine(), "python": platform.python_version(), "load": load()}


def load() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def numbers(text: str) -> list[float]:
    """Read `0.5,1,2`, all positive."""
    values = [float(part) for part in text.split(",")]
    if not all(value > 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers above 0 are wanted")
    return values


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 is wanted")
    return value
