"""Compare rows of one or two evaluations; render differences as a table, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.evaluate.paired import PairedCounts, count_pairs
from training.evaluate.results import Evaluation, Row
from training.evaluate.table import error_bars
from training.merging.policies import UNMERGED
from training.tasks.measure import TOP1

_SAME_IMAGES = ("dataset", "split", "n_images")


@dataclass(frozen=True)
class Side:
    """One side of a comparison. Units: top1 from 0 to 1, gmacs per image"""

    model: str
    policy: str
    r: int | None
    top1: float
    gmacs: float
    series: str
    setting: str


@dataclass(frozen=True)
class Comparison:
    """The other minus the base.

    Units: difference and interval in points, gmacs_percent of the base's GMACs
    """

    base: Side
    other: Side
    counts: PairedCounts
    n_images: int
    difference_points: float
    ci95_points: tuple[float, float]
    mcnemar_p: float
    gmacs_percent: float


def compare(base: Evaluation, other: Evaluation, base_rows: str, other_rows: str) -> list[Comparison]:
    """Compare the selected rows of two evaluations of the same images.

    base_rows: a policy, whose rows are compared with the other's at equal r ("tome"), or one row
        that is compared with all of the other's ("tome-r8", "atm-keys-drop0.1", "none").
        other_rows: comma-separated policies or rows.
    Raises: ValueError where the images differ, a selection matches no row, or there is no pair.
    """
    for name in _SAME_IMAGES:
        if base.about.get(name) != other.about.get(name):
            raise ValueError(
                f"{name} {base.about.get(name)!r} and {other.about.get(name)!r}: only the same images can be paired"
            )
    is_row = base_rows == UNMERGED.name or any(row.key == base_rows for row in base.rows)
    fixed = _selected(base, base_rows) if is_row else []
    bases = {row.r: row for row in _selected(base, base_rows) if row.r is not None}
    found = []
    for selection in other_rows.split(","):
        for row in _selected(other, selection):
            partner = fixed[0] if fixed else None if row.r is None else bases.get(row.r)
            if partner is not None:
                found.append(_compared(base, partner, other, row))
    if not found:
        raise ValueError(f"base {base_rows} and other {other_rows} have no rate in common")
    return found


def _selected(evaluation: Evaluation, selection: str) -> list[Row]:
    rows = [row for row in evaluation.rows if selection in (row.policy, row.key)]
    if not rows:
        known = ", ".join(row.key for row in evaluation.rows)
        raise ValueError(f"no row {selection!r} in the evaluation of {evaluation.about.get('model')}: it has {known}")
    return sorted(rows, key=lambda row: row.r if row.r is not None else row.max_accuracy_drop or 0.0)


def _compared(base: Evaluation, base_row: Row, other: Evaluation, other_row: Row) -> Comparison:
    for row in (base_row, other_row):
        if row.measure != TOP1.name:
            raise ValueError(f"row {row.key} was measured by {row.measure}: only {TOP1.label} is compared in pairs")
    counts = count_pairs(base_row.scores, other_row.scores)
    low, high = counts.interval()
    return Comparison(
        base=_side(base, base_row),
        other=_side(other, other_row),
        counts=counts,
        n_images=counts.n_images,
        difference_points=100 * counts.difference,
        ci95_points=(100 * low, 100 * high),
        mcnemar_p=counts.mcnemar(),
        gmacs_percent=100 * (other_row.gmacs / base_row.gmacs - 1),
    )


def _side(evaluation: Evaluation, row: Row) -> Side:
    return Side(str(evaluation.about.get("model")), row.policy, row.r, row.value, row.gmacs, row.series, row.setting)


def markdown(found: Sequence[Comparison]) -> str:
    """Render the comparisons as a Markdown table with a note on the method."""
    lines = [
        "| base | other | top-1 % of base | of other | difference, points | 95 % interval | only base right | only "
        "other right | McNemar p | GMACs of base | of other | difference |",
        "|---|---|" + "---:|" * 10,
    ]
    names = {side.model: f"{side.model} " for one in found for side in (one.base, one.other)}
    if len(names) == 1:
        names = dict.fromkeys(names, "")
    for one in found:
        low, high = one.ci95_points
        lines.append(
            f"| {names[one.base.model]}{one.base.series} {one.base.setting} "
            f"| {names[one.other.model]}{one.other.series} {one.other.setting} "
            f"| {100 * one.base.top1:.2f} | {100 * one.other.top1:.2f} | {one.difference_points:+.2f} "
            f"| {low:+.2f} … {high:+.2f} | {one.counts.n_only_base} | {one.counts.n_only_other} | {one.mcnemar_p:.2g} "
            f"| {one.base.gmacs:.3f} | {one.other.gmacs:.3f} | {one.gmacs_percent:+.1f} % |"
        )
    lines += [
        "",
        f"The same {found[0].n_images} images for both. Difference: top-1 of other minus base, paired, with the "
        f"interval of Agresti and Min (2005). McNemar's test is exact and two-sided, without correction for the "
        f"number of rows.",
    ]
    return "\n".join(lines) + "\n"


def write_json(found: Sequence[Comparison], base: dict[str, Any], other: dict[str, Any], file: Path) -> None:
    content = {"base": base, "other": other, "comparisons": [asdict(one) for one in found]}
    file.write_text(json.dumps(content, indent=2) + "\n")


def plot(found: Sequence[Comparison], file: Path, title: str) -> None:
    """Plot the difference against the other's r, or against its GMACs if it is adaptive."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    series = list(dict.fromkeys((one.base.series, one.other.series) for one in found))
    rates = {one.other.r: f"{one.other.r}\n{one.gmacs_percent:+.1f} %" for one in reversed(found)}
    for index, policies in enumerate(series):
        line = [one for one in found if (one.base.series, one.other.series) == policies]
        # Shift the series horizontally so that error bars do not overlap.
        shift = 0.25 * (index - (len(series) - 1) / 2)
        axes.errorbar(
            [one.other.gmacs if None in rates else (one.other.r or 0) + shift for one in line],
            [one.difference_points for one in line],
            yerr=error_bars([one.difference_points for one in line], [one.ci95_points for one in line]),
            marker="o",
            capsize=4,
            label=f"{policies[1]} minus {policies[0]}",
        )
    axes.axhline(0, color="black", linewidth=1)
    if None in rates:
        axes.set(xlabel="GMACs of the other per image, mean")
    else:
        axes.set_xticks([r for r in rates if r is not None], list(rates.values()), fontsize=8)
        axes.set(xlabel="r of the other; its GMACs against the base's")
    axes.set(ylabel="difference of top-1, points")
    figure.suptitle(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)
