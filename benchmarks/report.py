"""Run a benchmark: parse options, measure, print the tables, write the report."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.errors import MeasurementError
from deploy.local.process import LaunchError
from training.cli import command

Content = dict[str, Any]
FAILED = 1


@dataclass(frozen=True)
class Benchmark:
    """A question, its measurement and its report.

    name: of the folder. summary: one sentence under the title.
    measure: returns the content of the JSON file. tables and draw_figure read nothing else.
    has_failed: whether the content shows a failure, for benchmarks that are tests as well.
    """

    name: str
    title: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], Content]
    tables: Callable[[Content], str]
    draw_figure: Callable[[Content], Figure] | None = None
    has_failed: Callable[[Content], bool] = lambda content: False


def run_benchmark(benchmark: Benchmark, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run the command of a benchmark.

    Exit status: 0 measured; 1 measured and failed; 2 refused; 130 interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments

    def add_options(parser: argparse.ArgumentParser) -> None:
        benchmark.add_options(parser)
        files = "<out>.md, <out>.json and <out>.png" if benchmark.draw_figure else "<out>.md and <out>.json"
        parser.add_argument("--out", type=Path, help=f"write the report to {files}")
        parser.add_argument("--render", type=Path, metavar="JSON", help="report an earlier measurement again")

    def run(options: argparse.Namespace) -> int:
        if options.render:
            content = json.loads(options.render.read_text())
        else:
            command_line = shlex.join(["python", "-m", f"benchmarks.{benchmark.name}", *given])
            content = {"command": command_line, **benchmark.measure(options)}
        page = make_page(benchmark, content)
        print(page)
        if options.out:
            write_report(options.out, page, content, benchmark.draw_figure)
        return FAILED if benchmark.has_failed(content) else 0

    refusals = (MeasurementError, LaunchError)
    return command.run_command(benchmark.name, description, add_options, run, arguments, refusals=refusals)


def make_page(benchmark: Benchmark, content: Content) -> str:
    return command.report(benchmark.title, benchmark.summary, content["command"], benchmark.tables(content))


def write_report(
    out: Path, page: str, content: Content, draw_figure: Callable[[Content], Figure] | None = None
) -> None:
    """Write <out>.md and <out>.json, and <out>.png if there is a figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(page)
    out.with_suffix(".json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    if draw_figure:
        draw_figure(content).savefig(out.with_suffix(".png"), dpi=150)


def describe_settings(settings: Sequence[Sequence[str]]) -> str:
    """Return the `--setting` options as text for a report."""
    return ", ".join(f"{name}={value}" for name, value in settings) or "defaults"
