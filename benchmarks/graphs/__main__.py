"""Time every graph of a published version, interleaved in one process, with its accuracy.

`python -m benchmarks.graphs --published model_store/reference/5 --batches 1,8 --rounds 30`
Speeds are medians over rounds. A round runs the same test images through each graph, in batches,
since the cost of an adaptive policy depends on the images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.graphs.measure import measure
from benchmarks.graphs.report import tables
from benchmarks.options import integers, positive_integer
from benchmarks.report import Benchmark, run_benchmark


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", type=Path, default=Path("model_store/reference/5"))
    parser.add_argument("--batches", type=integers, default=[1, 8])
    parser.add_argument("--rounds", type=positive_integer, default=30)
    parser.add_argument("--data", default="digits", help="a dataset, or a folder with one subfolder per class")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")


BENCHMARK = Benchmark(
    name="graphs",
    title="Speed of the graphs",
    summary="Images/s of each float32 ONNX graph without the service, and relative to r = 0 in the same round.",
    add_options=add_options,
    measure=measure,
    tables=tables,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
