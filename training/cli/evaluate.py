"""Measure top-1, GMACs and images/s of merging policies over rates: a table, a JSON file and a picture.

`python -m training.cli.evaluate --published model_store/reference/1 --out benchmarks/results/policies`
`python -m training.cli.evaluate --architecture deit_small_patch16_224 --weights pretrained --data /data/imagenet/val
 --out runs/deit-s` does the same for any timm ViT. Rows already in the JSON file of --out are kept, so it resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from training.cli.model_options import add_model_options, chosen_model, chosen_source, rates
from training.data.sources import pixel_batches
from training.evaluate.table import POLICIES, evaluate, markdown, plot, read_rows, write_rows


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 measured, 2 refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--rates", type=rates, default=rates("0:16:2"), help="0,8,16 or first:last:step")
    parser.add_argument("--policies", default="none,tome,random", help="some of none, tome, random, with commas")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True, help="files <out>.json, <out>.md and <out>.png")
    options = parser.parse_args(arguments)
    try:
        _evaluate(options)
    except (ValueError, OSError) as err:
        print(f"evaluation refused: {err}", file=sys.stderr)
        return 2
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    chosen = chosen_model(options)
    source = chosen_source(options, chosen.rule)
    about: dict[str, object] = {
        "model": str(options.published or options.run or options.architecture),
        "dataset": source.name,
        "split": source.split,
        "n_images": len(source),
        "batch_size": options.batch_size,
    }
    file = options.out.with_suffix(".json")
    rows = read_rows(file, about)

    def batches(title: str) -> Iterable[tuple[Tensor, Tensor]]:
        n_batches = -(-len(source) // options.batch_size)
        return tqdm(pixel_batches(source, options.batch_size, n_workers=1), desc=title, total=n_batches, unit="batch")

    for row in evaluate(chosen.vit, chosen.rule, batches, options.rates, options.policies.split(","), rows):
        rows.append(row)
        write_rows(file, rows, about)
    rows.sort(key=lambda row: (list(POLICIES).index(row.policy), row.r))
    table = markdown(rows)
    options.out.with_suffix(".md").write_text(table)
    plot(rows, options.out.with_suffix(".png"), f"{about['model']}, {len(source)} images of {source.name}")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
