"""Measure effective accuracy under overload: the share of requests with a correct answer in time.

`python -m benchmarks.overload --published model_store/reference/5 --policy tome --deadline-ms 250
--out docs/results/overload`
Compares each fixed rate with the adaptive engine, which chooses the rate by the deadline. Arrivals
are a Poisson process. Load 1 is the capacity at r = 0. Every arm is a server that sheds load by the
same deadline; the store of a fixed arm has a single variant. All arms receive the same arrivals and
images, and run interleaved. An answer is in time if its last byte arrives within the deadline,
by the client's clock. Refused, late and lost requests count as incorrect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import add_setting_option, positive_integer, positive_number, positive_numbers
from benchmarks.overload.measure import measure
from benchmarks.overload.report import draw_figure, tables
from benchmarks.report import Benchmark, run_benchmark


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/5"))
    parser.add_argument("--policy", default="tome", help="a policy with rates")
    parser.add_argument("--deadline-ms", type=positive_number, default=250)
    parser.add_argument(
        "--loads", type=positive_numbers, default=[0.5, 0.75, 1, 1.5, 2, 3, 4], help="relative to the capacity at r = 0"
    )
    parser.add_argument("--seconds", type=positive_integer, default=15, help="per arm, load and round")
    parser.add_argument("--rounds", type=positive_integer, default=3)
    parser.add_argument("--connections", type=positive_integer, default=32, help="to measure capacity")
    parser.add_argument("--n-images", type=positive_integer, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-lag-ms", type=float, default=10, help="discard points where the client's p99 lag exceeds this"
    )
    add_setting_option(parser)


BENCHMARK = Benchmark(
    name="overload",
    title="Effective accuracy under overload",
    summary="Share of all requests offered that get a correct answer within the deadline, by load.",
    add_options=add_options,
    measure=measure,
    tables=tables,
    draw_figure=draw_figure,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
