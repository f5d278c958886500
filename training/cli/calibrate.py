"""Calibrate adaptive merging: find the thresholds with the fewest GMACs that lose no more than so much accuracy.

ATM (nothing learned):  `python -m training.cli.calibrate --published model_store/reference/4 --max-accuracy-drop 0.0
                         --metric features --out runs/atm`
adaptive DTEM:          the same with `--metric embedding`
Without --out and a model, it is the newest reference model, and files in runs/calibrations.
Your own ViT:           `--architecture deit_small_patch16_224 --weights pretrained --data /data/imagenet/val`
Without labels:         `--unlabelled`, and a prediction that changes counts as lost.
Writes <out>.json, the calibration, which evaluate and export take by --calibrations; <out>.trials.jsonl, by which an
interrupted search resumes; and <out>.png. The same command gives the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from training.cli.model_options import ChosenModel, add_model_options, chosen_model, newest_version
from training.data.sources import Source, open_source, pixel_batches
from training.evaluate.calibrate import Judge, Trial, read_trials, search, write_trial
from training.evaluate.results import with_suffix
from training.merging.adaptive import Score
from training.models.calibration import AdaptiveMetric, Calibration
from training.models.weights import weights_digest


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 calibrated, 2 refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(split="validation", n_images=2000)
    parser.add_argument("--n-unseen", type=int, default=2000, help="images to report on, which the search never saw")
    parser.add_argument("--unlabelled", action="store_true", help="look at no labels: keep the unmerged predictions")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.0, help="points of top-1")
    parser.add_argument(
        "--metric", choices=get_args(AdaptiveMetric), default="features", help="what tokens are compared by"
    )
    parser.add_argument("--score", choices=get_args(Score), default="similarity", help="what must exceed the threshold")
    parser.add_argument("--split-depth", type=int, help="blocks before tokens split by size; default: searched too")
    parser.add_argument("--n-trials", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="a PyTorch device, as cuda")
    parser.add_argument("--out", type=Path, help="default: runs/calibrations/<metric>-<drop>")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("runs/calibrations") / f"{options.metric}-{options.max_accuracy_drop:g}"
    if not (options.run or options.published or options.architecture):
        options.published = newest_version(Path("model_store") / "reference")
    try:
        _calibrate(options)
    except (ValueError, OSError) as err:
        print(f"calibration refused: {err}", file=sys.stderr)
        return 2
    return 0


def _calibrate(options: argparse.Namespace) -> None:
    for name, least in (("n_images", 1), ("n_unseen", 1), ("n_trials", 1), ("max_accuracy_drop", 0)):
        if not getattr(options, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}")
    began_at = time.perf_counter()
    chosen = chosen_model(options)
    depth = len(chosen.vit.blocks)  # type: ignore[arg-type]
    if options.split_depth is not None and not 0 <= options.split_depth <= depth:
        raise ValueError(f"--split-depth {options.split_depth}: expected from 0 to the ViT's {depth} blocks")
    if options.metric == "embedding" and chosen.embedding is None:
        raise ValueError("--metric embedding needs one: name it by --embedding, or a --run or --published with one")
    source, unseen = _sources(options, chosen)
    n_parallel = 1
    if options.device == "cpu":  # images side by side, a thread each, waste less than operators on many
        n_parallel = os.cpu_count() or 1
        torch.set_num_threads(1)

    def judge(title: str, images: Source) -> Judge:
        pixels, labels = _load(title, images)
        return Judge(
            chosen.vit,
            chosen.rule,
            options.metric,
            chosen.embedding,
            pixels,
            None if options.unlabelled else labels,
            device=options.device,
            n_parallel=n_parallel,
        )

    about = _about(options, chosen, source)
    log = with_suffix(options.out, ".trials.jsonl")
    known = _known(log, about)
    calibrating = judge("images to calibrate on", source)
    with tqdm(total=options.n_trials, desc="trials", unit="trial", initial=len(known)) as bar:

        def on_trial(trial: Trial) -> None:
            write_trial(trial, log)
            bar.update()
            bar.set_postfix_str(
                f"{trial.gmacs:.3f} GMACs, {trial.loss_points:+.2f} points lost, {trial.n_images} images"
            )

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
    reporting = judge("unseen images", unseen)
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
    print(f"{len(trials)} trials, {time.perf_counter() - began_at:.0f} s in this run; wrote {options.out}.json")


def _sources(options: argparse.Namespace, chosen: ChosenModel) -> tuple[Source, Source]:
    """Return the images to search by and those to report on: other scans of the reference task, or others of a folder.

    Raises: ValueError where a folder has too few, or classes that are not the model's.
    """
    n_images, n_unseen = options.n_images, options.n_unseen
    if options.data == "digits":
        if options.split == "test":
            raise ValueError("--split test is what the result is reported on: calibrate on train or validation")
        return open_source("digits", chosen.rule, n_images, options.split), open_source("digits", chosen.rule, n_unseen)
    folder: Any = open_source(options.data, chosen.rule, n_images + n_unseen)
    if len(folder) < n_images + n_unseen:
        raise ValueError(
            f"{options.data} has {len(folder)} images; {n_images} to calibrate and {n_unseen} to report on were asked "
            "for: give a smaller --n-images and --n-unseen"
        )
    n_classes = int(chosen.vit.num_classes)  # type: ignore[arg-type]
    if not options.unlabelled and len(folder.labels) != n_classes:
        raise ValueError(
            f"{options.data} has {len(folder.labels)} classes, the model {n_classes}; --unlabelled needs none"
        )
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return _Part(folder, order[:n_images], "calibration"), _Part(folder, order[n_images:], "unseen")


class _Part(Subset[Any]):
    """Some of a folder's images."""

    def __init__(self, folder: Any, indices: list[int], name: str) -> None:
        super().__init__(folder, indices)
        self.name, self.labels, self.licence, self.credits = folder.name, folder.labels, folder.licence, folder.credits
        self.split = f"{folder.split} ({name} part)"


def _load(title: str, source: Source) -> tuple[Tensor, Tensor]:
    batches = tqdm(pixel_batches(source, 50, n_workers=1), desc=title, total=-(-len(source) // 50), unit="batch")
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def _about(options: argparse.Namespace, chosen: ChosenModel, source: Source) -> dict[str, Any]:
    names = ("metric", "score", "split_depth", "max_accuracy_drop", "n_trials", "seed", "unlabelled", "device")
    return {
        **{name: getattr(options, name) for name in names},
        "dataset": source.name,
        "split": source.split,
        "n_images": len(source),
        "weights": weights_digest(chosen.vit),
        "embedding": weights_digest(chosen.embedding) if chosen.embedding and options.metric == "embedding" else None,
    }


def _known(log: Path, about: dict[str, Any]) -> list[Trial]:
    """Return the trials that an interrupted search left. Raises: ValueError where they are of another one."""
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"about": about}) + "\n")
        return []
    found = json.loads(log.read_text().split("\n", 1)[0]).get("about")
    if found != about:
        raise ValueError(f"{log} holds the trials of another search, {found}, not {about}: give another --out")
    known = read_trials(log)
    log.write_text(json.dumps({"about": about}) + "\n")  # without a line that was cut short
    for trial in known:
        write_trial(trial, log)
    return known


def _table(found: Calibration) -> str:
    limits = found.thresholds
    lines = [
        f"{found.policy}, metric {found.metric}: alpha {limits.alpha:.5f}, beta {limits.beta:.2e}, floor "
        f"{limits.floor:.5f}, split depth {limits.split_depth}, score {limits.score}",
        "",
        "| images | n | GMACs, unmerged | merged | less | top-1, points | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in (("calibrated on", found.calibrated), ("unseen", found.unseen)):
        low, high = one.ci95_points
        lines.append(
            f"| {name}: {one.dataset}, {one.split} | {one.n_images} | {one.unmerged_gmacs:.3f} | {one.gmacs:.3f} "
            f"| {100 * (one.gmacs / one.unmerged_gmacs - 1):+.1f} % | {one.difference_points:+.2f} "
            f"| {low:+.2f} … {high:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def _plot(trials: list[Trial], best: Trial, found: Calibration, file: Path) -> None:
    """Draw every trial: what it costs and what it loses. Outside the bound is also what may have been lucky."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for is_inside, colour, label in ((True, "tab:green", "inside the bound"), (False, "tab:gray", "outside")):
        chosen = [trial for trial in trials if trial.is_inside is is_inside]
        axes.scatter([t.gmacs for t in chosen], [t.loss_points for t in chosen], s=14, color=colour, label=label)
    axes.scatter([best.gmacs], [best.loss_points], s=90, facecolors="none", edgecolors="tab:red", label="chosen")
    axes.axvline(found.calibrated.unmerged_gmacs, color="black", linewidth=1, linestyle=":")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="GMACs per image (dotted: unmerged)", ylabel="top-1 lost on the images that it met, points")
    axes.set_title(
        f"{found.policy} by {found.metric}: {len(trials)} trials, at most {found.max_accuracy_drop} points lost",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
