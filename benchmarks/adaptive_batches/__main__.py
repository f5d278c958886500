"""Compare rules for batches of images that keep different numbers of tokens: throughput and agreement.

`python -m benchmarks.adaptive_batches --published model_store/reference/5 --policy atm
--out docs/results/adaptive-batches`
Every rule runs the same images, interleaved in one process. The baseline is one image per batch.
- padded: each image keeps its own tokens; absent rows are masked. This rule is exported and served.
- sorted: padded, with batches of images of similar roughness (differences of neighbouring pixels).
- oracle: padded, with images sorted by their actual GMACs, the upper bound for sorting.
- min: all images of a batch merge the same number of tokens in each block: that of the image with
  the fewest pairs above the threshold. Each image merges its best pairs.
- mean: the same with the rounded mean, so that pairs below the threshold merge too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.adaptive_batches.measure import measure
from benchmarks.adaptive_batches.report import tables
from benchmarks.options import integers, positive_integer
from benchmarks.report import Benchmark, run_benchmark
from training.cli.options import ModelOptions


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", type=Path, required=True, help="a version in the store")
    parser.add_argument("--data", default=ModelOptions.data, help="'digits' or a folder with one subfolder per class")
    parser.add_argument("--n-images", type=positive_integer, default=192)
    parser.add_argument("--policy", default="atm")
    parser.add_argument("--batches", type=integers, default=[8, 32])
    parser.add_argument("--rounds", type=positive_integer, default=7)


BENCHMARK = Benchmark(
    name="adaptive_batches",
    title="Batches under an adaptive policy",
    summary="Throughput of several batching rules relative to one image per batch, and agreement with its results.",
    add_options=add_options,
    measure=measure,
    tables=tables,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
