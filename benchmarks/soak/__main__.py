"""Soak test: mixed traffic for minutes, below saturation, while new versions are published.

`python -m benchmarks.soak --minutes 5 --load 0.8 --out docs/results/soak`
Every kind of request has a set of allowed statuses, and every answer is checked against its
request. Two new versions are published during the run, and the old ones are removed. At the end,
the requests that the server counted must match those that the clients counted, and memory must not
have grown. The exit status is 1 if there is a violation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import add_setting_option, positive_integer, positive_number
from benchmarks.report import Benchmark, run_benchmark
from benchmarks.soak.measure import measure
from benchmarks.soak.report import draw_figure, tables


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/5"))
    parser.add_argument("--minutes", type=positive_number, default=5)
    parser.add_argument("--load", type=positive_number, default=0.8, help="relative to the capacity for this mixture")
    parser.add_argument(
        "--warm-up-seconds", type=positive_number, default=10, help="at saturation, to measure capacity"
    )
    parser.add_argument("--n-images", type=positive_integer, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-refused", type=float, default=0.01, help="share of requests without a deadline")
    parser.add_argument("--max-growth-mb", type=float, default=64, help="memory growth from first to last minute")
    add_setting_option(parser)


BENCHMARK = Benchmark(
    name="soak",
    title="Soak test",
    summary="Mixed traffic with two reloads: statuses and latencies by kind of request, memory over time, violations.",
    add_options=add_options,
    measure=measure,
    tables=tables,
    draw_figure=draw_figure,
    has_failed=lambda content: bool(content["violations"]),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
