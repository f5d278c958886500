"""Evaluate policies over rates, and lay the figures out as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.data.preprocessing import InputRule
from training.evaluate.accuracy import measure
from training.models.classifier import frozen_classifier
from training.models.macs import count_macs

POLICIES = {"none": "keys", "tome": "keys", "random": "random"}
"""Policy -> the metric that it merges by; `none` does not merge."""


@dataclass(frozen=True)
class Row:
    """One policy at one rate. Units: gmacs for one image; images_per_second of inference alone, in eager PyTorch."""

    policy: str
    r: int
    tokens_left: int
    gmacs: float
    top1: float
    ci95: tuple[float, float]
    n_images: int
    images_per_second: float


def evaluate(
    vit: nn.Module,
    rule: InputRule,
    batches: Callable[[str], Iterable[tuple[Tensor, Tensor]]],
    rates: Sequence[int],
    policies: Sequence[str],
    done: Sequence[Row] = (),
) -> Iterable[Row]:
    """Yield a row for each policy and rate that is not `done` yet; r = 0 is measured once, as policy none.

    batches: given a title for the progress bar, the same images in the same order each time.
    Raises: ValueError for an unknown policy.
    """
    if unknown := set(policies) - set(POLICIES):
        raise ValueError(f"policies {sorted(unknown)}: expected some of {', '.join(POLICIES)}")
    finished = {(row.policy, row.r) for row in done}
    for policy in policies:
        for r in [0] if policy == "none" else [rate for rate in rates if rate]:
            if (policy, r) not in finished:
                yield _row(vit, rule, batches(f"{policy} r={r}"), policy, r)


def _row(vit: nn.Module, rule: InputRule, batches: Iterable[tuple[Tensor, Tensor]], policy: str, r: int) -> Row:
    classifier = frozen_classifier(vit, rule, r, metric=POLICIES[policy], metric_seed=1)  # type: ignore[arg-type]
    macs = count_macs(classifier.model, (rule.height, rule.width))
    result = measure(torch.inference_mode()(classifier.forward), batches)
    tokens_left = classifier.model.tokens[-1]
    n_images = len(result.is_right)
    return Row(policy, r, tokens_left, macs / 1e9, result.top1, result.ci95, n_images, result.images_per_second)


def markdown(rows: Sequence[Row]) -> str:
    """Lay the rows out as a Markdown table."""
    lines = [
        "| policy | r | tokens left | GMACs | top-1 % | 95 % interval | images/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = (f"{100 * bound:.2f}" for bound in row.ci95)
        lines.append(
            f"| {row.policy} | {row.r} | {row.tokens_left} | {row.gmacs:.3f} | {100 * row.top1:.2f} | {low} … {high} "
            f"| {row.images_per_second:.0f} |"
        )
    return "\n".join(lines) + "\n"


def read_rows(file: Path, about: dict[str, object]) -> list[Row]:
    """Read the rows of an interrupted evaluation; none where there is no file.

    Raises: ValueError where the file tells of another evaluation.
    """
    if not file.exists():
        return []
    content = json.loads(file.read_text())
    if content["about"] != about:
        raise ValueError(f"{file} holds another evaluation, {content['about']}, not {about}: give another --out")
    return [Row(**{**entry, "ci95": tuple(entry["ci95"])}) for entry in content["rows"]]


def write_rows(file: Path, rows: Sequence[Row], about: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw top-1 against GMACs, a line a policy, with intervals."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # no pyplot: no window, no global state
    axes = figure.subplots()
    unmerged = [row for row in rows if row.policy == "none"]
    for policy in dict.fromkeys(row.policy for row in rows):
        line = [row for row in rows if row.policy == policy]
        if policy != "none":
            line = sorted(unmerged + line, key=lambda row: row.r)
        below = [100 * (row.top1 - row.ci95[0]) for row in line]
        above = [100 * (row.ci95[1] - row.top1) for row in line]
        gmacs, top1 = [row.gmacs for row in line], [100 * row.top1 for row in line]
        axes.errorbar(gmacs, top1, yerr=(below, above), marker="o", markersize=4, capsize=3, label=policy)
        if policy == "tome":
            for row in line:
                axes.annotate(f"r={row.r}", (row.gmacs, 100 * row.top1), (3, 7), textcoords="offset points", fontsize=8)
    axes.set(xlabel="GMACs per image", ylabel="top-1 %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)
