"""Measure the overhead of the service over the bare model, against a bare loop and plain FastAPI.

`python -m benchmarks.overhead --published model_store/reference/5 --rates 0,16 --out docs/results/overhead`
Reports requests/s at saturation, CPU time per request, and the latency of a single client, in
interleaved rounds. All three arms run the same graph with one thread per core and decode with the
same code. The client of the servers is wrk (apt-get install wrk). The bare loop has no client, so
the CPU time of wrk counts against the servers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import add_setting_option, positive_integer
from benchmarks.overhead.measure import measure
from benchmarks.overhead.report import draw_figure, tables
from benchmarks.report import Benchmark, run_benchmark
from training.cli.options import parse_rates


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/5"))
    parser.add_argument("--policy", default="tome")
    parser.add_argument("--rates", type=parse_rates, default=(0, 16))
    parser.add_argument("--seconds", type=positive_integer, default=10, help="per arm and round")
    parser.add_argument("--rounds", type=positive_integer, default=5)
    parser.add_argument("--connections", type=positive_integer, default=32)
    parser.add_argument("--n-images", type=positive_integer, default=64, help="number of distinct images")
    add_setting_option(parser)


BENCHMARK = Benchmark(
    name="overhead",
    title="Overhead of the service",
    summary="Requests/s at saturation and the latency of a single client, of the service, of plain FastAPI and of a "
    "bare loop around the same graph.",
    add_options=add_options,
    measure=measure,
    tables=tables,
    draw_figure=draw_figure,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
