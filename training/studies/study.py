"""Run a study: train and evaluate every variant of a recipe; write a table, a JSON file and a plot.

  python -m training.studies.study temperatures --out runs/studies

Finished variants are kept, so an interrupted study resumes. training/studies/variants.py defines the studies.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from training.cli.command import report, run_command
from training.data.sources import REFERENCE_INPUT, DigitScenes, pixel_batches
from training.evaluate.accuracy import Measurement, measure
from training.learn.dtem import DtemTraining
from training.learn.images import training_images
from training.learn.processes import Processes
from training.learn.recipe import DtemRecipe, read_recipe
from training.models.classifier import frozen_classifier
from training.models.vit import MetricChoice, load_vit
from training.studies.variants import STUDIES, Study

Row = dict[str, Any]
"""variant, r, top1, ci95, n_images (of the evaluation), n_trained (images seen in training)"""


def main(arguments: list[str] | None = None) -> int:
    return run_command("study", __doc__, _add_options, _study, arguments)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--recipe", type=Path, default=Path("training/recipes/reference-dtem.toml"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the results, <study>.*")
    parser.add_argument("--n-images", type=int, default=2_000, help="validation images per evaluation")
    parser.add_argument("--workers", type=int, default=1, help="data workers")


def _study(options: argparse.Namespace) -> None:
    recipe = read_recipe(options.recipe)
    if not isinstance(recipe, DtemRecipe):
        raise ValueError(f"{options.recipe} is a recipe of a backbone; a study varies a recipe of DTEM")
    study = STUDIES[options.study]
    images = list(pixel_batches(DigitScenes("validation", options.n_images), 50, options.workers))
    file = options.out / f"{options.study}.json"
    about = {"study": options.study, "question": study.question, "recipe": recipe.file, "n_images": options.n_images}
    rows = _read(file, about)
    for name, varied in {"ToMe, untrained": None, **study.vary(recipe)}.items():
        if name in {row["variant"] for row in rows}:
            continue
        if varied is None:
            vit = load_vit(recipe.architecture, weights=Path(recipe.weights), **recipe.arguments)
            rows += _evaluated(name, vit.eval(), "keys", (0, *study.rates), images, 0)
        else:
            training = _trained(name, replace(varied, file=f"{recipe.file}, {name}"), options)
            metric: MetricChoice = training.embedding.eval() if varied.embedding else "keys"
            rows += _evaluated(name, training.vit.eval(), metric, study.rates, images, varied.n_images)
        file.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    table = markdown(study, rows)
    title = f"Study of {options.study}"
    file.with_suffix(".md").write_text(report(title, study.question, options.command_line, table))
    plot(study, rows, file.with_suffix(".png"))
    print(table)


def _trained(name: str, recipe: DtemRecipe, options: argparse.Namespace) -> DtemTraining:
    folder = options.out / options.study / re.sub(r"[^a-z0-9.=]+", "-", name.lower())
    images = training_images(recipe.data, REFERENCE_INPUT, recipe.seed)
    training = DtemTraining(recipe, images, folder, processes=Processes(), n_workers=options.workers)
    training.run()
    return training


def _evaluated(
    name: str,
    vit: nn.Module,
    metric: MetricChoice,
    rates: tuple[int, ...],
    images: list[tuple[Tensor, Tensor]],
    n_trained: int,
) -> list[Row]:
    rows = []
    for r in tqdm(rates, desc=name, unit="rate"):
        classifier = frozen_classifier(vit, REFERENCE_INPUT, r, metric=metric)
        found: Measurement = measure(torch.inference_mode()(classifier.forward), images)
        rows.append(
            {
                "variant": name,
                "r": r,
                "top1": found.value,
                "ci95": list(found.ci95),
                "n_images": len(found.scores),
                "n_trained": n_trained,
            }
        )
    return rows


def _read(file: Path, about: dict[str, object]) -> list[Row]:
    """Read the finished rows. Raises: ValueError where the file is of another study."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return []
    content = json.loads(file.read_text())
    # The wording of the question may change; the rest identifies the study.
    if {**content["about"], "question": about["question"]} != about:
        raise ValueError(f"{file} holds another study, {content['about']}, not {about}: choose another --out")
    rows: list[Row] = content["rows"]
    return rows


def markdown(study: Study, rows: list[Row]) -> str:
    """Render the rows as a table: one line per variant, one column per rate."""
    rates = sorted({row["r"] for row in rows})
    lines = [
        f"Top-1 % on {rows[0]['n_images']} validation images, 95 % interval.",
        "",
        f"| variant | images seen | {' | '.join(f'r={r}' for r in rates)} |",
        f"|---|---:|{'---:|' * len(rates)}",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = {row["r"]: row for row in rows if row["variant"] == name}
        cells = [_cell(own[r]) if r in own else "" for r in rates]
        seen = next(iter(own.values()))["n_trained"]
        lines.append(f"| {name} | {seen} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    low, high = (100 * bound for bound in row["ci95"])
    return f"{100 * row['top1']:.2f} ({low:.1f} … {high:.1f})"


def plot(study: Study, rows: list[Row], file: Path) -> None:
    """Plot top-1 against r as lines; with at most two rates, as groups of points."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(8, 4.8 if len(study.rates) > 2 else 1.2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    if len(study.rates) > 2:
        for name in names:
            line = [row for row in rows if row["variant"] == name]
            axes.errorbar([row["r"] for row in line], *_points(line), marker="o", markersize=4, capsize=2, label=name)
        axes.set(xlabel="r", ylabel="top-1 %")
        axes.legend()
    else:
        for shift, r in enumerate(study.rates):
            line = [row for row in rows if row["r"] == r]
            heights = [names.index(row["variant"]) + 0.2 * shift - 0.1 for row in line]
            top1, errors = _points(line)
            axes.errorbar(top1, heights, xerr=errors, fmt="o", markersize=4, capsize=2, label=f"r={r}")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="top-1 %")
        axes.legend()
    axes.set_title(study.question, fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def _points(line: list[Row]) -> tuple[list[float], tuple[list[float], list[float]]]:
    below = [100 * (row["top1"] - row["ci95"][0]) for row in line]
    above = [100 * (row["ci95"][1] - row["top1"]) for row in line]
    return [100 * row["top1"] for row in line], (below, above)


if __name__ == "__main__":
    sys.exit(main())
