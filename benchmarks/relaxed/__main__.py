"""Measure a training step through relaxed merging: time and peak memory.

`python -m benchmarks.relaxed --out docs/results/relaxed-cost` on a CPU. On a GPU add `--device cuda
--precision bfloat16 --architecture deit_small_patch16_224 --arguments '{}' --dim 64 --batch-size 256`.
The baselines are the plain ViT, and the formula of the grouping under autograd. Weights are random:
no result depends on their values.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.options import integers, positive_integer
from benchmarks.relaxed.measure import REFERENCE, measure
from benchmarks.relaxed.report import tables
from benchmarks.report import Benchmark, run_benchmark
from benchmarks.timing import CLOCKS


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", default="vit_tiny_patch16_224", help="a timm name")
    parser.add_argument("--arguments", type=json.loads, default=REFERENCE, help="JSON for timm.create_model")
    parser.add_argument("--dim", type=int, default=32, help="d', the width of the embedding")
    parser.add_argument("--n-tokens", type=int, default=197, help="tokens of the block whose grouping is timed")
    parser.add_argument("--rates", type=integers, default=[8, 16])
    parser.add_argument("--batch-size", type=positive_integer, default=32)
    parser.add_argument("--rounds", type=positive_integer, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads on the CPU")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="ignored on a GPU")


BENCHMARK = Benchmark(
    name="relaxed",
    title="Cost of relaxed merging in training",
    summary="Time and peak memory of a training step, and of the grouping of one block.",
    add_options=add_options,
    measure=measure,
    tables=tables,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(BENCHMARK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
