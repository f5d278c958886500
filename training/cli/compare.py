"""Compare two rows of evaluations image by image: a table, a JSON file and a picture of the differences.

One evaluation, DTEM against ToMe at every rate that both have:
`python -m training.cli.compare docs/results/policies.json --out docs/results/dtem-tome`
Two models on the same images, every rate of the second against the first without merging:
`python -m training.cli.compare runs/backbone/policies.json runs/end-to-end/policies.json --base none --other dtem
 --out runs/end-to-end/comparison`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.evaluate.comparison import compare, markdown, plot, write_json
from training.evaluate.results import read_evaluation, with_suffix


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 compared, 2 refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="the JSON file of training.cli.evaluate that has the base")
    parser.add_argument("another", type=Path, nargs="?", help="that which has the other (default: the same)")
    parser.add_argument(
        "--base",
        default="tome",
        help="a policy, each rate with the same rate of the other, or one row, as none or tome-r8, with all of them",
    )
    parser.add_argument("--other", default="dtem", help="policies or rows, with commas, e.g. dtem,random or dtem-r8")
    parser.add_argument("--out", type=Path, required=True, help="files <out>.json, <out>.md and <out>.png")
    options = parser.parse_args(arguments)
    try:
        _compare(options)
    except (ValueError, OSError) as err:
        print(f"comparison refused: {err}", file=sys.stderr)
        return 2
    return 0


def _compare(options: argparse.Namespace) -> None:
    base = read_evaluation(options.evaluation)
    other = read_evaluation(options.another) if options.another else base
    found = compare(base, other, options.base, options.other)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, base.about, other.about, with_suffix(options.out, ".json"))
    table = markdown(found)
    with_suffix(options.out, ".md").write_text(table)
    models = " against ".join(dict.fromkeys(str(about.get("model")) for about in (other.about, base.about)))
    n_images, dataset = found[0].n_images, base.about.get("dataset")
    plot(found, with_suffix(options.out, ".png"), f"{models}, {n_images} images of {dataset}")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
