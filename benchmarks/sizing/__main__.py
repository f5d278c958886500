"""Measure what the Compose stack carries within the limits of docker-compose.yml.

`python -m benchmarks.sizing --out docs/results/sizing`
Reports requests/s of each variant, the time until the stack is ready, and its memory at rest and
under load. Needs a Docker engine and wrk, which posts JPEGs of the reference task to the published
port and shares the cores with the containers. Each round starts a new stack.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import positive_integer
from benchmarks.report import Benchmark, run_benchmark
from benchmarks.sizing.measure import measure
from benchmarks.sizing.report import draw_figure, tables


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/5"), help="the version served")
    parser.add_argument("--policies", default="none,dtem,adaptive-dtem", help="comma-separated")
    parser.add_argument("--seconds", type=positive_integer, default=5, help="per variant, round and concurrency")
    parser.add_argument("--rounds", type=positive_integer, default=3)
    parser.add_argument("--connections", type=positive_integer, default=32)
    parser.add_argument("--n-images", type=positive_integer, default=64, help="number of distinct images")


BENCHMARK = Benchmark(
    name="sizing",
    title="Sizing of the Compose stack",
    summary="Requests/s and latency by variant, start-up time and memory, within the limits of docker-compose.yml.",
    add_options=add_options,
    measure=measure,
    tables=tables,
    draw_figure=draw_figure,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
