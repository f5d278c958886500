"""Evaluate policies over rates, and render the results as a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.evaluate.accuracy import Measurement, Model, measure
from training.evaluate.results import Row, adaptive_key
from training.merging.policies import FIXED_POLICIES, POLICIES, UNMERGED, Policy, check_policies, find_policy
from training.models.calibration import Calibration
from training.models.embedding import DecoupledEmbedding
from training.models.frozen import FrozenModule
from training.models.variants import FLOAT32
from training.tasks import find_measure, find_task
from training.tasks.measure import TOP1
from training.tasks.task import Task, output_tensors

_RANDOM_SEED = 1


def frozen_policy(
    task: Task, policy: str, model: nn.Module, rule: InputRule, r: int, embedding: DecoupledEmbedding | None
) -> FrozenModule:
    """Return the model under a policy at a rate.

    Raises: as `check_policies` and the task's `freeze`.
    """
    check_policies([policy], embedding)
    metric: Any = FIXED_POLICIES[policy].resolve_metric(embedding)
    return task.freeze(model, rule, r, metric=metric, metric_seed=_RANDOM_SEED)


def planned(policies: Sequence[str], rates: Sequence[int]) -> list[tuple[str, int]]:
    """Return the policies and rates to measure. r = 0 is measured once, as the unmerged policy."""
    merging = [rate for rate in rates if rate]
    return [(policy, r) for policy in policies for r in ([0] if policy == UNMERGED.name else merging)]


def evaluate(
    frozen: Callable[[str, int], FrozenModule],
    batches: Callable[[str], Iterable[tuple[Tensor, Tensor]]],
    plan: Sequence[tuple[str, int]],
) -> Iterable[Row]:
    """Yield a row for each policy and rate of the plan.

    frozen: return the model under a policy at a rate, on the device that it runs on. batches:
        return the images, in the same order each time, given a title for the progress bar.
    Raises: what `frozen` raises for any entry of the plan, before the first image is read.
    """
    for policy, r in plan:
        frozen(policy, r)
    for policy, r in plan:
        module = frozen(policy, r)
        by = find_task(module.task).measure
        result = measure(_runner(module), batches(f"{policy} r={r}"), by=by)
        yield fixed_row(policy, r, module.model.tokens[-1], module.gmacs(), result)


def _runner(module: FrozenModule) -> Model:
    @torch.inference_mode()
    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.cpu() for output in output_tensors(module(pixels.to(module.scale.device))))

    return run


def fixed_row(
    policy: str, r: int, tokens_left: int, gmacs: float, result: Measurement, precision: str = FLOAT32
) -> Row:
    """Return the row of a model with a fixed rate."""
    return Row(
        policy=policy,
        r=r,
        tokens_left=tokens_left,
        gmacs=gmacs,
        value=result.value,
        ci95=result.ci95,
        n_images=len(result.scores),
        images_per_second=result.images_per_second,
        scores=result.scores,
        precision=precision,
        measure=result.measure.name,
    )


def evaluate_adaptive(
    calibration: Calibration, module: FrozenModule, batches: Callable[[str], Iterable[tuple[Tensor, Tensor]]]
) -> Row:
    """Measure an adaptive model.

    Units: GMACs of each image by itself, without the padding of its batch
    """
    key = adaptive_key(calibration.policy, calibration.metric, calibration.max_accuracy_drop)
    by = find_task(module.task).measure
    result = measure(_runner(module), batches(key), by=by)
    return adaptive_row(calibration, result)


def adaptive_row(calibration: Calibration, result: Measurement, precision: str = FLOAT32) -> Row:
    """Return the row of an adaptive model.

    Raises: ValueError where the model was not adaptive.
    """
    if result.gmacs is None or result.tokens is None:
        raise ValueError("the model returned no token counts and no GMACs: it is not adaptive")
    return Row(
        policy=calibration.policy,
        r=None,
        tokens_left=float(result.tokens[:, -1].mean()),
        gmacs=float(result.gmacs.mean(dtype=float)),
        value=result.value,
        ci95=result.ci95,
        n_images=len(result.scores),
        images_per_second=result.images_per_second,
        scores=result.scores,
        metric=calibration.metric,
        max_accuracy_drop=calibration.max_accuracy_drop,
        gmacs_p5=float(np.percentile(result.gmacs, 5)),
        gmacs_p95=float(np.percentile(result.gmacs, 95)),
        precision=precision,
        measure=result.measure.name,
    )


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Sort rows as tables list them: in the order of `POLICIES`, then by setting."""
    return sorted(rows, key=lambda row: (POLICIES.index(_policy(row)), row.precision, _place(row)))


def _policy(row: Row) -> Policy:
    return find_policy(row.policy, row.metric)


def _place(row: Row) -> float:
    """Return the position of a row in its series, from the most to the least GMACs."""
    return row.r if row.r is not None else row.max_accuracy_drop or 0.0


def markdown(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Render the rows as a Markdown table with a note on their meaning. about: see `Evaluation`"""
    label = _measure_label(rows)
    lines = [
        f"| policy | r | tokens left | GMACs | {label} % | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    is_adaptive = any(row.r is None for row in rows)
    for row in rows:
        low, high = (f"{100 * bound:.2f}" for bound in row.ci95)
        lines.append(
            f"| {row.series} | {row.setting.removeprefix('r=')} | {_tokens(row)} | {_gmacs(row)} "
            f"| {100 * row.value:.2f} | {low} … {high} |"
        )
    lines += [
        "",
        f"{about['n_images']} images of {about['dataset']}, split {about['split']}. "
        f"GMACs of one image, merging included{_adaptive_note(label) if is_adaptive else ''}.",
    ]
    return "\n".join(lines) + "\n"


def _measure_label(rows: Sequence[Row]) -> str:
    return find_measure(rows[0].measure).label if rows else TOP1.label


def _adaptive_note(label: str) -> str:
    return (
        "; for adaptive policies the mean (5th … 95th percentile of images). "
        f"`drop` is the loss of {label}, in points, that the calibration of the thresholds allowed"
    )


def _tokens(row: Row) -> str:
    return f"{row.tokens_left:.0f}" if row.r is not None else f"{row.tokens_left:.1f}"


def _gmacs(row: Row) -> str:
    if row.gmacs_p5 is None or row.gmacs_p95 is None:
        return f"{row.gmacs:.3f}"
    return f"{row.gmacs:.3f} ({row.gmacs_p5:.3f} … {row.gmacs_p95:.3f})"


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw accuracy against GMACs, one line per series, with intervals, and r along the top.

    Baselines may leave the plotted range: they lose so much that the other lines would coincide.
    """
    # Figure without pyplot opens no window and has no global state.
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    unmerged = [row for row in rows if row.policy == UNMERGED.name]
    for series in dict.fromkeys(row.series for row in rows):
        line = [row for row in rows if row.series == series]
        policy = _policy(line[0])
        lowest = 100 * min(row.value for row in line)
        if policy is not UNMERGED:
            line = sorted(unmerged + line, key=lambda row: -row.gmacs)
        intervals = [row.ci95 for row in line]
        axes.errorbar(
            [row.gmacs for row in line],
            [100 * row.value for row in line],
            yerr=error_bars([100 * row.value for row in line], [(100 * low, 100 * high) for low, high in intervals]),
            color=policy.colour,
            marker="o" if line[-1].r is not None else "D",
            markersize=4,
            capsize=3,
            label=f"{series} (down to {lowest:.1f} %)" if policy.is_baseline else series,
            zorder=3 if policy is UNMERGED else 2,
        )
    axes.set(xlabel="GMACs per image", ylabel=f"{_measure_label(rows)} %")
    if shown := [row for row in rows if not _policy(row).is_baseline]:
        low, high = min(row.ci95[0] for row in shown), max(row.ci95[1] for row in shown)
        axes.set_ylim(100 * (low - 0.2 * (high - low)), 100 * (high + 0.1 * (high - low)))
    figure.suptitle(title, fontsize=10)
    _rates_on_top(axes, rows)
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=130)


def error_bars(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Return the distances from each value to the ends of its interval, as matplotlib expects."""
    # Rounding may put an end on the wrong side of its value, so negative distances become 0.
    ends = list(zip(values, intervals, strict=True))
    return [[max(0.0, value - low) for value, (low, _) in ends], [max(0.0, high - value) for value, (_, high) in ends]]


def _rates_on_top(axes: Any, rows: Sequence[Row]) -> None:
    """Label the top axis with r, at the GMACs of each; labels that would overlap are left out."""
    places: dict[int, float] = {}
    left, right = axes.get_xlim()
    fixed = [row for row in rows if row.r is not None]
    for row in sorted(fixed, key=lambda row: (row.r, POLICIES.index(_policy(row)))):
        if (
            row.r is not None
            and row.r not in places
            and all(abs(row.gmacs - place) > (right - left) / 30 for place in places.values())
        ):
            places[row.r] = row.gmacs
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(places.values()), [str(r) for r in places])
    top.set_xlabel("r, tokens removed per block")
