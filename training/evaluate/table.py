"""Evaluate policies over rates, and lay the figures out as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from training.data.preprocessing import InputRule
from training.evaluate.accuracy import Measurement, measure
from training.evaluate.results import Row, adaptive_key
from training.models.calibration import Calibration
from training.models.classifier import AdaptiveClassifier, ServedClassifier, frozen_classifier
from training.models.embedding import DecoupledEmbedding
from training.models.macs import count_macs
from training.models.vit import MetricChoice

POLICIES = ("none", "tome", "dtem", "random")
"""`none` does not merge; the others merge by the keys, by a decoupled embedding, and by numbers drawn at random."""
ADAPTIVE_POLICIES = ("atm", "adaptive-dtem")
"""Those that merge by calibrated thresholds: over keys or features, and over a decoupled embedding."""
COLOURS = {
    "none": "black",
    "tome": "tab:blue",
    "dtem": "tab:red",
    "random": "tab:gray",
    "atm (keys)": "tab:cyan",
    "atm (features)": "tab:green",
    "adaptive-dtem": "tab:orange",
}
_RANDOM_SEED = 1


def check_policies(policies: Sequence[str], embedding: DecoupledEmbedding | None) -> None:
    """Raises: ValueError for none, an unknown or a repeated policy, and for dtem without an embedding."""
    if not policies or set(policies) - set(POLICIES) or len(set(policies)) < len(policies):
        raise ValueError(f"policies {list(policies)}: expected some of {', '.join(POLICIES)}, each once")
    if "dtem" in policies and embedding is None:
        raise ValueError("policy dtem needs an embedding: name one by --embedding, or a --run or --published with one")


def policy_classifier(
    policy: str, model: Any, rule: InputRule, r: int, embedding: DecoupledEmbedding | None
) -> ServedClassifier:
    """Return the model merging at the rate as the policy does. Raises: as `check_policies`, `frozen_classifier`."""
    check_policies([policy], embedding)
    metric: MetricChoice = "random" if policy == "random" else "keys"
    if policy == "dtem" and embedding is not None:
        metric = embedding
    return frozen_classifier(model, rule, r, metric=metric, metric_seed=_RANDOM_SEED)


def planned(policies: Sequence[str], rates: Sequence[int]) -> list[tuple[str, int]]:
    """Return the policies and rates to measure; r = 0, where nothing merges, once, as policy none."""
    merging = [rate for rate in rates if rate]
    return [(policy, r) for policy in policies for r in ([0] if policy == "none" else merging)]


def evaluate(
    classifiers: Callable[[str, int], ServedClassifier],
    rule: InputRule,
    batches: Callable[[str], Iterable[tuple[Tensor, Tensor]]],
    plan: Sequence[tuple[str, int]],
) -> Iterable[Row]:
    """Yield a row for each policy and rate of the plan.

    classifiers: give that of a policy and rate; batches: given a title for the progress bar, the same images in the
    same order each time.
    Raises: what `classifiers` raises for any of the plan, before the first image.
    """
    for policy, r in plan:
        classifiers(policy, r)
    for policy, r in plan:
        classifier = classifiers(policy, r)
        gmacs = count_macs(classifier.model, (rule.height, rule.width)) / 1e9
        result = measure(torch.inference_mode()(classifier.forward), batches(f"{policy} r={r}"))
        yield fixed_row(policy, r, classifier.model.tokens[-1], gmacs, result)


def fixed_row(policy: str, r: int, tokens_left: int, gmacs: float, result: Measurement) -> Row:
    """Make the row of what a classifier with a fixed rate was measured to do."""
    return Row(
        policy=policy,
        r=r,
        tokens_left=tokens_left,
        gmacs=gmacs,
        top1=result.top1,
        ci95=result.ci95,
        n_images=len(result.is_right),
        images_per_second=result.images_per_second,
        is_right=result.is_right,
    )


def evaluate_adaptive(
    calibration: Calibration, classifier: AdaptiveClassifier, batches: Callable[[str], Iterable[tuple[Tensor, Tensor]]]
) -> Row:
    """Measure a model that adapts. Units: GMACs counted for each image as if it were alone in its batch"""
    key = adaptive_key(calibration.policy, calibration.metric, calibration.max_accuracy_drop)
    result = measure(torch.inference_mode()(classifier.forward), batches(key))
    return adaptive_row(calibration, result)


def adaptive_row(calibration: Calibration, result: Measurement) -> Row:
    """Make the row of what an adaptive classifier was measured to do. Raises: ValueError where that was none."""
    if result.gmacs is None or result.tokens is None:
        raise ValueError("the classifier does not say what each image kept and cost")
    return Row(
        policy=calibration.policy,
        r=None,
        tokens_left=float(result.tokens[:, -1].mean()),
        gmacs=float(result.gmacs.mean(dtype=float)),
        top1=result.top1,
        ci95=result.ci95,
        n_images=len(result.is_right),
        images_per_second=result.images_per_second,
        is_right=result.is_right,
        metric=calibration.metric,
        max_accuracy_drop=calibration.max_accuracy_drop,
        gmacs_p5=float(np.percentile(result.gmacs, 5)),
        gmacs_p95=float(np.percentile(result.gmacs, 95)),
    )


def in_order(rows: Sequence[Row]) -> list[Row]:
    order = (*POLICIES, *ADAPTIVE_POLICIES)
    return sorted(rows, key=lambda row: (order.index(row.policy), row.metric or "", _place(row)))


def _place(row: Row) -> float:
    """Return where a row stands in its series: from the dearest to the cheapest."""
    return row.r if row.r is not None else row.max_accuracy_drop or 0.0


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Lay the rows out as a Markdown table, and say what they are of. about: see `Evaluation`"""
    lines = [
        "| policy | r | tokens left | GMACs | top-1 % | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    is_adaptive = any(row.r is None for row in rows)
    for row in rows:
        low, high = (f"{100 * bound:.2f}" for bound in row.ci95)
        lines.append(
            f"| {row.series} | {row.setting.removeprefix('r=')} | {_tokens(row)} | {_gmacs(row)} "
            f"| {100 * row.top1:.2f} | {low} … {high} |"
        )
    lines += [
        "",
        f"{about['n_images']} images of {about['dataset']}, split {about['split']}. "
        f"GMACs of one image, merging included{_ADAPTIVE_NOTE if is_adaptive else ''}.",
    ]
    return "\n".join(lines) + "\n"


_ADAPTIVE_NOTE = (
    "; of a policy that adapts to the image, means, with 5th … 95th percentile of the images, and for r the points of "
    "top-1 that its thresholds were allowed to lose when they were calibrated"
)


def _tokens(row: Row) -> str:
    return f"{row.tokens_left:.0f}" if row.r is not None else f"{row.tokens_left:.1f}"


def _gmacs(row: Row) -> str:
    if row.gmacs_p5 is None or row.gmacs_p95 is None:
        return f"{row.gmacs:.3f}"
    return f"{row.gmacs:.3f} ({row.gmacs_p5:.3f} … {row.gmacs_p95:.3f})"


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw top-1 against GMACs, a line a policy, with intervals; r along the top.

    What random merging loses is far below the rest, which would then lie on one another: it may leave the picture.
    """
    figure = Figure(figsize=(7.5, 5), layout="constrained")  # no pyplot: no window, no global state
    axes = figure.subplots()
    unmerged = [row for row in rows if row.policy == "none"]
    for series in dict.fromkeys(row.series for row in rows):
        line = [row for row in rows if row.series == series]
        if series != "none":
            line = sorted(unmerged + line, key=lambda row: -row.gmacs)
        intervals = [row.ci95 for row in line]
        axes.errorbar(
            [row.gmacs for row in line],
            [100 * row.top1 for row in line],
            yerr=error_bars([100 * row.top1 for row in line], [(100 * low, 100 * high) for low, high in intervals]),
            color=COLOURS[series],
            marker="o" if line[-1].r is not None else "D",
            markersize=4,
            capsize=3,
            label=f"random (down to {100 * min(row.top1 for row in line):.1f} %)" if series == "random" else series,
            zorder=3 if series == "none" else 2,
        )
    axes.set(xlabel="GMACs per image", ylabel="top-1 %")
    if knowing := [row for row in rows if row.policy != "random"]:
        low, high = min(row.ci95[0] for row in knowing), max(row.ci95[1] for row in knowing)
        axes.set_ylim(100 * (low - 0.2 * (high - low)), 100 * (high + 0.1 * (high - low)))
    figure.suptitle(title, fontsize=10)
    _rates_on_top(axes, rows)
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=130)


def error_bars(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Return how far each interval reaches below and above its value, as matplotlib wants it."""
    ends = list(zip(values, intervals, strict=True))  # an end that is the value itself may be beside it by rounding
    return [[max(0.0, value - low) for value, (low, _) in ends], [max(0.0, high - value) for value, (_, high) in ends]]


def _rates_on_top(axes: Any, rows: Sequence[Row]) -> None:
    """Write each r above the GMACs that it costs, leaving out those too close to the one before."""
    places: dict[int, float] = {}
    left, right = axes.get_xlim()
    fixed = [row for row in rows if row.r is not None]
    for row in sorted(fixed, key=lambda row: (row.r, POLICIES.index(row.policy))):
        if (
            row.r is not None
            and row.r not in places
            and all(abs(row.gmacs - place) > (right - left) / 30 for place in places.values())
        ):
            places[row.r] = row.gmacs
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(places.values()), [str(r) for r in places])
    top.set_xlabel("r, tokens that each block merges away")
