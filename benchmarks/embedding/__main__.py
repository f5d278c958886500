"""Measure the cost of DTEM over ToMe at the same rate: GMACs, and latency of the exported graphs.

`python -m benchmarks.embedding --published model_store/reference/5 --out docs/results/embedding-cost`
Both graphs run interleaved in one process. On a busy machine add `--clock cpu`. The targets are at
most 1.5 % of GMACs and 2 % of latency.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.embedding.measure import measure
from benchmarks.embedding.report import draw_figure, tables
from benchmarks.options import integers, positive_integer
from benchmarks.report import Benchmark, run_benchmark
from benchmarks.timing import CLOCKS


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--published",
        type=Path,
        default=Path("model_store/reference/5"),
        help="a version with policies tome and dtem",
    )
    parser.add_argument("--rates", type=integers, default=[8, 16])
    parser.add_argument("--batches", type=integers, default=[1, 8])
    parser.add_argument("--rounds", type=positive_integer, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")


BENCHMARK = Benchmark(
    name="embedding",
    title="Cost of the embedding",
    summary="GMACs and latency of policy dtem relative to tome at the same rate.",
    add_options=add_options,
    measure=measure,
    tables=tables,
    draw_figure=draw_figure,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
