"""Compare rows of evaluations image by image: a table, a JSON file and a plot of the differences."""

from __future__ import annotations

from argparse import Namespace

from training.cli.command import report
from training.evaluate.comparison import compare, markdown, plot, write_json
from training.evaluate.results import read_evaluation, with_suffix


def run(options: Namespace) -> int:
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
    return 0
