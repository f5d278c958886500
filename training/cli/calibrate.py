"""Calibrate adaptive merging: find the thresholds with the fewest GMACs within a bound on lost accuracy."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from joblib import cpu_count
from matplotlib.figure import Figure
from torch.utils.data import Subset
from tqdm import tqdm

from training.cli.devices import chosen_device
from training.cli.model_options import ChosenModel, announce, chosen_model, chosen_split, newest_version, opened_source
from training.cli.options import ModelOptions
from training.data.decoded import DecodedImages
from training.data.pixel_rule import describe
from training.data.sources import Source, find_dataset
from training.evaluate.calibrate import (
    PairedEvaluator,
    Trial,
    images_to_show,
    read_trials,
    resolution_points,
    search,
    write_trial,
)
from training.evaluate.progress import COLUMNS, progress
from training.evaluate.results import with_suffix
from training.merging.adaptive import Score
from training.merging.policies import ADAPTIVE_METRICS
from training.models.calibration import Calibration
from training.models.weights import weights_digest

_RESOLVED = 0.25
"""A bound is shown where the images rule out a loss of a quarter more,"""
_FINEST_POINTS = 0.1
"""or of a tenth of a point more."""

_N_IMAGES = 2000
"""Images of the search, and of the report, where the options do not say."""


def run(model: ModelOptions, options: Namespace) -> int:
    options.out = options.out or Path("runs/calibrations") / f"{options.metric}-{options.max_accuracy_drop:g}"
    if not (model.run or model.published or model.architecture):
        model = replace(model, published=newest_version(Path("model_store") / "reference"))
    for name, accepted in (("metric", list(ADAPTIVE_METRICS)), ("score", list(get_args(Score)))):
        if getattr(options, name) not in accepted:
            raise ValueError(f"--{name} {getattr(options, name)}: expected one of {', '.join(accepted)}")
    for name, minimum in (("n_trials", 1), ("max_accuracy_drop", 0)):
        if not getattr(options, name) >= minimum:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {minimum}")
    began_at = time.perf_counter()
    device = chosen_device(options.device)
    chosen = chosen_model(model)
    if chosen.n_outputs == 1:
        raise ValueError("the model has 1 output: calibration compares the most probable of several labels")
    depth = len(chosen.vit.blocks)  # type: ignore[arg-type]
    if options.split_depth is not None and not 0 <= options.split_depth <= depth:
        raise ValueError(f"--split-depth {options.split_depth}: expected from 0 to the ViT's {depth} blocks")
    if options.metric == "embedding" and chosen.embedding is None:
        raise ValueError(
            "--metric embedding needs an embedding: pass --embedding, or a --run or --published that has one"
        )
    source, unseen = _sources(model, options, chosen)
    n_parallel = 1
    if device.type == "cpu":
        # Several batches with one thread each are faster than one batch with several threads.
        n_parallel = cpu_count()
        torch.set_num_threads(1)

    def evaluator(images: Source) -> PairedEvaluator:
        decoded = DecodedImages(images, options.out.parent, progress)
        return PairedEvaluator(
            chosen.vit,
            chosen.rule,
            options.metric,
            chosen.embedding,
            decoded.pixels,
            None if options.unlabelled else decoded.answers,
            device=options.device,
            n_parallel=n_parallel,
        )

    about = _about(options, chosen, source)
    log = with_suffix(options.out, ".trials.jsonl")
    known = _known(log, about)
    calibrating = evaluator(source)
    print(shown_bound(options.max_accuracy_drop, len(source)), file=sys.stderr)
    bar = tqdm(
        total=options.n_trials, desc="trials", initial=len(known), ncols=COLUMNS, disable=not sys.stderr.isatty()
    )
    with bar:

        def on_trial(trial: Trial) -> None:
            write_trial(trial, log)
            bar.update()
            bar.set_postfix_str(f"{trial.gmacs:.3f} GMACs, {trial.loss_points:+.2f} points")

        best = search(
            calibrating,
            options.max_accuracy_drop,
            n_trials=options.n_trials,
            seed=options.seed,
            score=options.score,
            split_depth=options.split_depth,
            known=known,
            on_trial=on_trial,
        )
    reporting = evaluator(unseen)
    trials = read_trials(log)
    calibration = Calibration(
        metric=options.metric,
        thresholds=best.thresholds,
        weights=about["weights"],
        embedding=about["embedding"],
        max_accuracy_drop=options.max_accuracy_drop,
        seed=options.seed,
        n_trials=len(trials),
        calibrated=calibrating.measured(best.thresholds, source.name, source.split),
        unseen=reporting.measured(best.thresholds, unseen.name, unseen.split),
    )
    calibration.save(with_suffix(options.out, ".json"))
    _plot(trials, best, calibration, with_suffix(options.out, ".png"))
    print(_table(calibration))
    print(f"{len(trials)} trials, {time.perf_counter() - began_at:.0f} s; wrote {options.out}.json")
    return 0


def shown_bound(max_accuracy_drop: float, n_images: int) -> str:
    """Say which loss counts as within the bound, and how many images would narrow it down."""
    unseen = resolution_points(n_images)
    found = f"on {n_images} images, a loss of up to {max_accuracy_drop + unseen:.2g} points counts as within the bound"
    if unseen <= max_accuracy_drop * _RESOLVED:
        return found
    wanted = images_to_show(max(max_accuracy_drop * _RESOLVED, _FINEST_POINTS))
    return f"{found}" if n_images >= wanted else f"warning: {found} of {max_accuracy_drop:g}; {wanted} would show it"


def _sources(model: ModelOptions, options: Namespace, chosen: ChosenModel) -> tuple[Source, Source]:
    """Return the images of the search and of the report: two splits, or parts of a folder.

    Raises: ValueError where a folder has too few images, or other classes than the model.
    """
    dataset = find_dataset(chosen.data)
    if dataset.has_splits:
        n_images, n_unseen = model.n_images or _N_IMAGES, options.n_unseen or _N_IMAGES
        if model.split == "test":
            raise ValueError("--split test is reserved for the report: calibrate on train or validation")
        found = opened_source(chosen, n_images, chosen_split(model.split))
        announce(chosen, found, is_labelled=not options.unlabelled)
        return found, dataset.open(chosen.rule, n_unseen)
    asked = [n for n in (model.n_images, options.n_unseen) if n is not None]
    folder: Any = opened_source(
        chosen, sum(asked) if len(asked) == 2 else None, "test", is_labelled=not options.unlabelled
    )
    n_images = model.n_images or min(_N_IMAGES, len(folder) - (options.n_unseen or len(folder) // 2))
    n_unseen = options.n_unseen or min(_N_IMAGES, len(folder) - n_images)
    if min(n_images, n_unseen) < 1 or len(folder) < n_images + n_unseen:
        raise ValueError(
            f"{chosen.data} has {len(folder)} images; {n_images} to calibrate and {n_unseen} to report on were "
            "requested: reduce --n-images and --n-unseen"
        )
    announce(chosen, folder, is_labelled=not options.unlabelled)
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return _Part(folder, order[:n_images], "calibration"), _Part(
        folder, order[n_images : n_images + n_unseen], "unseen"
    )


class _Part(Subset[Any]):
    """A subset of a folder's images."""

    def __init__(self, folder: Any, indices: list[int], name: str) -> None:
        super().__init__(folder, indices)
        self.name, self.labels, self.licence, self.credits = folder.name, folder.labels, folder.licence, folder.credits
        self.split = f"{folder.split} ({name} part)"


def _about(options: Namespace, chosen: ChosenModel, source: Source) -> dict[str, Any]:
    names = ("metric", "score", "split_depth", "max_accuracy_drop", "n_trials", "seed", "unlabelled", "device")
    return {
        **{name: getattr(options, name) for name in names},
        "dataset": source.name,
        "split": source.split,
        "n_images": len(source),
        "pixels": describe(chosen.rule),
        "weights": weights_digest(chosen.vit),
        "embedding": weights_digest(chosen.embedding) if chosen.embedding and options.metric == "embedding" else None,
    }


def _known(log: Path, about: dict[str, Any]) -> list[Trial]:
    """Return the trials of an interrupted search.

    Raises: ValueError where they are of another search.
    """
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"about": about}) + "\n")
        return []
    found = json.loads(log.read_text().split("\n", 1)[0]).get("about")
    if found != about:
        raise ValueError(f"{log} was written by a search with other options, {found}: choose another --out")
    known = read_trials(log)
    # Rewrite the file, since its last line may be incomplete.
    log.write_text(json.dumps({"about": about}) + "\n")
    for trial in known:
        write_trial(trial, log)
    return known


def _table(found: Calibration) -> str:
    limits = found.thresholds
    lines = [
        f"{found.policy}, metric {found.metric}: alpha {limits.alpha:.5f}, beta {limits.beta:.2e}, floor "
        f"{limits.floor:.5f}, split depth {limits.split_depth}, score {limits.score}",
        "",
        "| images | n | GMACs unmerged | GMACs merged | GMACs saved | top-1, points | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in (("calibrated on", found.calibrated), ("unseen", found.unseen)):
        low, high = one.ci95_points
        lines.append(
            f"| {name}: {one.dataset}, {one.split} | {one.n_images} | {one.unmerged_gmacs:.3f} | {one.gmacs:.3f} "
            f"| {100 * (1 - one.gmacs / one.unmerged_gmacs):.1f} % | {one.difference_points:+.2f} "
            f"| {low:+.2f} … {high:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def _plot(trials: list[Trial], best: Trial, found: Calibration, file: Path) -> None:
    """Plot GMACs and loss of every trial. Trials that gained accuracy may be outside the bound."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for is_within, colour, label in ((True, "tab:green", "within the bound"), (False, "tab:gray", "outside")):
        chosen = [trial for trial in trials if trial.is_within_bound is is_within]
        axes.scatter([t.gmacs for t in chosen], [t.loss_points for t in chosen], s=14, color=colour, label=label)
    axes.scatter([best.gmacs], [best.loss_points], s=90, facecolors="none", edgecolors="tab:red", label="chosen")
    axes.axvline(found.calibrated.unmerged_gmacs, color="black", linewidth=1, linestyle=":")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="GMACs per image (dotted: unmerged)", ylabel="top-1 lost on the images tried, points")
    axes.set_title(
        f"{found.policy} on {found.metric}: {len(trials)} trials, at most {found.max_accuracy_drop} points lost",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)
