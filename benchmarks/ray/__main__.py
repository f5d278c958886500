"""Compare running servers: requests/s of 32 connections, and latency of a single client.

`python -m benchmarks.ray --ports 8000,9000 --names process,ray`
Start the servers first, e.g. a single process and a Ray cluster (deploy/ray/README.md). The rounds
are interleaved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.options import integers, positive_integer
from benchmarks.ray.measure import measure
from benchmarks.ray.report import tables
from benchmarks.report import Benchmark, run_benchmark


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ports", type=integers, default=[8000, 9000], help="on 127.0.0.1; the first is the baseline")
    parser.add_argument("--names", default="process,ray", help="one per port")
    parser.add_argument("--rounds", type=positive_integer, default=3)
    parser.add_argument("--seconds", type=positive_integer, default=8, help="per server and round")


BENCHMARK = Benchmark(
    name="ray",
    title="Overhead of Ray",
    summary="Requests/s at saturation relative to the first server, and latency of a single client.",
    add_options=add_options,
    measure=measure,
    tables=tables,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
