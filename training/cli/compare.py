"""Compare rows of evaluations image by image: a table, a JSON file and a plot of the differences.

DTEM against ToMe, at every rate that one evaluation has of both:
  python -m training.cli.compare docs/results/policies.json --out docs/results/dtem-tome

Two models on the same images, every rate of the second against the unmerged first:
  python -m training.cli.compare runs/backbone/policies.json runs/end-to-end/policies.json --base none --other dtem
    --out runs/end-to-end/comparison
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.cli.command import report, run_command
from training.evaluate.comparison import compare, markdown, plot, write_json
from training.evaluate.results import read_evaluation, with_suffix


def main(arguments: list[str] | None = None) -> int:
    return run_command("comparison", __doc__, _add_options, _compare, arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("evaluation", type=Path, help="JSON file of training.cli.evaluate with the base")
    parser.add_argument("another", type=Path, nargs="?", help="JSON file with the other; default: the same file")
    parser.add_argument(
        "--base",
        default="tome",
        help="a policy (compared at equal r), or one row (none, tome-r8, …) to compare all others with; default: tome",
    )
    parser.add_argument(
        "--other", default="dtem", help="comma-separated policies or rows, e.g. dtem,random or dtem-r8; default: dtem"
    )
    parser.add_argument("--out", type=Path, required=True, help="writes <out>.json, <out>.md and <out>.png")


def _compare(options: argparse.Namespace) -> None:
    base = read_evaluation(options.evaluation)
    other = read_evaluation(options.another) if options.another else base
    found = compare(base, other, options.base, options.other)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, base.about, other.about, with_suffix(options.out, ".json"))
    table = markdown(found)
    title = f"{options.other} compared with {options.base}"
    summary = "Paired differences of top-1 on the same images."
    with_suffix(options.out, ".md").write_text(report(title, summary, options.command_line, table))
    models = " against ".join(dict.fromkeys(str(about.get("model")) for about in (other.about, base.about)))
    n_images, dataset = found[0].n_images, base.about.get("dataset")
    plot(found, with_suffix(options.out, ".png"), f"{models}, {n_images} images of {dataset}")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
